"""Computes PSNR and SSIM of one image with scikit-image, which is imported at the first call.

PromptIR and MIR-L score float32 images in [0, 1] with a uniform SSIM window, BasicSR levels in [0, 255] with a Gaussian
one (see protocols.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirl_dist.errors import UserError

PSNR_CEILING_DB = 100.0
"""PSNR of equal images, in dB: infinity is not valid JSON and would make every mean over images infinite."""

SSIM_WINDOW_PIXELS = 7
GAUSSIAN_WINDOW_PIXELS = 11


def psnr(restored: NDArray[Any], clean: NDArray[Any], peak: int) -> float:
    """Return the peak signal-to-noise ratio in dB, at most PSNR_CEILING_DB: one mean error over pixels and channels.

    restored, clean: of one shape and dtype, in [0, peak]. Source: MIR-L, tables II and III, whose code has no ceiling,
    which makes a difference only for errors below 1e-5; BasicSR.
    """
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(restored, clean):
        return PSNR_CEILING_DB
    measure: Any = peak_signal_noise_ratio
    return min(float(measure(clean, restored, data_range=peak)), PSNR_CEILING_DB)


def ssim(restored: NDArray[Any], clean: NDArray[Any]) -> float:
    """Return the structural similarity, in [-1, 1]: uniform 7 x 7 window, sample covariance, no border padding.

    restored, clean: float32 (H, W, 3) RGB in [0, 1], H and W at least 7. Mean over positions and channels. Raises
    UserError for smaller images. Source: MIR-L, tables II and III.
    """
    return _ssim(restored, clean, SSIM_WINDOW_PIXELS, data_range=1)


def ssim_8bit(restored: NDArray[Any], clean: NDArray[Any]) -> float:
    """Return the structural similarity, in [-1, 1]: Gaussian window of 11 x 11 pixels and sigma 1.5, no border padding.

    restored, clean: both uint8 (H, W, 3) or both float64 (H, W), of the same shape, H and W at least 11. Population
    covariance, data range 255, mean over positions and channels. Raises UserError for smaller images. Source: BasicSR.
    """
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return _ssim(restored, clean, GAUSSIAN_WINDOW_PIXELS, data_range=255, **gaussian)


def _ssim(restored: NDArray[Any], clean: NDArray[Any], window: int, **options: Any) -> float:
    from skimage.metrics import structural_similarity

    if min(clean.shape[:2]) < window:
        raise UserError(
            f"found an image of {clean.shape[0]} x {clean.shape[1]} pixels where the window is {window} x {window}. "
            "Score larger images."
        )
    measure: Any = structural_similarity
    return float(measure(clean, restored, channel_axis=-1 if clean.ndim == 3 else None, **options))


def to_8bit(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Clip to [0, 1] and round to uint8 levels, half to even."""
    levels: NDArray[np.uint8] = np.rint(np.clip(image, 0.0, 1.0) * np.float32(255)).astype(np.uint8)
    return levels


def luma(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return Y of BT.601 YCbCr in studio range, 16 to 235, not rounded: uint8 (H, W, 3) RGB to float64 (H, W).

    Source: MATLAB's rgb2ycbcr, BasicSR.
    """
    from skimage.color import rgb2ycbcr

    y: NDArray[np.float64] = rgb2ycbcr(image)[..., 0]
    return y
