"""Laws of tiles: together they are the image, each part once in sum, and seams are ramps."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from mirl_dist.errors import UserError
from mirl_dist.evaluation import evaluate
from mirl_dist.evaluation.tiling import restore_tiled, tile_starts

Image = NDArray[np.float32]
CPU = torch.device("cpu")


def picture(height: int, width: int) -> Image:
    drawn: Image = np.random.default_rng(0).random((height, width, 3), dtype=np.float32)
    return drawn


sizes = st.integers(1, 90)


@settings(max_examples=60, deadline=None)
@given(height=sizes, width=sizes, tile=st.integers(1, 40), share=st.floats(0, 0.99))
def test_a_network_that_changes_nothing_gives_the_image_back_to_the_last_bit(
    height: int, width: int, tile: int, share: float
) -> None:
    image = picture(height, width)
    seen: list[tuple[int, ...]] = []

    def same(part: Image) -> Image:
        seen.append(part.shape)
        return part.copy()

    assert np.array_equal(restore_tiled(same, image, tile, int(share * tile)), image)
    assert set(seen) == {(min(tile, height), min(tile, width), 3)}, "square tiles, as large as the image lets them be"


def test_a_constant_stays_constant_and_8_bit_images_reach_the_network_as_they_are() -> None:
    image = (picture(70, 50) * 255).astype(np.uint8)

    def third(part: NDArray[Any]) -> Image:
        assert part.dtype == np.uint8
        return np.full(part.shape, 1 / 3, np.float32)

    out = restore_tiled(third, image, 32, 10)
    assert out.dtype == np.float32
    assert (out == np.float32(1 / 3)).all()


def test_where_tiles_overlap_each_gives_way_to_the_next_on_a_straight_line() -> None:
    numbers = iter([0.0, 1.0, 0.0])

    def numbered(part: Image) -> Image:
        return np.full(part.shape, next(numbers), np.float32)

    row = restore_tiled(numbered, picture(8, 26), 10, 2)[3, :, 0]
    assert tile_starts(26, 10, 2) == [0, 8, 16]
    expected = [0] * 8 + [0.25, 0.75] + [1] * 6 + [0.75, 0.25] + [0] * 8
    assert row == pytest.approx(np.array(expected), abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(size=sizes, tile=st.integers(1, 40), share=st.floats(0, 0.99))
def test_tiles_cover_an_axis_and_share_what_was_asked(size: int, tile: int, share: float) -> None:
    overlap = int(share * tile)
    at = tile_starts(size, tile, overlap)
    assert at[0] == 0 and at[-1] == max(0, size - tile)
    assert all(0 < b - a <= tile - overlap for a, b in zip(at, at[1:], strict=False))


@pytest.mark.parametrize("overlap", [-1, 32, 40])
def test_tiles_that_share_all_of_themselves_are_refused(overlap: int) -> None:
    with pytest.raises(UserError, match=re.escape(f"found tiles of 32 pixels that share {overlap}")):
        tile_starts(100, 32, overlap)


class SeesTheWholeImage(nn.Module):
    """Like channel attention: what it does to a pixel depends on all that it is given."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image - image.mean(dim=(-2, -1), keepdim=True) + 0.5


def test_tiles_equal_the_whole_for_a_local_network_and_not_for_one_that_sees_all() -> None:
    image = (picture(80, 60) * np.linspace(60, 250, 60, dtype=np.float32)[:, None]).astype(np.uint8)
    local = nn.Conv2d(3, 3, 1)
    whole = evaluate.restore(local, image, CPU)
    parts = evaluate.restore(local, image, CPU, tile_pixels=32, tile_overlap=8)
    assert whole.dtype == parts.dtype == np.float32 and whole.shape == parts.shape == image.shape
    assert np.abs(whole - parts).max() < 1e-6
    wide = SeesTheWholeImage()
    assert np.abs(evaluate.restore(wide, image, CPU) - evaluate.restore(wide, image, CPU, 32, 8)).max() > 0.05
    assert np.array_equal(evaluate.restore(wide, image, CPU), evaluate.restore(wide, image, CPU, 80, 8))
