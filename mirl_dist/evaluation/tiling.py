"""Large images in square tiles that overlap, for networks whose memory grows with the image.

This changes results. PromptIR's and Restormer's channel attention is computed over all pixels that they are given, so a
tile is restored otherwise than the same pixels inside the whole image, wherever the seams lie.
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
    """Where tiles begin on an axis of `size` pixels; the last ends with the image, so it may overlap more.

    An axis not longer than a tile has one tile. Neighbours share at least `overlap` pixels.
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
    """`work` on each tile of an image, put together: float32 (H, W, C).

    image: (H, W, C), any type. work: takes (h, w, C) with h, w <= tile, returns float32 of the same height and width.
    Where tiles overlap, the earlier a and the later b blend as a + (b - a) t with t rising linearly inside (0, 1), so
    the shares sum to one, and where both agree the result is theirs to the last bit.
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
    """Join parts along their first axis, blended where they overlap: float32 (length, A, C).

    parts: (n, A, C) with n of their own; begins: where each lies in the whole.
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
