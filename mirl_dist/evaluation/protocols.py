"""Defines the named evaluation protocols: cropping, test noise, and how PSNR and SSIM are computed.

A protocol has two parts. Its input (`multiple`, `noise`) is the image that the network restores; protocols with equal
input share the forward pass. Its measure (`output`, `colour`, `border`) compares the restored image with the clean one.
docs/protocols.md lists the protocols with their sources.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.config.tasks import Task
from mirl_dist.data.degradations import degrade
from mirl_dist.errors import UserError
from mirl_dist.evaluation import metrics

Pixels = NDArray[np.uint8]
Image = NDArray[np.float32]


class ScoringProtocol(NamedTuple):
    """An evaluation protocol.

    text: all conventions in one sentence. multiple: both images are centre-cropped to multiples of this many pixels; 1
    keeps them whole. noise: for denoising tasks; 'truncated' and 'rounded' give clipped 8-bit images, 'float' is
    neither clipped nor quantised. output: restored images are clipped, then scored in float with SSIM's uniform window,
    or rounded to 8 bits with its Gaussian one. colour: scored channels, RGB or luma. border: pixels removed at each
    side before scoring.
    """

    name: str
    text: str
    multiple: int = 16
    noise: Literal["truncated", "rounded", "float"] = "truncated"
    output: Literal["float", "8bit"] = "8bit"
    colour: Literal["rgb", "y"] = "rgb"
    border: int = 0

    @property
    def least_pixels(self) -> int:
        """The shortest side, in pixels, that can be scored."""
        window = metrics.SSIM_WINDOW_PIXELS if self.output == "float" else metrics.GAUSSIAN_WINDOW_PIXELS
        return max(self.multiple, window + 2 * self.border)

    def input(self, task: Task) -> tuple[int, str]:
        """Return a key that is equal for protocols with the same network input for a task."""
        return self.multiple, self.noise if task.family == "denoise" else ""


class Quality(NamedTuple):
    """PSNR in dB, at most metrics.PSNR_CEILING_DB, and SSIM in [-1, 1]."""

    psnr: float
    ssim: float


_PUBLISHED_INPUT = "centre crop to a multiple of 16, gaussian noise added to uint8 then clipped and truncated"
_BASICSR = (
    "scikit-image psnr (at most 100 dB) and ssim (11x11 gaussian window of sigma 1.5 where it fits whole, population "
    "covariance, data range 255) as BasicSR, mean over images"
)
_BASICSR_8BIT = f"{_PUBLISHED_INPUT}, output clipped and rounded to uint8, no border cut, {_BASICSR}"
_ALL = (
    ScoringProtocol(
        "promptir",
        f"rgb, {_PUBLISHED_INPUT}, output clipped to [0, 1] and not quantised, scikit-image psnr (at most 100 dB) and "
        "ssim (7x7 uniform window, sample covariance, data range 1), mean over images",
        output="float",
    ),
    ScoringProtocol(
        "restormer",
        "rgb, whole image (the network pads by reflection to a multiple of 8), gaussian noise of numpy's legacy "
        "generator with seed 0 for each image added to [0, 1], neither clipped nor quantised, output clipped and "
        f"rounded to uint8, no border cut, {_BASICSR}",
        multiple=1,
        noise="float",
    ),
    ScoringProtocol("basicsr_rgb", f"rgb, {_BASICSR_8BIT}"),
    ScoringProtocol(
        "basicsr_y", f"Y of BT.601 YCbCr in studio range 16 to 235, not rounded, {_BASICSR_8BIT}", colour="y"
    ),
    ScoringProtocol(
        "mioir",
        "rgb, whole image, gaussian noise added to uint8 then clipped and rounded, output clipped and rounded to "
        f"uint8, 4 pixels of border cut on each side, {_BASICSR}",
        multiple=1,
        noise="rounded",
        border=4,
    ),
)
PROTOCOLS: dict[str, ScoringProtocol] = {protocol.name: protocol for protocol in _ALL}
"""The protocols by their name in `evaluate.protocols`."""


def cropped(protocol: ScoringProtocol, image: Pixels) -> Pixels:
    """Return the centre of an image, with sides that are the largest multiples of `protocol.multiple`: uint8 (H, W, 3).

    An odd remainder removes one pixel more at the bottom or right. Raises UserError if a side is shorter than one
    multiple. Source: evaluation of AirNet, PromptIR and MIR-L.
    """
    (height, width), multiple = image.shape[:2], protocol.multiple
    if min(height, width) < multiple:
        raise UserError(
            f"found an image of {height} x {width} pixels where the protocol crops to a multiple of "
            f"{multiple}. Leave it out, or evaluate images of at least {multiple} x {multiple} pixels."
        )
    top, left = height % multiple // 2, width % multiple // 2
    part = image[top : top + height // multiple * multiple, left : left + width // multiple * multiple]
    return np.ascontiguousarray(part)


def degraded(protocol: ScoringProtocol, task: Task, clean: Pixels, rng: np.random.Generator) -> Pixels | Image:
    """Return the input of a task that degrades on reading: uint8 (H, W, 3), or float32, nominally in [0, 1].

    float32 is returned only for denoising with noise 'float'. clean: cropped, uint8 (H, W, 3). rng: seeded by seed,
    set, image and task. With noise 'float' it only draws the noise level, for tasks with a random level; the noise
    itself always has seed 0, as published, so it is the same for all images of one size.
    """
    if task.family != "denoise" or protocol.noise == "truncated":
        return degrade.degrade_for_test(task, clean, rng)
    sigma = degrade.sigma_of(task.level, rng)
    if protocol.noise == "rounded":
        noisy = clean + sigma * rng.standard_normal(clean.shape)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    noise = np.random.RandomState(0).normal(0, sigma / 255, clean.shape)
    return (as_restored(clean) + noise).astype(np.float32)


def score(protocol: ScoringProtocol, restored: Image, clean: Pixels) -> Quality:
    """Compare a restored image with the clean one.

    restored: float32 (H, W, 3) RGB in any range, clipped to [0, 1] here. clean: uint8 (H, W, 3) RGB of the same size.
    Raises UserError for another shape or a smaller size, and for NaN or inf.
    """
    if restored.shape != clean.shape or clean.ndim != 3 or clean.shape[2] != 3:
        raise UserError(
            f"found shapes {restored.shape} and {clean.shape} for a restored image and its clean one. "
            "Give RGB images with channels last, (H, W, 3), cropped or padded in the same way."
        )
    if not np.isfinite(restored).all():
        raise UserError(
            "found NaN or infinite pixels where the restored image is scored. "
            "Look for the first step whose loss is not finite, or for a damaged ticket."
        )
    if protocol.output == "float":
        pair = np.clip(restored, 0.0, 1.0), as_restored(clean)
        return Quality(metrics.psnr(*pair, peak=1), metrics.ssim(*pair))
    inside = slice(protocol.border, -protocol.border or None)
    levels = [image[inside, inside] for image in (metrics.to_8bit(restored), clean)]
    one, other = map(metrics.luma, levels) if protocol.colour == "y" else levels
    return Quality(metrics.psnr(one, other, peak=255), metrics.ssim_8bit(one, other))


def as_restored(image: Pixels | Image) -> Image:
    """Convert a network input to the format of its output: float32 (H, W, 3), 8-bit levels divided by 255."""
    unit = image.astype(np.float32, copy=False)
    return unit / np.float32(255) if image.dtype == np.uint8 else unit
