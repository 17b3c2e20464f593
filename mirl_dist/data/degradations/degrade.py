"""Seeded degradations of one image: noise, blur, JPEG, low light, lost resolution, rain, haze, snow.

Inputs and outputs are uint8 (H, W, 3) images in [0, 255]. Every random draw comes from a generator that the caller
seeds from the sample's identity (seed, epoch, sample), so a sample is the same on every rank and after every resume.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirl_dist.config.tasks import Task, blur_of
from mirl_dist.data.degradations.filters import bicubic, blur

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float64]


def add_noise(image: Pixels, noise: Plane, sigma: float) -> Pixels:
    """Return image + sigma * noise, clipped to [0, 255] and truncated (not rounded) to uint8.

    noise: float64, the image's shape, unit variance. sigma: in units of 1/255.
    The released code of AirNet, PromptIR and MIR-L truncates too; it darkens images by half a step on average.
    """
    return (image + sigma * noise).clip(0, 255).astype(np.uint8)


def gaussian_noise(image: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """Add white Gaussian noise of standard deviation sigma (in units of 1/255) with `add_noise`."""
    return add_noise(image, rng.standard_normal(image.shape), sigma)


@lru_cache(maxsize=1)
def _quantiles() -> Plane:
    """Return 65,536 equiprobable standard normal quantiles, ascending, rescaled to unit variance; |z| <= 4.33."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / 65536) for i in range(32768, 65536)])
    upper /= np.sqrt(np.mean(upper**2))
    return np.concatenate([-upper[::-1], upper])


@lru_cache(maxsize=256)
def _whole_noise(sigma: float) -> NDArray[np.int16]:
    """Return floor(sigma * z) for each quantile z."""
    assert 0 <= sigma <= 1000, "int16 holds the noise and a pixel"
    return np.floor(sigma * _quantiles()).astype(np.int16)


def quick_noise(image: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """Add noise distributed as in `gaussian_noise`, but limited to |z| <= 4.33, about four times as fast; for training.

    Truncating clip(pixel + sigma z) equals clip(pixel + floor(sigma z)). So 16 raw random bits select each integer
    from a table, which is also independent of the numpy version. sigma: 0 to 1000, in units of 1/255.
    """
    raw = rng.bit_generator.random_raw(-(-image.size // 4)).astype("<u8", copy=False)
    noisy = _whole_noise(sigma).take(raw.view("<u2")[: image.size].reshape(image.shape), mode="clip")
    noisy += image
    return noisy.clip(0, 255).astype(np.uint8)


def jpeg(image: Pixels, quality: int) -> Pixels:
    """Compress as JPEG and decode again with Pillow's libjpeg. quality: 1 to 100; chroma subsampling is 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(buffer) as back:
        return np.array(back)


def low_light(image: Pixels, gamma: float) -> Pixels:
    """Return image^gamma on [0, 1], rounded (MiOIR). gamma: 1 is the identity, larger values darken."""
    curve: Pixels = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return curve[image]


def lost_resolution(image: Pixels, factor: float, antialias: bool = True) -> Pixels:
    """Downscale bicubically to ceil(size / factor) and upscale to the original size. factor: real, >= 1.

    antialias: MATLAB's bicubic; otherwise torch's (MiOIR). The scale of each axis is the ratio of its integer sizes.
    """
    height, width = image.shape[:2]
    small = bicubic(image, math.ceil(height / factor), math.ceil(width / factor), antialias)
    return bicubic(small, height, width, antialias)


def _streak(length: int, tilt: float, width: int) -> Plane:
    """Draw one streak, float64 (K, K), K odd: a segment `tilt` degrees from the vertical with a Gaussian profile."""
    sigma = 0.3 * ((width - 1) * 0.5 - 1) + 0.8  # OpenCV's default sigma for this kernel width
    half = 0.5 * min(length, np.sqrt(2) * length * (1 - length / 100))
    reach = int(np.ceil(half + 3 * sigma))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    angle = np.deg2rad(tilt)
    along = np.clip(y * np.cos(angle) + x * np.sin(angle), -half, half)
    distance: Plane = np.hypot(y - along * np.cos(angle), x - along * np.sin(angle))
    return np.exp(-0.5 * (distance / sigma) ** 2)


def rain(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Add synthetic rain: streaks of one direction, length and width per image, clipped to [0, 255].

    Follows MiOIR: drops where uniform noise in [0, 256) exceeds 256 - 0.01 v, v from 50 to 99; length 20 to 40 pixels;
    -45 to 44 degrees from the vertical; width 3 to 11 pixels; the layer is scaled to a maximum of 255.
    Difference: a streak is drawn as a Gaussian around a line segment instead of rotating a raster image.
    """
    height, width = image.shape[:2]
    value = int(rng.integers(50, 100))
    length, tilt = int(rng.integers(20, 41)), float(rng.integers(-45, 45))
    kernel = _streak(length, tilt, width=int(rng.choice([3, 5, 7, 9, 11])))
    reach = kernel.shape[0] // 2
    # Drops are also placed outside the frame, so that streaks enter it from all sides.
    sown = rng.uniform(0, 256, (height + 2 * reach, width + 2 * reach)) > 256 - 0.01 * value
    layer = np.zeros((height + 4 * reach, width + 4 * reach))
    for row, column in np.argwhere(sown):
        layer[row : row + 2 * reach + 1, column : column + 2 * reach + 1] += kernel
    layer = layer[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    peak = layer.max(initial=0.0)
    if peak > 0:
        layer = layer * (255 / peak)
    return np.rint(image + layer[..., None]).clip(0, 255).astype(np.uint8)


def haze(image: Pixels, depth: Plane, airlight: float, beta: float) -> Pixels:
    """Apply RESIDE's scattering model I T + A (1 - T), T = exp(-beta depth), rounded to uint8.

    depth: float64 (H, W), in the inverse unit of beta (MiOIR: 0 to 1 per image).
    airlight: A, 0 to 1 (white). beta: 0 is the identity.
    """
    transmission = np.exp(-beta * depth)[..., None]
    scattered = image * transmission + 255 * airlight * (1 - transmission)
    return np.rint(scattered).clip(0, 255).astype(np.uint8)


class _Flakes(NamedTuple):
    """Ranges for flakes at one distance: radius in pixels, density per 10,000 pixels, fall in radii, opacity 0 to 1."""

    radius: tuple[float, float]
    density: tuple[float, float]
    fall: tuple[float, float]
    opacity: tuple[float, float]


_SNOW = (
    _Flakes(radius=(0.4, 0.9), density=(10, 80), fall=(1, 3), opacity=(0.4, 0.8)),
    _Flakes(radius=(1.0, 2.2), density=(2, 20), fall=(1, 4), opacity=(0.5, 0.9)),
    _Flakes(radius=(3.0, 7.0), density=(0.1, 1.5), fall=(0, 2), opacity=(0.4, 0.8)),
)


def _flake(radius: float, fall: float, tilt: float, opacity: float, at: Plane, phase: float) -> Plane:
    """Draw the opacity of one flake, float64 (K, K), K odd: a lobed disc with a soft edge, stretched along its fall."""
    half, soft = 0.5 * fall * radius, 0.4 + 0.7 * radius
    reach = math.ceil(half + radius + soft) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1] - at[:, None, None]
    down, right = math.cos(tilt), math.sin(tilt)
    lobes = 0.2 * np.cos(3 * np.arctan2(y, x) + phase) * np.minimum(np.hypot(y, x) / radius, 1)
    along = np.clip(y * down + x * right, -half, half)
    inside = radius * (0.8 + lobes) - np.hypot(y - along * down, x - along * right)
    rise: Plane = np.clip(0.5 + 0.5 * inside / soft, 0, 1)
    return opacity * rise * rise * (3 - 2 * rise)


def snow(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Add synthetic snow: flakes at three distances with one main direction, alpha-blended and rounded.

    Our own procedure, modelled on the description of Snow100K: particles of three sizes with varied density, shape,
    transparency and motion. Ranges: _SNOW; direction -50 to 50 degrees from the vertical, +-10 degrees per flake; one
    grey level per image, 225 to 255. Sizes are in pixels, independent of the image size. There is no veiling effect.
    """
    height, width = image.shape[:2]
    margin = 32  # flakes are also placed outside the frame and extend into it
    wind, grey = rng.uniform(-50, 50), rng.uniform(225, 255)
    clear = np.ones((height + 2 * margin, width + 2 * margin))
    for kind in _SNOW:
        count = rng.poisson(rng.uniform(*kind.density) * clear.size / 1e4)
        for _ in range(count):
            tilt = math.radians(wind + rng.uniform(-10, 10))
            radius, fall, opacity = rng.uniform(*kind.radius), rng.uniform(*kind.fall), rng.uniform(*kind.opacity)
            flake = _flake(radius, fall, tilt, opacity, rng.uniform(-0.5, 0.5, 2), rng.uniform(0, 2 * math.pi))
            size = len(flake)
            top, left = rng.integers(clear.shape[0] - size + 1), rng.integers(clear.shape[1] - size + 1)
            clear[top : top + size, left : left + size] *= 1 - flake
    part = clear[margin : margin + height, margin : margin + width, None]
    return np.rint(image * part + grey * (1 - part)).astype(np.uint8)


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    """Draw uniformly, rounded to two decimals as in MiOIR; from raw bits, which do not depend on the numpy version."""
    return round(low + (high - low) * (rng.bit_generator.random_raw() >> 11) * 2.0**-53, 2)


def _one_of(choices: Sequence[int], rng: np.random.Generator) -> int:
    return choices[rng.bit_generator.random_raw() * len(choices) >> 64]


_SIGMAS = {"mild": (15.0, 50.0), "hard": (50.0, 70.0)}
_BLURS = {
    "easy": (range(7, 16, 2), (0.2, 3.0)),
    "mild": (range(7, 22, 2), (1.0, 3.0)),
    "hard": (range(17, 22, 2), (3.0, 5.0)),
}
_QUALITIES = {"mild": range(30, 71), "hard": range(10, 31)}
_GAMMAS = {"mild": (1.0, 3.0), "hard": (3.0, 4.0)}


def sigma_of(level: str, rng: np.random.Generator) -> int:
    return round(_between(*_SIGMAS[level], rng)) if level in _SIGMAS else int(level)


def degrade_for_training(task: Task, image: Pixels, rng: np.random.Generator) -> Pixels:
    """Degrade a clean image for a training task with task.kind 'clean'; docs/degradations.md lists the ranges.

    The strength is drawn first, so it does not depend on the image size.
    """
    level = task.level
    match task.family:
        case "denoise":
            return quick_noise(image, sigma_of(level, rng), rng)
        case "deblur":
            if fixed := blur_of(level):
                return blur(image, *fixed)
            kernels, sigmas = _BLURS[level]
            return blur(image, _one_of(kernels, rng), _between(*sigmas, rng))
        case "superres":
            if level == "mild":
                return lost_resolution(image, 4, antialias=False)
            if level == "easy":
                return lost_resolution(image, _between(1, 4, rng))
            return lost_resolution(image, _one_of((6, 8), rng) if level == "hard" else int(level))
        case "dejpeg":
            return jpeg(image, _one_of(_QUALITIES[level], rng) if level in _QUALITIES else int(level))
        case "enlighten":
            return low_light(image, _between(*_GAMMAS[level], rng))
    raise AssertionError(f"'{task.name}' reads pairs")


def degrade_for_test(task: Task, image: Pixels, rng: np.random.Generator) -> Pixels:
    """Degrade as `degrade_for_training`, but with `gaussian_noise`, which is not limited to 4.33 sigma."""
    if task.family == "denoise":
        return gaussian_noise(image, sigma_of(task.level, rng), rng)
    return degrade_for_training(task, image, rng)


def context_pixels(task: Task) -> int:
    """Return the margin in pixels with which a degraded crop equals the same crop of the degraded image.

    0 for pixelwise degradations, and for JPEG and lost resolution, whose grids start at the crop's corner.
    """
    if task.family != "deblur":
        return 0
    fixed = blur_of(task.level)
    return (fixed[0] if fixed else max(_BLURS[task.level][0])) // 2
