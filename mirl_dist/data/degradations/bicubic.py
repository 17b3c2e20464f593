"""Bicubic resizing of 8-bit images: as MATLAB makes the benchmarks' small images, and as PyTorch does.

Weights are rounded to multiples of a power of two that makes every product and sum exact in float64, so that the
result is the same whatever the machine, the BLAS and the order of its sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float64]
_MATLAB, _TORCH = -0.5, -0.75  # slope of the cubic at distance 1: Keys' own, and the one of most graphics programs
_MATLAB_BITS = 40  # 8 bits of a pixel, 40 of a weight, 1 for weights below zero: 49 of float64's 53
_TORCH_BITS = 20  # both axes without rounding between: 8 + 20 + 20 + 2


class Band(NamedTuple):
    """Outputs start to stop of one axis = weights @ inputs first to last. weights: float64 (stop-start, last-first)."""

    start: int
    stop: int
    first: int
    last: int
    weights: Plane


def cubic(distance: Plane, slope: float) -> Plane:
    """Keys' piecewise cubic: 1 at 0, 0 at 1 and from 2 on. slope: its derivative at 1 (Keys 1981, equation 4)."""
    x = np.abs(distance)
    near = ((slope + 2) * x - (slope + 3)) * x * x + 1
    far = slope * (((x - 5) * x + 8) * x - 4)
    value: Plane = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return value


def exact(weights: Plane, bits: int) -> Plane:
    """Rows of weights as multiples of 2^-bits that sum to exactly 1; what rounding lost goes to a row's largest."""
    rounded: Plane = np.rint(weights * 2.0**bits)
    rows = np.arange(len(rounded))
    rounded[rows, rounded.argmax(axis=1)] += 2.0**bits - rounded.sum(axis=1)
    return rounded * 2.0**-bits


@lru_cache(maxsize=1024)
def bands(before: int, after: int, antialias: bool) -> tuple[Band, ...]:
    """Weights that resize one axis from `before` to `after` pixels; pixels beyond the border repeat the last one.

    Half-pixel centres. antialias: the cubic is widened by the factor when shrinking, normalised.
    """
    scale = after / before
    narrow = min(scale, 1.0) if antialias else 1.0
    centres = (np.arange(after) + 0.5) / scale - 0.5
    taps = math.ceil(4 / narrow) + 2
    reached = np.floor(centres - 2 / narrow)[:, None] + np.arange(taps)
    weights = cubic(narrow * (centres[:, None] - reached), _MATLAB if antialias else _TORCH)
    weights = exact(weights / weights.sum(axis=1, keepdims=True), _MATLAB_BITS if antialias else _TORCH_BITS)
    inside = np.clip(reached, 0, before - 1).astype(np.intp)
    step = min(64, max(8, 64 * after // before))  # few large products, without many zeros in them
    result = []
    for start in range(0, after, step):
        part = slice(start, min(start + step, after))
        first, last = int(inside[part].min()), int(inside[part].max()) + 1
        block = np.zeros((part.stop - start, last - first))
        np.add.at(block, (np.arange(len(block))[:, None], inside[part] - first), weights[part])
        result.append(Band(start, part.stop, first, last, block))
    return tuple(result)


def weigh(plane: Plane, weights: Sequence[Band], axis: int) -> Plane:
    """Apply bands along an axis, 0 or 1, of a float64 (H, W) plane."""
    shape = list(plane.shape)
    shape[axis] = weights[-1].stop
    out = np.empty(shape)
    for band in weights:
        if axis == 0:
            np.matmul(band.weights, plane[band.first : band.last], out=out[band.start : band.stop])
        else:
            np.matmul(plane[:, band.first : band.last], band.weights.T, out=out[:, band.start : band.stop])
    return out


def _to_8_bit(plane: Plane) -> Plane:
    """Halves up, as MATLAB rounds values that are not negative; then 0 to 255."""
    np.floor(plane + 0.5, out=plane)
    return plane.clip(0, 255, out=plane)


def bicubic(image: Pixels, height: int, width: int, antialias: bool) -> Pixels:
    """The image resized to (height, width): uint8 (H, W, 3) in and out, halves rounded up.

    antialias True: MATLAB's imresize of uint8 (slope -0.5, the axis that shrinks more first, 8 bits between the
    axes), with the border as in the published Set5 x2, x3, x4, which it reproduces in every pixel.
    antialias False: torch's interpolate (slope -0.75, align_corners False), which MiOIR trains with.
    Both take scale = size out / size in on each axis.
    """
    before = image.shape[:2]
    after = (height, width)
    order = (0, 1) if height * before[1] <= width * before[0] else (1, 0)
    resized = np.empty((height, width, image.shape[2]), np.uint8)
    for channel in range(image.shape[2]):  # one by one: large temporaries cost more than the arithmetic
        plane = image[:, :, channel].astype(np.float64)
        for axis in order:
            plane = weigh(plane, bands(before[axis], after[axis], antialias), axis)
            if antialias:
                plane = _to_8_bit(plane)
        resized[:, :, channel] = _to_8_bit(plane)
    return resized
