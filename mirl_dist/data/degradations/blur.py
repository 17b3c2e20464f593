"""Isotropic Gaussian blur of 8-bit images, bitwise identical on every machine."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mirl_dist.data.degradations.bicubic import Band, Pixels, Plane, exact, weigh

_STEP = 32  # rows or columns per matrix product: fewer zeros than with 64, fewer calls than with 16


@lru_cache(maxsize=128)
def _shifted(kernel: int, sigma: float) -> Plane:
    """Return the Toeplitz matrix of a 1-D Gaussian of width `kernel`: float64 (_STEP, _STEP - 1 + kernel)."""
    x = np.arange(kernel) - kernel // 2
    gaussian = np.exp(-0.5 * (x / sigma) ** 2)
    row = exact((gaussian / gaussian.sum())[None], bits=20)[0]  # 8 + 20 + 20 bits: sums are exact in float64
    width = _STEP - 1 + kernel
    # The repeated row has length width + 1, so each row of the result is shifted right by one.
    return np.resize(np.concatenate([row, np.zeros(_STEP)]), (_STEP, width))


@lru_cache(maxsize=1024)
def _reflected(size: int, reach: int) -> NDArray[np.intp]:
    return np.pad(np.arange(size), reach, mode="reflect")


def blur(image: Pixels, kernel: int, sigma: float) -> Pixels:
    """Blur a uint8 (H, W, 3) image with an isotropic Gaussian, and round.

    kernel: odd width in pixels at which the Gaussian is truncated. sigma: > 0, in pixels. Borders are reflected
    without repeating the edge pixel, as in MiOIR. The result is bitwise identical on every machine.
    """
    reach, shifted = kernel // 2, _shifted(kernel, sigma)
    blurred = np.empty(image.shape, np.uint8)
    for channel in range(image.shape[2]):  # one at a time: large temporaries cost more than the arithmetic
        plane = image[:, :, channel].astype(np.float64)
        for axis, size in enumerate(plane.shape):
            parts = [(start, min(start + _STEP, size)) for start in range(0, size, _STEP)]
            bands = [Band(a, b, a, b + 2 * reach, shifted[: b - a, : b - a + 2 * reach]) for a, b in parts]
            plane = weigh(plane.take(_reflected(size, reach), axis=axis), bands, axis)
        blurred[:, :, channel] = np.rint(plane, out=plane)
    return blurred
