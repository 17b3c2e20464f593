"""Bicubic resizing (as in MATLAB, which made the benchmarks' low-resolution images, and in PyTorch) and Gaussian blur.

Weights are rounded to multiples of a power of two so that every product and sum is exact in float64. The result is
therefore bitwise identical on every machine, with every BLAS and summation order.
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
_MATLAB, _TORCH = -0.5, -0.75  # slope of the cubic at distance 1: Keys' choice, and that of most graphics software
_MATLAB_BITS = 40  # 8 pixel bits + 40 weight bits + 1 for negative weights = 49 of float64's 53
_TORCH_BITS = 20  # both axes without intermediate rounding: 8 + 20 + 20 + 2
_BLUR_STEP = 32  # rows or columns per matrix product: fewer zeros than with 64, fewer calls than with 16


class Band(NamedTuple):
    """Weights of one band of outputs: out[start:stop] = weights @ in[first:last] along an axis.

    weights: float64 (stop - start, last - first).
    """

    start: int
    stop: int
    first: int
    last: int
    weights: Plane


def cubic(distance: Plane, slope: float) -> Plane:
    """Evaluate Keys' piecewise cubic (Keys 1981, equation 4): 1 at 0; 0 at 1 and beyond 2. slope: derivative at 1."""
    x = np.abs(distance)
    near = ((slope + 2) * x - (slope + 3)) * x * x + 1
    far = slope * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def exact(weights: Plane, bits: int) -> Plane:
    """Round rows of weights to multiples of 2^-bits that sum to exactly 1; each row's largest absorbs the error."""
    rounded: Plane = np.rint(weights * 2.0**bits)
    rows = np.arange(len(rounded))
    rounded[rows, rounded.argmax(axis=1)] += 2.0**bits - rounded.sum(axis=1)
    return rounded * 2.0**-bits


@lru_cache(maxsize=1024)
def bands(before: int, after: int, antialias: bool) -> tuple[Band, ...]:
    """Compute the weights that resize one axis from `before` to `after` pixels, with half-pixel centres.

    Borders are replicated. antialias: widen the cubic by the downscaling factor, then normalise.
    """
    scale = after / before
    narrow = min(scale, 1.0) if antialias else 1.0
    centres = (np.arange(after) + 0.5) / scale - 0.5
    taps = math.ceil(4 / narrow) + 2
    reached = np.floor(centres - 2 / narrow)[:, None] + np.arange(taps)
    weights = cubic(narrow * (centres[:, None] - reached), _MATLAB if antialias else _TORCH)
    weights = exact(weights / weights.sum(axis=1, keepdims=True), _MATLAB_BITS if antialias else _TORCH_BITS)
    inside = np.clip(reached, 0, before - 1).astype(np.intp)
    step = min(64, max(8, 64 * after // before))  # a few large products with few zeros are fastest
    result = []
    for start in range(0, after, step):
        part = slice(start, min(start + step, after))
        first, last = int(inside[part].min()), int(inside[part].max()) + 1
        block = np.zeros((part.stop - start, last - first))
        np.add.at(block, (np.arange(len(block))[:, None], inside[part] - first), weights[part])
        result.append(Band(start, part.stop, first, last, block))
    return tuple(result)


def weigh(plane: Plane, weights: Sequence[Band], axis: int) -> Plane:
    """Apply bands along axis 0 or 1 of a float64 (H, W) plane."""
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
    """Round halves up (as MATLAB does for non-negative values) and clip to [0, 255], in place."""
    np.floor(plane + 0.5, out=plane)
    return plane.clip(0, 255, out=plane)


def bicubic(image: Pixels, height: int, width: int, antialias: bool) -> Pixels:
    """Resize a uint8 (H, W, 3) image to (height, width), rounding halves up.

    antialias True: MATLAB's imresize of uint8 (slope -0.5, the axis with the smaller scale first, rounded to 8 bits
    between the axes). It reproduces every pixel of the published Set5 x2, x3 and x4, borders included.
    antialias False: torch's interpolate (slope -0.75, align_corners=False), which MiOIR trains with.
    In both, the scale of each axis is output size / input size.
    """
    before = image.shape[:2]
    after = (height, width)
    order = (0, 1) if height * before[1] <= width * before[0] else (1, 0)
    resized = np.empty((height, width, image.shape[2]), np.uint8)
    for channel in range(image.shape[2]):  # one at a time: large temporaries cost more than the arithmetic
        plane = image[:, :, channel].astype(np.float64)
        for axis in order:
            plane = weigh(plane, bands(before[axis], after[axis], antialias), axis)
            if antialias:
                plane = _to_8_bit(plane)
        resized[:, :, channel] = _to_8_bit(plane)
    return resized


@lru_cache(maxsize=128)
def _shifted(kernel: int, sigma: float) -> Plane:
    """Return the Toeplitz matrix of a 1-D Gaussian of width `kernel`: float64 (_BLUR_STEP, _BLUR_STEP - 1 + kernel)."""
    x = np.arange(kernel) - kernel // 2
    gaussian = np.exp(-0.5 * (x / sigma) ** 2)
    row = exact((gaussian / gaussian.sum())[None], bits=20)[0]  # 8 + 20 + 20 bits: sums are exact in float64
    width = _BLUR_STEP - 1 + kernel
    # The repeated row has length width + 1, so each row of the result is shifted right by one.
    return np.resize(np.concatenate([row, np.zeros(_BLUR_STEP)]), (_BLUR_STEP, width))


def blur(image: Pixels, kernel: int, sigma: float) -> Pixels:
    """Blur a uint8 (H, W, 3) image with an isotropic Gaussian, and round.

    kernel: odd width in pixels at which the Gaussian is truncated. sigma: > 0, in pixels. Borders are reflected
    without repeating the edge pixel, as in MiOIR. The result is bitwise identical on every machine.
    """
    reach, shifted = kernel // 2, _shifted(kernel, sigma)
    mirrored = [np.pad(np.arange(size), reach, mode="reflect") for size in image.shape[:2]]
    blurred = np.empty(image.shape, np.uint8)
    for channel in range(image.shape[2]):  # one at a time: large temporaries cost more than the arithmetic
        plane = image[:, :, channel].astype(np.float64)
        for axis, size in enumerate(plane.shape):
            parts = [(start, min(start + _BLUR_STEP, size)) for start in range(0, size, _BLUR_STEP)]
            shifts = [Band(a, b, a, b + 2 * reach, shifted[: b - a, : b - a + 2 * reach]) for a, b in parts]
            plane = weigh(plane.take(mirrored[axis], axis=axis), shifts, axis)
        blurred[:, :, channel] = np.rint(plane, out=plane)
    return blurred
