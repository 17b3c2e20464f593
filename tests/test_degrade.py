"""Laws of the seeded degradations."""

from __future__ import annotations

import numpy as np
import pytest

from mirl_dist.data import photographs
from mirl_dist.data.degrade import Pixels, add_noise, gaussian_noise, generator, haze, rain

# numpy legacy generator with seed 0, sigma 25, clipped and truncated: what the released code of PromptIR and
# MIR-L evaluates on, for the synthetic image below.
PUBLISHED = {
    "psnr": 20.45593947301317,
    "mean_shift": -1.1142578125,
    "first6_clean": [178, 226, 213, 188, 230, 209],
    "first6": [222, 236, 237, 244, 255, 184],
    "sum": 1271014,
}


def waves() -> Pixels:
    """48 x 64 RGB of slow waves."""
    i, j, c = np.meshgrid(np.arange(48), np.arange(64), np.arange(3), indexing="ij")
    return np.rint(255 * (0.5 + 0.25 * np.sin(j / 7 + c) + 0.2 * np.cos(i / 5 - 0.5 * c))).astype(np.uint8)


def test_noise_equals_the_published_vector() -> None:
    clean = waves()
    noisy = add_noise(clean, np.random.RandomState(0).randn(48, 64, 3), 25)
    assert noisy.dtype == np.uint8
    assert clean.ravel()[:6].tolist() == PUBLISHED["first6_clean"]
    assert noisy.ravel()[:6].tolist() == PUBLISHED["first6"]
    assert int(noisy.sum(dtype=np.int64)) == PUBLISHED["sum"]
    error = noisy.astype(float) - clean
    assert error.mean() == PUBLISHED["mean_shift"]
    assert 10 * np.log10(255**2 / (error**2).mean()) == pytest.approx(PUBLISHED["psnr"], abs=1e-12)


def test_same_words_give_the_same_numbers_and_other_words_others() -> None:
    keys: list[tuple[int | str, ...]] = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (1,),
        ("1",),
        (1, 2),
        (12,),
        (-1,),
        (),
    ]
    firsts = [generator(*key).integers(0, 2**63) for key in keys]
    assert firsts == [generator(*key).integers(0, 2**63) for key in keys]
    assert len(set(firsts)) == len(keys)


def test_the_generator_is_the_same_in_every_process_and_release() -> None:
    raw = generator("seed", 7, "train-bsd400-x").bit_generator.random_raw(2)
    assert raw.tolist() == [11661506568343849284, 12551089469004967232]


@pytest.mark.parametrize("word", [1.0, True, None, b"x"])
def test_a_generator_refuses_words_that_are_neither_int_nor_str(word: object) -> None:
    with pytest.raises(TypeError, match="keyed by int and str"):
        generator("a", word)  # type: ignore[arg-type]


def test_noise_depends_on_the_words_alone() -> None:
    clean = waves()
    first = gaussian_noise(clean, 50, generator("n", 1))
    gaussian_noise(clean, 15, generator("n", 2))
    assert np.array_equal(first, gaussian_noise(clean, 50, generator("n", 1)))
    assert not np.array_equal(first, gaussian_noise(clean, 50, generator("n", 2)))


def test_rain_only_brightens_and_is_seeded() -> None:
    clean = waves()
    rainy = rain(clean, generator("r", 1))
    assert rainy.dtype == np.uint8 and rainy.shape == clean.shape
    assert (rainy >= clean).all() and (rainy > clean).any()
    assert np.array_equal(rainy, rain(clean, generator("r", 1)))
    assert not np.array_equal(rainy, rain(clean, generator("r", 2)))
    grey = rainy.astype(int) - clean
    unclipped = (rainy < 255).all(axis=2)
    assert (grey[unclipped] == grey[unclipped][:, :1]).all(), "streaks are colourless"


@pytest.mark.parametrize("shape", [(1, 1, 3), (8, 200, 3)])
def test_rain_falls_on_images_of_any_size(shape: tuple[int, int, int]) -> None:
    assert rain(np.zeros(shape, np.uint8), generator("r")).shape == shape


def test_haze_without_density_changes_nothing_and_dense_haze_is_airlight() -> None:
    clean, depth = waves(), np.full((48, 64), 0.5)
    assert np.array_equal(haze(clean, depth, airlight=0.9, beta=0.0), clean)
    assert (haze(clean, depth, airlight=0.8, beta=1e3) == 204).all()
    half = haze(np.zeros((48, 64, 3), np.uint8), depth, airlight=1.0, beta=2 * np.log(2))
    assert (half == 128).all(), "255 x 0.5 rounded to even"


def test_farther_points_have_more_haze() -> None:
    dark = np.zeros((4, 5, 3), np.uint8)
    hazy = haze(dark, np.tile(np.linspace(0, 1, 5), (4, 1)), airlight=1.0, beta=1.0)
    assert (np.diff(hazy.astype(int), axis=1) > 0).all()


def test_unknown_disparity_takes_the_farther_neighbour() -> None:
    inf, nan = np.inf, np.nan
    disparity = np.array([[inf, 40, nan, inf, 10, nan], [nan] * 6, [20, 20, 20, 20, 20, 20]])
    depth = photographs.depth_from_disparity(disparity)
    filled = 1 / depth / (1 / depth).min()
    assert depth.max() == 1 and np.isfinite(depth).all()
    assert depth[0].tolist() == depth[0, [1, 1, 4, 4, 4, 4]].tolist()
    assert (depth[1] == depth[0, 4]).all(), "a row without any takes the farthest"
    assert filled[2, 0] == pytest.approx((20 + 31.086) / (10 + 31.086))


def test_the_motorcycle_has_true_depth_and_the_others_a_ramp() -> None:
    path, disparity = photographs.locate("motorcycle_left")
    assert path.is_file() and disparity is not None
    depth = photographs.depth(500, 741, disparity)
    assert depth.shape == (500, 741) and np.isfinite(depth).all()
    assert 0 < depth.min() < depth.max() == 1
    ramp = photographs.depth(300, 451, photographs.locate("chelsea")[1])
    assert ramp.shape == (300, 451) and (np.diff(ramp, axis=0) < 0).all()
