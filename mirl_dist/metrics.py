"""PSNR and SSIM of one image by the protocol of PromptIR and MIR-L, with every convention written down.

Images: float32 arrays (H, W, 3), RGB, in [0, 1]. The restored image is clipped to [0, 1] and not quantised;
scores of a set are means over its images. scikit-image is imported at the first score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirl_dist.faults import Fault

PROTOCOL = (
    "rgb, centre crop to a multiple of 16, gaussian noise added to uint8 then clipped and truncated, "
    "output clipped to [0, 1] and not quantised, scikit-image psnr (at most 100 dB) and ssim "
    "(7x7 uniform window, sample covariance, data range 1), mean over images"
)
PSNR_CEILING_DB = 100.0
"""What equal images score: infinity is no JSON number and would swallow every mean over images."""

SSIM_WINDOW_PIXELS = 7

Image = NDArray[np.float32]


def psnr(restored: Image, clean: Image) -> float:
    """Peak signal-to-noise ratio of a restored image against the clean one, in dB.

    restored, clean: float32 (H, W, 3) RGB, H and W at least 7; clean in [0, 1], restored clipped here.
    Returns decibels for a peak of 1, at most PSNR_CEILING_DB (reached by equal images).
    Raises Fault for another type, shape or range.
    Source: MIR-L, tables II and III; differs only for errors below 1e-5: the published code has no ceiling.
    """
    from skimage.metrics import peak_signal_noise_ratio

    restored, clean = _pair(restored, clean)
    if np.array_equal(restored, clean):
        return PSNR_CEILING_DB
    measure: Any = peak_signal_noise_ratio
    return min(float(measure(clean, restored, data_range=1)), PSNR_CEILING_DB)


def ssim(restored: Image, clean: Image) -> float:
    """Structural similarity of a restored image to the clean one, mean over positions and channels.

    restored, clean: float32 (H, W, 3) RGB, H and W at least 7; clean in [0, 1], restored clipped here.
    Returns a value in [-1, 1]; window 7x7 uniform, sample covariance, data range 1, no border padding.
    Raises Fault for another type, shape or range.   Source: MIR-L, tables II and III.
    """
    from skimage.metrics import structural_similarity

    restored, clean = _pair(restored, clean)
    measure: Any = structural_similarity
    return float(measure(clean, restored, data_range=1, channel_axis=-1))


def crop_to_multiple(image: NDArray[Any], multiple: int = 16) -> NDArray[Any]:
    """The centre of an image whose sides are the largest multiples of `multiple` pixels (a view).

    image: (H, W) or (H, W, C), any type; of an odd rest the bottom or right side loses one pixel more.
    Raises Fault when a side is shorter than `multiple`.   Source: evaluation of AirNet, PromptIR and MIR-L.
    """
    if image.ndim not in (2, 3):
        raise Fault(
            f"found an array of shape {image.shape} where an image is cropped to a multiple of {multiple}. "
            "Give one image of shape (H, W) or (H, W, C)."
        )
    height, width = image.shape[:2]
    if min(height, width) < multiple:
        raise Fault(
            f"found an image of {height} x {width} pixels where the protocol crops to a multiple of "
            f"{multiple}. Leave it out, or evaluate images of at least {multiple} x {multiple} pixels."
        )
    top, left = height % multiple // 2, width % multiple // 2
    return image[top : top + height // multiple * multiple, left : left + width // multiple * multiple]


def _pair(restored: Image, clean: Image) -> tuple[Image, Image]:
    """Both images checked, the restored one clipped to [0, 1]."""
    for name, image in (("restored", restored), ("clean", clean)):
        if image.dtype != np.float32:
            raise Fault(
                f"found {image.dtype} pixels where the {name} image is scored. "
                "Convert to float32 in [0, 1] (8-bit images: divide by 255)."
            )
        if image.ndim != 3 or image.shape[2] != 3:
            raise Fault(
                f"found shape {image.shape} where the {name} image is scored. "
                "Give one RGB image with channels last, (H, W, 3)."
            )
        if not np.isfinite(image).all():
            raise Fault(
                f"found NaN or infinite pixels where the {name} image is scored. "
                "Look for the first step whose loss is not finite, or for a damaged ticket."
            )
    if restored.shape != clean.shape:
        raise Fault(
            f"found shapes {restored.shape} and {clean.shape} where a restored image meets its clean one. "
            "Crop or pad both in the same way before scoring."
        )
    if min(clean.shape[:2]) < SSIM_WINDOW_PIXELS:
        raise Fault(
            f"found an image of {clean.shape[0]} x {clean.shape[1]} pixels where the window is "
            f"{SSIM_WINDOW_PIXELS} x {SSIM_WINDOW_PIXELS}. Score larger images."
        )
    low, high = float(clean.min()), float(clean.max())
    if low < 0.0 or high > 1.0:
        raise Fault(
            f"found values from {low:g} to {high:g} where the clean image must lie in [0, 1]. "
            "Divide 8-bit images by 255; do not normalise by mean and deviation."
        )
    return np.clip(restored, 0.0, 1.0), clean
