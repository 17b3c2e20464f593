"""Computes PSNR and SSIM of one image, each in the two variants that papers use (see protocols.py).

`psnr` and `ssim` follow PromptIR and MIR-L: float32 (H, W, 3) RGB in [0, 1], the restored image clipped, not quantised.
`psnr_8bit` and `ssim_8bit` follow BasicSR: levels 0 to 255. All four use scikit-image, imported at the first call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirl_dist.errors import UserError

PROTOCOL = (
    "rgb, centre crop to a multiple of 16, gaussian noise added to uint8 then clipped and truncated, "
    "output clipped to [0, 1] and not quantised, scikit-image psnr (at most 100 dB) and ssim "
    "(7x7 uniform window, sample covariance, data range 1), mean over images"
)
PSNR_CEILING_DB = 100.0
"""PSNR of equal images, in dB: infinity is not valid JSON and would make every mean over images infinite."""

SSIM_WINDOW_PIXELS = 7
GAUSSIAN_WINDOW_PIXELS = 11

Image = NDArray[np.float32]
Levels = NDArray[np.uint8] | NDArray[np.float64]
"""An image in [0, 255]: uint8 (H, W, 3) RGB, or float64 (H, W) luma."""


def psnr(restored: Image, clean: Image) -> float:
    """Return the peak signal-to-noise ratio of a restored image against the clean one, in dB.

    restored, clean: float32 (H, W, 3) RGB, H and W at least 7; clean in [0, 1], restored clipped here.
    The peak is 1; the result is at most PSNR_CEILING_DB (the value for equal images).
    Raises UserError for another type, shape or range.
    Source: MIR-L, tables II and III; differs only for errors below 1e-5, since the published code has no ceiling.
    """
    return _psnr(*_pair(restored, clean), peak=1)


def ssim(restored: Image, clean: Image) -> float:
    """Return the structural similarity of a restored image to the clean one, averaged over positions and channels.

    restored, clean: float32 (H, W, 3) RGB, H and W at least 7; clean in [0, 1], restored clipped here.
    The result is in [-1, 1]; uniform 7 x 7 window, sample covariance, data range 1, no border padding.
    Raises UserError for another type, shape or range. Source: MIR-L, tables II and III.
    """
    from skimage.metrics import structural_similarity

    restored, clean = _pair(restored, clean)
    measure: Any = structural_similarity
    return float(measure(clean, restored, data_range=1, channel_axis=-1))


def psnr_8bit(restored: Levels, clean: Levels) -> float:
    """Return the PSNR of levels in dB, at most PSNR_CEILING_DB: peak 255, one mean error over pixels and channels.

    restored, clean: both uint8 (H, W, 3) or both float64 (H, W), of the same shape. Source: BasicSR.
    """
    return _psnr(restored, clean, peak=255)


def _psnr(restored: NDArray[Any], clean: NDArray[Any], peak: int) -> float:
    """Return the PSNR in dB, at most PSNR_CEILING_DB."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(restored, clean):
        return PSNR_CEILING_DB
    measure: Any = peak_signal_noise_ratio
    return min(float(measure(clean, restored, data_range=peak)), PSNR_CEILING_DB)


def ssim_8bit(restored: Levels, clean: Levels) -> float:
    """Return the SSIM of levels, in [-1, 1]: Gaussian window of 11 x 11 pixels and sigma 1.5, no border padding.

    restored, clean: both uint8 (H, W, 3) or both float64 (H, W), of the same shape, H and W at least 11. Population
    covariance, data range 255, mean over positions and channels. Raises UserError for smaller images.
    Source: BasicSR.
    """
    from skimage.metrics import structural_similarity

    _check_size(clean, GAUSSIAN_WINDOW_PIXELS)
    measure: Any = structural_similarity
    axis = -1 if clean.ndim == 3 else None
    shape = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(measure(clean, restored, data_range=255, channel_axis=axis, **shape))


def to_8bit(image: Image) -> NDArray[np.uint8]:
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


def crop_to_multiple(image: NDArray[Any], multiple: int = 16) -> NDArray[Any]:
    """Return a view of the centre of an image, whose sides are the largest multiples of `multiple` pixels.

    image: (H, W) or (H, W, C), any dtype; an odd remainder removes one pixel more at the bottom or right.
    Raises UserError for another shape, or if a side is shorter than `multiple`. Source: evaluation of AirNet, PromptIR
    and MIR-L.
    """
    if image.ndim not in (2, 3):
        raise UserError(
            f"found an array of shape {image.shape} where an image is cropped to a multiple of {multiple}. "
            "Give one image of shape (H, W) or (H, W, C)."
        )
    height, width = image.shape[:2]
    if min(height, width) < multiple:
        raise UserError(
            f"found an image of {height} x {width} pixels where the protocol crops to a multiple of "
            f"{multiple}. Leave it out, or evaluate images of at least {multiple} x {multiple} pixels."
        )
    top, left = height % multiple // 2, width % multiple // 2
    return image[top : top + height // multiple * multiple, left : left + width // multiple * multiple]


def check_same_shape(restored: Image, clean: NDArray[Any]) -> None:
    """Raise UserError for images of another dtype, of different or unsupported shapes, or with non-finite values.

    restored: float32; clean: float32 or uint8; both (H, W, 3), at least 7 x 7 pixels.
    """
    for name, image, wanted in (("restored", restored, ("float32",)), ("clean", clean, ("float32", "uint8"))):
        if image.dtype.name not in wanted:
            raise UserError(
                f"found {image.dtype} pixels where the {name} image is scored. "
                "Convert to float32 in [0, 1] (8-bit images: divide by 255)."
            )
        if image.ndim != 3 or image.shape[2] != 3:
            raise UserError(
                f"found shape {image.shape} where the {name} image is scored. "
                "Give one RGB image with channels last, (H, W, 3)."
            )
        if not np.isfinite(image).all():
            raise UserError(
                f"found NaN or infinite pixels where the {name} image is scored. "
                "Look for the first step whose loss is not finite, or for a damaged ticket."
            )
    if restored.shape != clean.shape:
        raise UserError(
            f"found shapes {restored.shape} and {clean.shape} where a restored image meets its clean one. "
            "Crop or pad both in the same way before scoring."
        )
    _check_size(clean, SSIM_WINDOW_PIXELS)


def _check_size(image: NDArray[Any], window: int) -> None:
    """Raise UserError if the SSIM window does not fit into the image."""
    if min(image.shape[:2]) < window:
        raise UserError(
            f"found an image of {image.shape[0]} x {image.shape[1]} pixels where the window is "
            f"{window} x {window}. Score larger images."
        )


def _pair(restored: Image, clean: Image) -> tuple[Image, Image]:
    """Check both images; return them with the restored one clipped to [0, 1]."""
    check_same_shape(restored, clean)
    if clean.dtype != np.float32:
        raise UserError(
            f"found {clean.dtype} pixels where the clean image is scored. "
            "Convert to float32 in [0, 1] (8-bit images: divide by 255)."
        )
    low, high = float(clean.min()), float(clean.max())
    if low < 0.0 or high > 1.0:
        raise UserError(
            f"found values from {low:g} to {high:g} where the clean image must lie in [0, 1]. "
            "Divide 8-bit images by 255; do not normalise by mean and deviation."
        )
    return np.clip(restored, 0.0, 1.0), clean
