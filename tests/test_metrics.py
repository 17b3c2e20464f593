"""The scores: PSNR and SSIM by the published protocol, against reference values computed elsewhere."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from mirl_dist.faults import Fault
from mirl_dist.metrics import PROTOCOL, PSNR_CEILING_DB, crop_to_multiple, psnr, ssim

Image = NDArray[np.float32]


def reference_pair() -> tuple[Image, Image]:
    """A restored and a clean image (48, 64, 3) made of sines and an integer hash: no generator, no file."""
    row, column, channel = np.meshgrid(np.arange(48), np.arange(64), np.arange(3), indexing="ij")
    waves = 0.5 + 0.25 * np.sin(column / 7 + channel) + 0.2 * np.cos(row / 5 - 0.5 * channel)
    clean = np.round(255 * waves) / 255
    index = np.arange(clean.size, dtype=np.int64) % 1000003
    hashed = (611953 * index * index + 350377 * index + 104729 * 5 + 1299709) % 1000003
    restored = np.clip(clean + 0.15 * (hashed / 1000003 - 0.5).reshape(clean.shape), 0, 1)
    return restored.astype(np.float32), clean.astype(np.float32)


def test_scores_equal_the_reference_values_of_the_published_protocol() -> None:
    restored, clean = reference_pair()
    assert psnr(restored, clean) == pytest.approx(27.300818947051035, abs=1e-6)
    assert ssim(restored, clean) == pytest.approx(0.8385490775108337, abs=1e-6)


def test_neither_a_gaussian_window_nor_quantised_output_would_pass_for_the_protocol() -> None:
    restored, clean = reference_pair()
    assert abs(ssim(restored, clean) - 0.7739191664831587) > 0.01
    assert abs(psnr(restored, clean) - 27.29811946529217) > 1e-3
    assert abs(psnr(restored, clean) - 27.295179459284963) > 1e-3


def test_noise_added_to_uint8_and_truncated_scores_the_reference_value() -> None:
    _, clean = reference_pair()
    eight_bit = np.round(clean * 255)
    noise = np.random.RandomState(0).randn(48, 64, 3)
    noisy = np.clip(eight_bit + 25 * noise, 0, 255).astype(np.uint8)
    assert noisy.reshape(-1)[:6].tolist() == [222, 236, 237, 244, 255, 184]
    assert psnr(noisy.astype(np.float32) / np.float32(255), clean) == pytest.approx(20.45593947301317, abs=1e-4)


def test_output_outside_the_range_is_clipped_before_scoring() -> None:
    _, clean = reference_pair()
    wild = np.where(clean > 0.5, clean + np.float32(2), clean - np.float32(2))
    assert psnr(wild, clean) == psnr(np.clip(wild, 0, 1), clean)
    assert ssim(wild, clean) == ssim(np.clip(wild, 0, 1), clean)
    assert wild.max() > 1.5, "the caller's array stays as it was"


def test_equal_images_score_a_finite_ceiling_that_json_can_hold() -> None:
    _, clean = reference_pair()
    assert psnr(clean, clean) == PSNR_CEILING_DB == 100.0
    assert psnr(clean + np.float32(1e-7), clean) <= PSNR_CEILING_DB
    assert ssim(clean, clean) == pytest.approx(1.0)
    assert math.isfinite(json.loads(json.dumps(psnr(clean, clean))))


def test_a_better_image_scores_higher() -> None:
    restored, clean = reference_pair()
    halfway = (restored + clean) / np.float32(2)
    assert psnr(halfway, clean) > psnr(restored, clean)
    assert ssim(halfway, clean) > ssim(restored, clean)


@pytest.mark.parametrize("score", [psnr, ssim])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r, c: (r.astype(np.float64), c), "found float64 pixels where the restored image is scored"),
        (lambda r, c: (r, (c * 255).astype(np.uint8)), "found uint8 pixels where the clean image is scored"),
        (lambda r, c: (r.transpose(2, 0, 1), c), "Give one RGB image with channels last"),
        (lambda r, c: (r[..., 0], c), r"found shape \(48, 64\)"),
        (lambda r, c: (r[:40], c), r"found shapes \(40, 64, 3\) and \(48, 64, 3\)"),
        (lambda r, c: (r[:6], c[:6]), "found an image of 6 x 64 pixels where the window is 7 x 7"),
        (lambda r, c: (r, c * 255), r"must lie in \[0, 1\]. Divide 8-bit images by 255"),
        (lambda r, c: (r * np.float32("nan"), c), "found NaN or infinite pixels where the restored image"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_way_out(score, change, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Fault, match=text):
        score(*change(*reference_pair()))


def test_crop_keeps_the_centre_in_multiples_of_sixteen() -> None:
    image = np.arange(37 * 50).reshape(37, 50)
    cropped = crop_to_multiple(image)
    assert cropped.shape == (32, 48)
    assert cropped[0, 0] == image[2, 1], "5 rows too many: 2 above, 3 below; 2 columns: 1 and 1"
    assert crop_to_multiple(np.zeros((321, 481, 3))).shape == (320, 480, 3)
    whole = np.zeros((32, 48, 3))
    assert crop_to_multiple(whole, 16).shape == whole.shape


def test_an_image_smaller_than_the_multiple_is_refused() -> None:
    with pytest.raises(Fault, match="found an image of 15 x 40 pixels where the protocol crops"):
        crop_to_multiple(np.zeros((15, 40, 3)), 16)
    with pytest.raises(Fault, match=r"found an array of shape \(1, 3, 32, 32\)"):
        crop_to_multiple(np.zeros((1, 3, 32, 32)), 16)


def test_the_protocol_names_every_convention() -> None:
    for word in ("rgb", "16", "truncated", "not quantised", "scikit-image", "7x7", "sample covariance"):
        assert word in PROTOCOL
