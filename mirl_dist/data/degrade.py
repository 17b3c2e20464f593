"""Seeded degradations of one image: Gaussian noise, rain streaks, haze.

Images are uint8 (H, W, 3) in [0, 255], in and out. Every random draw comes from a generator which the caller
keys by words (seed, epoch, sample), so that a sample looks the same whoever makes it and whenever.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float64]


def generator(*words: int | str) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by the SHA-256 of the words.

    The encoding is unambiguous: ("ab", "c"), ("a", "bc"), (1,) and ("1",) are four different keys.
    Raises TypeError for words that are neither int nor str.
    """
    digest = hashlib.sha256()
    for word in words:
        if isinstance(word, bool) or not isinstance(word, int | str):
            raise TypeError(f"a generator is keyed by int and str, not by {type(word).__name__} ({word!r})")
        text = str(word).encode("utf-8", "surrogateescape")
        digest.update(b"%c%d:" % (b"i" if isinstance(word, int) else b"s", len(text)))
        digest.update(text)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest()[:16], "little")))


def add_noise(image: Pixels, noise: Plane, sigma: float) -> Pixels:
    """image + sigma * noise, clipped to [0, 255] and truncated (not rounded) to uint8.

    noise: float64, the image's shape, unit variance. sigma: in steps of 1/255.
    Truncation is what the released code of AirNet, PromptIR and MIR-L does: half a step darker on average.
    """
    noisy: Pixels = np.clip(image + sigma * noise, 0, 255).astype(np.uint8)
    return noisy


def gaussian_noise(image: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """White Gaussian noise of standard deviation sigma (in steps of 1/255), made by `add_noise`."""
    return add_noise(image, rng.standard_normal(image.shape), sigma)


def _streak(length: int, tilt: float, width: int) -> Plane:
    """One streak, (K, K) with K odd: a segment `tilt` degrees from the vertical with a Gaussian profile."""
    sigma = 0.3 * ((width - 1) * 0.5 - 1) + 0.8  # the deviation which OpenCV gives to a blur of this width
    half = 0.5 * min(length, np.sqrt(2) * length * (1 - length / 100))
    reach = int(np.ceil(half + 3 * sigma))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    angle = np.deg2rad(tilt)
    along = np.clip(y * np.cos(angle) + x * np.sin(angle), -half, half)
    distance = np.hypot(y - along * np.cos(angle), x - along * np.sin(angle))
    kernel: Plane = np.exp(-0.5 * (distance / sigma) ** 2)
    return kernel


def rain(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Synthetic rain streaks of one direction, length and width per image, added and clipped.

    After the recipe of MiOIR: drops where uniform noise passes 256 - 0.01 v, v from 50 to 99; length 20 to 40
    pixels; -45 to 44 degrees from the vertical; width 3 to 11; the brightest point stretched to 255.
    Differs: a streak is drawn as a Gaussian around a line segment instead of being turned as a picture.
    """
    height, width = image.shape[:2]
    value = int(rng.integers(50, 100))
    length, tilt = int(rng.integers(20, 41)), float(rng.integers(-45, 45))
    kernel = _streak(length, tilt, width=int(rng.choice([3, 5, 7, 9, 11])))
    reach = kernel.shape[0] // 2
    # Drops also fall outside the frame, so that streaks enter it from all sides.
    sown = rng.uniform(0, 256, (height + 2 * reach, width + 2 * reach)) > 256 - 0.01 * value
    layer = np.zeros((height + 4 * reach, width + 4 * reach))
    for row, column in np.argwhere(sown):
        layer[row : row + 2 * reach + 1, column : column + 2 * reach + 1] += kernel
    layer = layer[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    peak = layer.max(initial=0.0)
    if peak > 0:
        layer = layer * (255 / peak)
    rainy: Pixels = np.clip(np.rint(image + layer[..., None]), 0, 255).astype(np.uint8)
    return rainy


def haze(image: Pixels, depth: Plane, airlight: float, beta: float) -> Pixels:
    """The scattering model I T + A (1 - T) with T = exp(-beta depth), rounded to uint8.

    depth: float64 (H, W), in units in which beta is its inverse (MiOIR: 0 to 1 per image).
    airlight A: 0 to 1 (white). beta: 0 leaves the image as it is. Source: RESIDE's model.
    """
    transmission = np.exp(-beta * depth)[..., None]
    scattered = image * transmission + 255 * airlight * (1 - transmission)
    hazy: Pixels = np.clip(np.rint(scattered), 0, 255).astype(np.uint8)
    return hazy
