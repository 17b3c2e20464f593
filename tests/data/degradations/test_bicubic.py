"""Laws of bicubic resizing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirl_dist.data.degradations.degrade import Pixels
from mirl_dist.data.degradations.filters import bands, bicubic, cubic


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def dense(before: int, after: int, antialias: bool) -> np.ndarray:
    matrix = np.zeros((after, before))
    for band in bands(before, after, antialias):
        matrix[band.start : band.stop, band.first : band.last] = band.weights
    return matrix


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_every_pixel_of_the_published_small_images_is_reproduced(factor: int) -> None:
    if "MIRL_DATA" not in os.environ:
        pytest.skip("MIRL_DATA is not set: no published images here")
    folder = Path(os.environ["MIRL_DATA"]) / f"test/sr/Set5_x{factor}"
    large = sorted((folder / "target").glob("*.png"))
    assert len(large) == 5
    for path in large:
        target, published = (np.array(Image.open(p).convert("RGB")) for p in (path, folder / "input" / path.name))
        height, width = published.shape[:2]
        assert (height * factor, width * factor) == target.shape[:2]
        assert np.array_equal(bicubic(target, height, width, antialias=True), published), path.name


@pytest.mark.parametrize("size", [(64, 48), (9, 13), (37, 41), (150, 97), (1, 1)])
def test_without_antialias_it_is_torch_interpolate(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    image = noise(36, 52)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    ours = bicubic(image, *size, antialias=False)
    theirs = torch.nn.functional.interpolate(planes, size=size, mode="bicubic", align_corners=False)
    theirs = theirs[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - np.clip(theirs, 0, 255)).max() < 0.5 + 1e-3
    rounded = np.clip(np.floor(theirs + 0.5), 0, 255)
    assert (ours != rounded).mean() <= 1e-3, "weights of 20 bits move a value across a half once in a thousand"


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("before", "after"), [(64, 16), (64, 21), (16, 64), (100, 99), (7, 200), (300, 11), (5, 1)])
def test_weights_of_every_output_sum_to_one_exactly_and_are_symmetric(before: int, after: int, antialias: bool) -> None:
    matrix = dense(before, after, antialias)
    assert (matrix.sum(axis=1) == 1).all()
    assert np.abs(matrix - matrix[::-1, ::-1]).max() < 1e-5
    covered = [n for band in bands(before, after, antialias) for n in range(band.start, band.stop)]
    assert covered == list(range(after))


@pytest.mark.parametrize(("antialias", "passes", "bits"), [(True, 1, 40), (False, 2, 20)])
@pytest.mark.parametrize(("before", "after"), [(2040, 510), (339, 1356), (64, 21), (300, 19), (100, 99)])
def test_sums_are_exact_in_float64_whatever_their_order(
    before: int, after: int, antialias: bool, passes: int, bits: int
) -> None:
    for band in bands(before, after, antialias):
        steps = band.weights * 2.0**bits
        assert (steps == np.rint(steps)).all()
        largest = float(np.abs(steps).sum(axis=1).max())
        assert 255 * largest**passes < 2**53


@pytest.mark.parametrize("antialias", [True, False])
def test_flat_images_and_unchanged_sizes_stay_as_they_are(antialias: bool) -> None:
    for value in (0, 1, 127, 255):
        flat = np.full((33, 20, 3), value, np.uint8)
        assert (bicubic(flat, 13, 50, antialias) == value).all()
    image = noise(33, 20)
    assert np.array_equal(bicubic(image, 33, 20, antialias), image)


def test_the_cubic_is_keys_cubic() -> None:
    at = np.array([0.0, 0.5, -0.5, 1.0, 1.5, 2.0, 3.0])
    assert cubic(at, -0.5).tolist() == [1, 0.5625, 0.5625, 0, -0.0625, 0, 0]
    assert cubic(at, -0.75).tolist() == [1, 0.59375, 0.59375, 0, -0.09375, 0, 0]


def test_shrinking_with_antialias_leaves_no_stripes_of_the_finest_grid() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    smooth = bicubic(stripes, 16, 16, antialias=True)[:, 2:-2]
    assert np.abs(smooth.astype(int) - 127.5).max() < 2
    by_columns = bicubic(stripes, 64, 21, antialias=False)[:, 2:-2]
    assert np.abs(by_columns.astype(int) - 127.5).max() > 60


def test_the_result_does_not_depend_on_the_layout_of_the_input() -> None:
    image = noise(40, 30)
    wanted = bicubic(image, 17, 60, antialias=True)
    wide = np.zeros((80, 60, 3), np.uint8)
    wide[::2, ::2] = image
    assert np.array_equal(bicubic(wide[::2, ::2], 17, 60, antialias=True), wanted)
    image.setflags(write=False)
    assert np.array_equal(bicubic(image, 17, 60, antialias=True), wanted)
    assert wanted.flags.c_contiguous
