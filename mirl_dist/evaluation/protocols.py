"""Defines the named evaluation protocols: cropping, test noise, and how PSNR and SSIM are computed.

A protocol has two parts. Its input (`multiple`, `noise`) is the image that the network restores; protocols with equal
input share the forward pass. Its measure (`output`, `colour`, `border`, `window`) compares the restored image with the
clean one. docs/protocols.md lists the protocols with their sources.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.config.tasks import Task
from mirl_dist.data.degradations import degrade
from mirl_dist.evaluation import metrics

Pixels = NDArray[np.uint8]
Image = NDArray[np.float32]


class ScoringProtocol(NamedTuple):
    """An evaluation protocol.

    text: all conventions in one sentence. multiple: both images are centre-cropped to multiples of this many pixels; 1
    keeps them whole. noise: for denoising tasks; 'truncated' and 'rounded' give clipped 8-bit images, 'float' is
    neither clipped nor quantised. output: restored images are clipped, then scored in float or rounded to 8 bits.
    colour: scored channels, RGB or luma. border: pixels removed at each side before scoring. window: of SSIM.
    """

    name: str
    text: str
    multiple: int
    noise: Literal["truncated", "rounded", "float"]
    output: Literal["float", "8bit"]
    colour: Literal["rgb", "y"]
    border: int
    window: Literal["uniform 7x7", "gaussian 11x11"]

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


_PUBLISHED_NOISE = "gaussian noise added to uint8 then clipped and truncated"
_GAUSSIAN_SSIM = "ssim (11x11 gaussian window of sigma 1.5 where it fits whole, population covariance, data range 255)"


def _basicsr(name: str, text: str, colour: Literal["rgb", "y"]) -> ScoringProtocol:
    """Return a protocol with PromptIR's input and BasicSR's 8-bit measure."""
    return ScoringProtocol(
        name,
        f"{text}, centre crop to a multiple of 16, {_PUBLISHED_NOISE}, output clipped and rounded to uint8, no border "
        f"cut, scikit-image psnr (at most 100 dB) and {_GAUSSIAN_SSIM} as BasicSR, mean over images",
        multiple=16,
        noise="truncated",
        output="8bit",
        colour=colour,
        border=0,
        window="gaussian 11x11",
    )


_ALL = (
    ScoringProtocol(
        "promptir",
        metrics.PROTOCOL,
        multiple=16,
        noise="truncated",
        output="float",
        colour="rgb",
        border=0,
        window="uniform 7x7",
    ),
    ScoringProtocol(
        "restormer",
        "rgb, whole image (the network pads by reflection to a multiple of 8), gaussian noise of numpy's legacy "
        "generator with seed 0 for each image added to [0, 1], neither clipped nor quantised, output clipped and "
        "rounded to uint8, no border cut, scikit-image psnr (at most 100 dB) and "
        f"{_GAUSSIAN_SSIM} as BasicSR, mean over images",
        multiple=1,
        noise="float",
        output="8bit",
        colour="rgb",
        border=0,
        window="gaussian 11x11",
    ),
    _basicsr("basicsr_rgb", "rgb", "rgb"),
    _basicsr("basicsr_y", "Y of BT.601 YCbCr in studio range 16 to 235, not rounded", "y"),
    ScoringProtocol(
        "mioir",
        "rgb, whole image, gaussian noise added to uint8 then clipped and rounded, output clipped and rounded to "
        "uint8, 4 pixels of border cut on each side, scikit-image psnr (at most 100 dB) and "
        f"{_GAUSSIAN_SSIM} as BasicSR, mean over images",
        multiple=1,
        noise="rounded",
        output="8bit",
        colour="rgb",
        border=4,
        window="gaussian 11x11",
    ),
)
PROTOCOLS: dict[str, ScoringProtocol] = {protocol.name: protocol for protocol in _ALL}
"""The protocols by their name in `evaluate.protocols`."""


def cropped(protocol: ScoringProtocol, image: Pixels) -> Pixels:
    """Return the centre crop of an image that the protocol uses: uint8 (H, W, 3)."""
    return np.ascontiguousarray(metrics.crop_to_multiple(image, protocol.multiple))


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
    return (_unit(clean) + noise).astype(np.float32)


def score(protocol: ScoringProtocol, restored: Image, clean: Pixels) -> Quality:
    """Compare a restored image with the clean one.

    restored: float32 (H, W, 3) RGB in any range, clipped to [0, 1] here. clean: uint8 (H, W, 3) RGB of the same size.
    Raises UserError for another type, shape or size, and for NaN.
    """
    if protocol.output == "float":
        truth = _unit(clean)
        return Quality(metrics.psnr(restored, truth), metrics.ssim(restored, truth))
    metrics.check_same_shape(restored, clean)
    inside = slice(protocol.border, -protocol.border or None)
    pair = [image[inside, inside] for image in (metrics.to_8bit(restored), clean)]
    levels: list[metrics.Levels] = [metrics.luma(i) if protocol.colour == "y" else i for i in pair]
    return Quality(metrics.psnr_8bit(*levels), metrics.ssim_8bit(*levels))


def as_restored(image: Pixels | Image) -> Image:
    """Convert a network input to the format of its output: float32 (H, W, 3), 8-bit levels divided by 255."""
    return _unit(image) if image.dtype == np.uint8 else image.astype(np.float32, copy=False)


def _unit(image: NDArray[np.uint8] | Image) -> Image:
    """Scale levels in [0, 255] to float32 in [0, 1]."""
    unit: Image = image.astype(np.float32) / np.float32(255)
    return unit
