"""The scores: PSNR and SSIM by the published protocols, against reference values computed elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from mirl_dist.errors import UserError
from mirl_dist.evaluation.metrics import PSNR_CEILING_DB, luma, psnr, ssim, ssim_8bit, to_8bit

Image = NDArray[np.float32]
Levels = NDArray[np.float64]


def reference_pair() -> tuple[Image, Image]:
    """A restored and a clean image (48, 64, 3) made of sines and an integer hash: no generator, no file."""
    row, column, channel = np.meshgrid(np.arange(48), np.arange(64), np.arange(3), indexing="ij")
    waves = 0.5 + 0.25 * np.sin(column / 7 + channel) + 0.2 * np.cos(row / 5 - 0.5 * channel)
    clean = np.round(255 * waves) / 255
    index = np.arange(clean.size, dtype=np.int64) % 1000003
    hashed = (611953 * index * index + 350377 * index + 104729 * 5 + 1299709) % 1000003
    restored = np.clip(clean + 0.15 * (hashed / 1000003 - 0.5).reshape(clean.shape), 0, 1)
    return restored.astype(np.float32), clean.astype(np.float32)


def test_float_scores_equal_the_reference_values_in_single_and_double_precision() -> None:
    pair = reference_pair()
    assert psnr(*pair, peak=1) == pytest.approx(27.300818947051035, abs=1e-6)
    assert psnr(*pair, peak=1) == pytest.approx(27.300818907270198, abs=1e-6), "of doubles"
    assert ssim(*pair) == pytest.approx(0.8385490775108337, abs=1e-6)
    assert ssim(*pair) == pytest.approx(0.8385492104831088, abs=1e-6), "of doubles"


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
    assert psnr(restored, clean, peak=255) == pytest.approx(27.29811946529217, abs=1e-9)
    assert psnr(restored[4:-4, 4:-4], clean[4:-4, 4:-4], peak=255) == pytest.approx(27.28608349954241, abs=1e-9)
    assert ssim_8bit(restored, clean) == pytest.approx(0.7737950140491829, abs=1e-9)
    by_hand = np.mean([straight_ssim(restored[..., c], clean[..., c]) for c in range(3)])
    assert ssim_8bit(restored, clean) == pytest.approx(by_hand, abs=1e-6)
    square = np.mean((restored.astype(float) - clean.astype(float)) ** 2)
    assert psnr(restored, clean, peak=255) == pytest.approx(10 * np.log10(255**2 / square), abs=1e-9)


def test_luma_scores_equal_the_reference_values_and_a_computation_written_out() -> None:
    restored, clean = map(to_8bit, reference_pair())
    a, b = luma(restored), luma(clean)
    for image, y in ((restored, a), (clean, b)):
        unit = image / 255
        straight = 16 + 65.481 * unit[..., 0] + 128.553 * unit[..., 1] + 24.966 * unit[..., 2]
        assert np.abs(y - straight).max() < 1e-9
    assert psnr(a, b, peak=255) == pytest.approx(32.0915973425301, abs=1e-9)
    assert ssim_8bit(a, b) == pytest.approx(0.8688822914166272, abs=1e-9)
    assert ssim_8bit(a, b) == pytest.approx(straight_ssim(a, b), abs=1e-6)
    extremes = np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8)
    assert luma(extremes) == pytest.approx(np.array([[16.0, 235.0]])), "studio range"


def test_8_bits_are_rounded_half_to_even_and_clipped() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_8bit(levels.astype(np.float32) / np.float32(255)), levels)
    wild = np.array([-3.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.7], dtype=np.float32)
    assert to_8bit(wild).tolist() == [0, 0, 1, 255, 255]


def test_equal_images_score_a_finite_ceiling_that_json_can_hold() -> None:
    _, clean = reference_pair()
    levels = to_8bit(clean)
    assert psnr(clean, clean, peak=1) == psnr(levels, levels, peak=255) == PSNR_CEILING_DB == 100.0
    assert psnr(clean + np.float32(1e-7), clean, peak=1) <= PSNR_CEILING_DB
    assert ssim(clean, clean) == pytest.approx(1.0) and ssim_8bit(levels, levels) == pytest.approx(1.0)
    assert json.loads(json.dumps(psnr(clean, clean, peak=1), allow_nan=False)) == 100.0


def test_a_better_image_scores_higher() -> None:
    restored, clean = reference_pair()
    halfway = (restored + clean) / np.float32(2)
    assert psnr(halfway, clean, peak=1) > psnr(restored, clean, peak=1)
    assert ssim(halfway, clean) > ssim(restored, clean)


def test_an_image_that_is_smaller_than_the_window_is_refused() -> None:
    restored, clean = reference_pair()
    with pytest.raises(UserError, match="found an image of 6 x 64 pixels where the window is 7 x 7. Score larger"):
        ssim(restored[:6], clean[:6])
    with pytest.raises(UserError, match="found an image of 10 x 64 pixels where the window is 11 x 11. Score larger"):
        ssim_8bit(to_8bit(restored[:10]), to_8bit(clean[:10]))
