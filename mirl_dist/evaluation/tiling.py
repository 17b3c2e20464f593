"""Restores large images in overlapping square tiles, to bound the memory of the network.

Tiling changes results: the channel attention of PromptIR and Restormer depends on all input pixels, so a tile is
restored differently from the same pixels of the whole image, and not only near the seams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from mirl_dist.errors import UserError

Image = NDArray[np.float32]


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return the first pixel of each tile along an axis of `size` pixels.

    Neighbouring tiles share at least `overlap` pixels; the last tile ends with the image, so it may share more. An axis
    of at most `tile` pixels has one tile.
    Raises UserError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise UserError(
            f"found tiles of {tile} pixels that share {overlap}, where an image is restored in tiles. "
            "Give an overlap of 0 or more that is smaller than the tile."
        )
    last = max(0, size - tile)
    return [*range(0, last, tile - overlap), last]


def restore_tiled(work: Callable[[NDArray[Any]], Image], image: NDArray[Any], tile: int, overlap: int) -> Image:
    """Apply `work` to each tile of an image and blend the results: float32 (H, W, C).

    image: (H, W, C), any dtype. work: takes (h, w, C) with h, w <= tile, returns float32 of the same height and width.
    In an overlap, an earlier tile a and a later tile b are blended as a + (b - a) * t, with t rising linearly inside
    (0, 1). Weights sum to one, and where a and b are equal the result equals them exactly.
    """
    height, width = image.shape[:2]
    rows = []
    for top in (tops := tile_starts(height, tile, overlap)):
        lefts = tile_starts(width, tile, overlap)
        parts = [work(image[top : top + tile, left : left + tile]) for left in lefts]
        columns = [rearrange(part, "h w c -> w h c") for part in parts]
        rows.append(rearrange(_blend(columns, lefts), "w h c -> h w c"))
    return _blend(rows, tops)


def _blend(parts: list[Image], begins: list[int]) -> Image:
    """Join parts along the first axis and blend them where they overlap: float32 (length, A, C).

    parts: (n, A, C), n may differ; begins: start of each part along the first axis.
    """
    whole = np.empty((begins[-1] + len(parts[-1]), *parts[0].shape[1:]), np.float32)
    filled = 0
    for part, start in zip(parts, begins, strict=True):
        shared = filled - start
        if shared > 0:
            ramp = (np.arange(shared, dtype=np.float32) + np.float32(0.5)) / np.float32(shared)
            before = whole[start:filled]
            before += (part[:shared] - before) * rearrange(ramp, "n -> n 1 1")
        whole[max(filled, start) : start + len(part)] = part[max(shared, 0) :]
        filled = start + len(part)
    return whole
