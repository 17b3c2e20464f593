"""Named evaluation protocols: what is cropped, how test noise is made, and how PSNR and SSIM are computed.

A protocol has two halves. Its input (`multiple`, `noise`) is what the network is given; protocols with the same input
share the pass through the network. Its measure (`output`, `colour`, `border`, `window`) compares the restored image
with the clean one. docs/protocols.md has the table, with sources.
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
    """How images are scored.

    text: every convention in one sentence. multiple: both images are cropped around the centre to multiples of so many
    pixels, 1 leaves them whole. noise: of denoising tasks; truncated and rounded are clipped 8-bit images, float is
    neither clipped nor quantised. output: restored images are clipped, and scored as they are or rounded to 8 bits.
    border: pixels that are cut off each side before measuring. window: of SSIM.
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
        """The shortest side that can be scored."""
        window = metrics.SSIM_WINDOW_PIXELS if self.output == "float" else metrics.GAUSSIAN_WINDOW_PIXELS
        return max(self.multiple, window + 2 * self.border)

    def input(self, task: Task) -> tuple[int, str]:
        """Equal for protocols that give the network the same image of a task."""
        return self.multiple, self.noise if task.family == "denoise" else ""


class Quality(NamedTuple):
    """PSNR in dB, at most metrics.PSNR_CEILING_DB, and SSIM in [-1, 1]."""

    psnr: float
    ssim: float


_PUBLISHED_NOISE = "gaussian noise added to uint8 then clipped and truncated"
_GAUSSIAN_SSIM = "ssim (11x11 gaussian window of sigma 1.5 where it fits whole, population covariance, data range 255)"


def _basicsr(name: str, text: str, colour: Literal["rgb", "y"]) -> ScoringProtocol:
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
"""By name, as `evaluate.protocols` says them."""


def cropped(protocol: ScoringProtocol, image: Pixels) -> Pixels:
    """The part of an image that the protocol looks at: uint8 (H, W, 3), both of a pair alike."""
    return np.ascontiguousarray(metrics.crop_to_multiple(image, protocol.multiple))


def degraded(protocol: ScoringProtocol, task: Task, clean: Pixels, rng: np.random.Generator) -> Pixels | Image:
    """The input of a task that degrades on reading: uint8 (H, W, 3), or float32 nominally in [0, 1] for noise 'float'.

    clean: cropped, uint8 (H, W, 3). rng: keyed by seed, set, image and task. Noise 'float' takes from it only the
    strength of a task that draws one: the noise itself is that of seed 0, the same for every image of one size.
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
    """A network's input as if it were its output: float32 (H, W, 3), 8-bit levels divided by 255."""
    return _unit(image) if image.dtype == np.uint8 else image.astype(np.float32, copy=False)


def _unit(image: NDArray[np.uint8] | Image) -> Image:
    unit: Image = image.astype(np.float32) / np.float32(255)
    return unit
