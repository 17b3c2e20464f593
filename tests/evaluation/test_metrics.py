"""The scores: PSNR and SSIM by the published protocol, against reference values computed elsewhere."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from mirl_dist.errors import UserError
from mirl_dist.evaluation.metrics import (
    PROTOCOL,
    PSNR_CEILING_DB,
    crop_to_multiple,
    luma,
    psnr,
    psnr_8bit,
    ssim,
    ssim_8bit,
    to_8bit,
)
from tests.evaluation.vectors import reference_pair

Levels = NDArray[np.float64]


def test_scores_equal_the_reference_values_of_the_published_protocol() -> None:
    restored, clean = reference_pair()
    assert psnr(restored, clean) == pytest.approx(27.300818947051035, abs=1e-6)
    assert ssim(restored, clean) == pytest.approx(0.8385490775108337, abs=1e-6)


def straight_ssim(one: Levels, other: Levels) -> float:
    """SSIM of two planes written out: every 11 x 11 window that fits, Gaussian weights, population moments."""
    axis = np.arange(11) - 5
    weights = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    a, b = (np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (11, 11)) for x in (one, other))

    def mean(x: Levels) -> Levels:
        return np.einsum("yxij,ij->yx", x, weights)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_8_bit_scores_equal_the_reference_values_and_a_computation_written_out() -> None:
    restored, clean = map(to_8bit, reference_pair())
    assert psnr_8bit(restored, clean) == pytest.approx(27.29811946529217, abs=1e-9)
    assert psnr_8bit(restored[4:-4, 4:-4], clean[4:-4, 4:-4]) == pytest.approx(27.28608349954241, abs=1e-9)
    assert ssim_8bit(restored, clean) == pytest.approx(0.7737950140491829, abs=1e-9)
    by_hand = np.mean([straight_ssim(restored[..., c], clean[..., c]) for c in range(3)])
    assert ssim_8bit(restored, clean) == pytest.approx(by_hand, abs=1e-6)
    square = np.mean((restored.astype(float) - clean.astype(float)) ** 2)
    assert psnr_8bit(restored, clean) == pytest.approx(10 * np.log10(255**2 / square), abs=1e-9)


def test_luma_scores_equal_the_reference_values_and_a_computation_written_out() -> None:
    restored, clean = map(to_8bit, reference_pair())
    a, b = luma(restored), luma(clean)
    for image, y in ((restored, a), (clean, b)):
        unit = image / 255
        straight = 16 + 65.481 * unit[..., 0] + 128.553 * unit[..., 1] + 24.966 * unit[..., 2]
        assert np.abs(y - straight).max() < 1e-9
    assert psnr_8bit(a, b) == pytest.approx(32.0915973425301, abs=1e-9)
    assert ssim_8bit(a, b) == pytest.approx(0.8688822914166272, abs=1e-9)
    assert ssim_8bit(a, b) == pytest.approx(straight_ssim(a, b), abs=1e-6)
    extremes = np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8)
    assert luma(extremes) == pytest.approx(np.array([[16.0, 235.0]])), "studio range"


def test_float_scores_are_those_of_double_precision_to_six_digits() -> None:
    restored, clean = reference_pair()
    assert psnr(restored, clean) == pytest.approx(27.300818907270198, abs=1e-6)
    assert ssim(restored, clean) == pytest.approx(0.8385492104831088, abs=1e-6)


def test_8_bits_are_rounded_half_to_even_and_clipped() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_8bit(levels.astype(np.float32) / np.float32(255)), levels)
    wild = np.array([-3.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.7], dtype=np.float32)
    assert to_8bit(wild).tolist() == [0, 0, 1, 255, 255]


def test_8_bit_scores_of_equal_images_and_of_small_ones() -> None:
    image = to_8bit(reference_pair()[1])
    assert psnr_8bit(image, image) == PSNR_CEILING_DB
    assert ssim_8bit(image, image) == pytest.approx(1.0)
    with pytest.raises(UserError, match="found an image of 10 x 64 pixels where the window is 11 x 11. Score larger"):
        ssim_8bit(image[:10], image[:10])


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
    with pytest.raises(UserError, match=text):
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
    with pytest.raises(UserError, match="found an image of 15 x 40 pixels where the protocol crops"):
        crop_to_multiple(np.zeros((15, 40, 3)), 16)
    with pytest.raises(UserError, match=r"found an array of shape \(1, 3, 32, 32\)"):
        crop_to_multiple(np.zeros((1, 3, 32, 32)), 16)


def test_the_protocol_names_every_convention() -> None:
    for word in ("rgb", "16", "truncated", "not quantised", "scikit-image", "7x7", "sample covariance"):
        assert word in PROTOCOL
