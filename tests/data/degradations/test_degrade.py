"""Laws of the seeded degradations."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from PIL import Image

from mirl_dist.config.seeding import rng, shared_rng
from mirl_dist.config.tasks import Task, allowed
from mirl_dist.data.building import demo_photos
from mirl_dist.data.degradations import degrade
from mirl_dist.data.degradations.degrade import (
    Pixels,
    add_noise,
    blur,
    context_pixels,
    degrade_for_test,
    degrade_for_training,
    gaussian_noise,
    haze,
    jpeg,
    lost_resolution,
    low_light,
    quick_noise,
    rain,
    snow,
)
from tests.data.loaders import photo

FIXED = ("denoise_25", "deblur_k19s4", "deblur_k21s5", "superres_3", "superres_4", "dejpeg_40")
MADE = (*(w for w in allowed() if "<" not in w and Task.of(w).kind == "clean"), *FIXED)

# numpy legacy generator with seed 0, sigma 25, clipped and truncated: what the released code of PromptIR and
# MIR-L evaluates on, for the synthetic image below.
PUBLISHED_PSNR, PUBLISHED_SHIFT, PUBLISHED_SUM = 20.45593947301317, -1.1142578125, 1271014
CLEAN_PIXELS, PUBLISHED_PIXELS = [178, 226, 213, 188, 230, 209], [222, 236, 237, 244, 255, 184]


# SHA-256, first 16 digits, of `waves` degraded on reading by rng("golden").
GOLDEN = {
    "denoise_25": "4f8b46e3ea641aec",
    "denoise_mild": "3c2219ea5de287bd",
    "deblur_easy": "67f6a85539824e06",
    "deblur_hard": "6b026f70155e61f5",
    "superres_easy": "c248d7da36bcd5b7",
    "superres_hard": "60838a1328356556",
    "superres_mild": "39b7f991a626d536",
    "enlighten_mild": "89281f70148b5d13",
}


def waves() -> Pixels:
    """48 x 64 RGB of slow waves."""
    i, j, c = np.meshgrid(np.arange(48), np.arange(64), np.arange(3), indexing="ij")
    return np.rint(255 * (0.5 + 0.25 * np.sin(j / 7 + c) + 0.2 * np.cos(i / 5 - 0.5 * c))).astype(np.uint8)


def test_noise_equals_the_published_vector() -> None:
    clean = waves()
    noisy = add_noise(clean, np.random.RandomState(0).randn(48, 64, 3), 25)
    assert noisy.dtype == np.uint8
    assert clean.ravel()[:6].tolist() == CLEAN_PIXELS
    assert noisy.ravel()[:6].tolist() == PUBLISHED_PIXELS
    assert int(noisy.sum(dtype=np.int64)) == PUBLISHED_SUM
    error = noisy.astype(float) - clean
    assert error.mean() == PUBLISHED_SHIFT
    assert 10 * np.log10(255**2 / (error**2).mean()) == pytest.approx(PUBLISHED_PSNR, abs=1e-12)


def test_a_lent_generator_draws_the_same_numbers_whatever_was_drawn_before() -> None:
    for number in range(50):
        own, lent = rng("x", number), shared_rng("x", number)
        assert own.bit_generator.random_raw(3).tolist() == lent.bit_generator.random_raw(3).tolist()
        assert own.integers(7) == lent.integers(7)
        assert own.standard_normal(number).tolist() == lent.standard_normal(number).tolist()
        lent.integers(2, dtype=np.uint32)  # leaves half of a word behind


def test_same_words_give_the_same_numbers_and_other_words_others() -> None:
    keys: list[tuple[int | str, ...]] = [("ab", "c"), ("a", "bc"), ("abc",), (1,), ("1",), (1, 2), (12,), (-1,), ()]
    firsts = [rng(*key).integers(0, 2**63) for key in keys]
    assert firsts == [rng(*key).integers(0, 2**63) for key in keys]
    assert len(set(firsts)) == len(keys)


def test_the_generator_is_the_same_in_every_process_and_release() -> None:
    raw = rng("seed", 7, "train-bsd400-x").bit_generator.random_raw(2)
    assert raw.tolist() == [11661506568343849284, 12551089469004967232]


@pytest.mark.parametrize("word", [1.0, True, None, b"x"])
def test_a_generator_refuses_words_that_are_neither_int_nor_str(word: object) -> None:
    with pytest.raises(TypeError, match="keyed by int and str"):
        rng("a", word)  # type: ignore[arg-type]


def test_noise_depends_on_the_words_alone() -> None:
    clean = waves()
    first = gaussian_noise(clean, 50, rng("n", 1))
    assert np.array_equal(first, gaussian_noise(clean, 50, rng("n", 1)))
    assert not np.array_equal(first, gaussian_noise(clean, 50, rng("n", 2)))


def test_rain_only_brightens_and_is_colourless() -> None:
    clean = waves()
    rainy = rain(clean, rng("r", 1))
    assert (rainy >= clean).all() and (rainy > clean).any()
    grey = rainy.astype(int) - clean
    unclipped = (rainy < 255).all(axis=2)
    assert (grey[unclipped] == grey[unclipped][:, :1]).all()


@pytest.mark.parametrize("fall", [rain, snow])
def test_rain_and_snow_are_seeded_and_fall_on_images_of_any_size(fall: Callable[..., Pixels]) -> None:
    clean = waves()
    fallen = fall(clean, rng("r", 1))
    assert fallen.dtype == np.uint8 and fallen.shape == clean.shape
    assert np.array_equal(fallen, fall(clean, rng("r", 1)))
    assert not np.array_equal(fallen, fall(clean, rng("r", 2)))
    for shape in ((1, 1, 3), (8, 200, 3)):
        assert fall(np.zeros(shape, np.uint8), rng("r")).shape == shape


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
    depth = demo_photos.depth_from_disparity(disparity)
    filled = 1 / depth / (1 / depth).min()
    assert depth.max() == 1 and np.isfinite(depth).all()
    assert depth[0].tolist() == depth[0, [1, 1, 4, 4, 4, 4]].tolist()
    assert (depth[1] == depth[0, 4]).all(), "a row without any takes the farthest"
    assert filled[2, 0] == pytest.approx((20 + 31.086) / (10 + 31.086))


def test_the_motorcycle_has_true_depth_and_the_others_a_ramp() -> None:
    path, disparity = demo_photos.locate("motorcycle_left")
    assert path.is_file() and disparity is not None
    depth = demo_photos.depth(500, 741, disparity)
    assert depth.shape == (500, 741) and np.isfinite(depth).all()
    assert 0 < depth.min() < depth.max() == 1
    ramp = demo_photos.depth(300, 451, demo_photos.locate("chelsea")[1])
    assert ramp.shape == (300, 451) and (np.diff(ramp, axis=0) < 0).all()


def scene(height: int, width: int) -> Pixels:
    """A part of a real photograph."""
    return photo("chelsea")[60 : 60 + height, 90 : 90 + width]


# --- quick noise: the law of gaussian_noise


@pytest.mark.parametrize("sigma", [1, 15, 25, 50, 70, 255])
def test_quick_noise_is_add_noise_with_the_tables_normals(sigma: int) -> None:
    """Every pixel value meets every part of the table, so nothing wraps around."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    image[:8], image[8:16] = 0, 255
    raw = rng("q").bit_generator.random_raw(image.size // 4)
    chosen = [(int(word) >> shift) & 0xFFFF for word in raw for shift in (0, 16, 32, 48)]
    normals = degrade._quantiles()[chosen].reshape(image.shape)
    assert np.array_equal(quick_noise(image, sigma, rng("q")), add_noise(image, normals, sigma))


def test_the_tables_normals_follow_the_normal_law() -> None:
    z = degrade._quantiles()
    assert (np.diff(z) > 0).all() and (z == -z[::-1]).all()
    assert np.mean(z**2) == pytest.approx(1, abs=1e-12)
    assert np.mean(z**4) == pytest.approx(3, abs=5e-3)
    assert z.max() == pytest.approx(4.33, abs=0.01)
    cdf = np.array([NormalDist().cdf(x) for x in z])
    assert np.abs(cdf - (np.arange(65536) + 0.5) / 65536).max() < 1e-4


def test_quick_noise_has_the_moments_and_the_distribution_of_gaussian_noise() -> None:
    sigma, grey = 15, np.full((400, 500, 3), 128, np.uint8)
    quick, exact = quick_noise(grey, sigma, rng("k")), gaussian_noise(grey, sigma, rng("e"))
    n = quick.size
    error = quick.astype(float) - 128
    assert error.mean() == pytest.approx(-0.5, abs=4 * sigma / math.sqrt(n))
    # floor() adds the variance 1/12 of a uniform fraction
    assert error.var() == pytest.approx(sigma**2 + 1 / 12, rel=4 * math.sqrt(2 / n))
    unit = (error - error.mean()) / error.std()
    assert np.mean(unit**3) == pytest.approx(0, abs=4 * math.sqrt(6 / n))
    assert np.mean(unit**4) == pytest.approx(3, abs=4 * math.sqrt(24 / n))
    law = np.array([NormalDist(128, sigma).cdf(value + 1) for value in range(256)])
    found = [np.cumsum(np.bincount(image.ravel(), minlength=256)) / n for image in (quick, exact)]
    assert np.abs(found[0] - law).max() < 1.63 / math.sqrt(n), "Kolmogorov and Smirnov at 1 %"
    assert np.abs(found[0] - found[1]).max() < 1.63 * math.sqrt(2 / n)
    for beyond in (2, 3, 4):
        share = 2 * NormalDist().cdf(-beyond)
        outside = np.mean((error < -beyond * sigma) | (error >= beyond * sigma))
        assert outside == pytest.approx(share, abs=4 * math.sqrt(share / n))


def test_neighbours_of_quick_noise_know_nothing_of_each_other() -> None:
    noise = quick_noise(np.full((400, 500, 3), 128, np.uint8), 15, rng("i")).ravel().astype(float)
    noise = (noise - noise.mean()) / noise.std()
    for lag in (1, 2, 3, 4, 5, 8, 1500, 1503):
        for part in (lambda x: x, np.abs):
            left, right = part(noise[:-lag]), part(noise[lag:])
            assert abs(np.corrcoef(left, right)[0, 1]) < 4 / math.sqrt(noise.size)


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (3, 5, 1)])
def test_quick_noise_is_seeded_for_images_of_any_size(shape: tuple[int, int, int]) -> None:
    image = np.full(shape, 100, np.uint8)
    first = quick_noise(image, 50, rng("s", 1))
    assert first.shape == shape and first.dtype == np.uint8
    assert np.array_equal(first, quick_noise(image, 50, rng("s", 1)))
    assert not np.array_equal(first, quick_noise(image, 50, rng("s", 2)))
    assert np.array_equal(quick_noise(image, 0, rng("s")), image)


# --- what happens on reading


@pytest.mark.parametrize("word", MADE)
def test_a_degradation_is_determined_by_its_arguments_and_leaves_its_input_alone(word: str) -> None:
    task, clean = Task.of(word), scene(40, 52)
    before = clean.copy()
    clean.setflags(write=False)
    for make in (degrade_for_training, degrade_for_test):
        first = make(task, clean, rng(word))
        assert first.dtype == np.uint8 and first.shape == clean.shape and first.flags.c_contiguous
        assert not np.array_equal(first, clean)
        assert np.array_equal(first, make(task, clean, rng(word)))
        assert np.array_equal(first, make(task, np.asfortranarray(clean), rng(word)))
    assert np.array_equal(clean, before)


@pytest.mark.parametrize("word", MADE)
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 90, 3)])
def test_images_of_any_size_are_degraded(word: str, shape: tuple[int, int, int]) -> None:
    assert degrade_for_training(Task.of(word), np.full(shape, 77, np.uint8), rng("any")).shape == shape


@pytest.mark.parametrize("word", [w for w in MADE if Task.of(w).family in ("deblur", "enlighten")])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (40, 55), (96, 126), (5, 100)])
def test_with_its_margin_a_degraded_crop_is_a_crop_of_the_degraded_image(word: str, top: int, left: int) -> None:
    """Even at the image's border, where the larger crop ends with the image."""
    task, whole, pixels = Task.of(word), scene(128, 158), 32
    rim = context_pixels(task)
    y, x = max(0, top - rim), max(0, left - rim)
    wide = whole[y : top + pixels + rim, x : left + pixels + rim]
    cut = degrade_for_training(task, wide, rng("m", word))[top - y : top - y + pixels, left - x : left - x + pixels]
    wanted = degrade_for_training(task, whole, rng("m", word))[top : top + pixels, left : left + pixels]
    assert np.array_equal(cut, wanted)


def test_only_blur_looks_beyond_the_crop() -> None:
    margins = {word: context_pixels(Task.of(word)) for word in (*MADE, "deblur_k3s1")}
    mild = {"deblur_easy": 7, "deblur_mild": 10, "deblur_k3s1": 1}
    hard = {"deblur_hard": 10, "deblur_k19s4": 9, "deblur_k21s5": 10}
    assert {word: rim for word, rim in margins.items() if rim} == mild | hard


@pytest.mark.parametrize(
    ("word", "function", "ranges"),
    [
        ("denoise_25", "quick_noise", [(25, 25)]),
        ("denoise_mild", "quick_noise", [(15, 50)]),
        ("denoise_hard", "quick_noise", [(50, 70)]),
        ("deblur_easy", "blur", [(7, 15), (0.2, 3)]),
        ("deblur_mild", "blur", [(7, 21), (1, 3)]),
        ("deblur_hard", "blur", [(17, 21), (3, 5)]),
        ("deblur_k19s4", "blur", [(19, 19), (4, 4)]),
        ("superres_easy", "lost_resolution", [(1, 4)]),
        ("superres_hard", "lost_resolution", [(6, 8)]),
        ("superres_mild", "lost_resolution", [(4, 4)]),
        ("superres_3", "lost_resolution", [(3, 3)]),
        ("dejpeg_mild", "jpeg", [(30, 70)]),
        ("dejpeg_hard", "jpeg", [(10, 30)]),
        ("dejpeg_40", "jpeg", [(40, 40)]),
        ("enlighten_mild", "low_light", [(1, 3)]),
        ("enlighten_hard", "low_light", [(3, 4)]),
    ],
)
def test_strengths_fill_the_ranges_of_the_papers(
    word: str, function: str, ranges: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []

    def heard(image: Pixels, *strength: float | np.random.Generator, antialias: bool = True) -> Pixels:
        drawn.append([s for s in strength if isinstance(s, int | float)])
        assert antialias == (word != "superres_mild"), "MiOIR shrinks without antialias"
        return image

    monkeypatch.setattr(degrade, function, heard)
    for i in range(600):
        degrade_for_training(Task.of(word), waves(), rng(word, i))
    for (low, high), found in zip(ranges, zip(*drawn, strict=True), strict=True):
        assert low <= min(found) <= low + 0.02 * (high - low) and high - 0.02 * (high - low) <= max(found) <= high
        assert np.mean(found) == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(6 * 600) + 1e-9)
    if function == "blur":
        assert all(kernel % 2 == 1 for kernel, _ in drawn)
    if word == "superres_hard":
        assert {factor for (factor,) in drawn} == {6, 8}


def test_for_evaluation_noise_is_numpys_and_the_rest_as_in_training() -> None:
    clean = scene(40, 52)
    for word in MADE:
        task = Task.of(word)
        trained, tested = (make(task, clean, rng("t")) for make in (degrade_for_training, degrade_for_test))
        assert np.array_equal(trained, tested) == (task.family != "denoise"), word
    wanted = gaussian_noise(clean, 25, rng("t"))
    assert np.array_equal(degrade_for_test(Task.of("denoise_25"), clean, rng("t")), wanted)


@pytest.mark.parametrize(("word", "digest"), GOLDEN.items())
def test_training_samples_are_the_same_on_every_machine_and_release(word: str, digest: str) -> None:
    made = degrade_for_training(Task.of(word), waves(), rng("golden"))
    assert hashlib.sha256(made.tobytes()).hexdigest()[:16] == digest


# --- single degradations


@pytest.mark.parametrize(("kernel", "sigma"), [(7, 0.2), (15, 3.0), (19, 4.0), (21, 5.0)])
def test_blur_is_the_normalised_two_dimensional_gaussian_in_float64(kernel: int, sigma: float) -> None:
    image, reach = scene(60, 71), kernel // 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    weights = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(0, 1))
    exact = np.einsum("hwcij,ij->hwc", windows, weights)
    blurred = blur(image, kernel, sigma)
    assert np.abs(blurred - exact).max() < 0.5 + 2e-3
    assert (blurred != np.rint(exact)).mean() < 2e-3


def test_blur_keeps_flat_images_and_almost_all_light() -> None:
    for value in (0, 1, 128, 255):
        assert (blur(np.full((9, 70, 3), value, np.uint8), 21, 5.0) == value).all()
    image = scene(100, 120)
    assert blur(image, 21, 5.0).mean() == pytest.approx(image.mean(), abs=1.5)
    assert blur(image, 21, 5.0).std() < blur(image, 7, 1.0).std() < image.std()


def test_jpeg_is_pillows_with_colour_at_half_resolution() -> None:
    image, held = scene(40, 50), io.BytesIO()
    Image.fromarray(image).save(held, "JPEG", quality=30, subsampling=2)
    assert np.array_equal(jpeg(image, 30), np.array(Image.open(held)))

    def error(quality: int) -> float:
        return float(np.abs(jpeg(image, quality).astype(int) - image).mean())

    assert error(10) > error(40) > error(90) > 0


def test_low_light_is_a_rounded_power() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(low_light(image, 1.0), image)
    assert np.array_equal(low_light(image, 2.5), np.rint(255 * (image / 255) ** 2.5).astype(np.uint8))
    assert low_light(image, 4.0)[0, 0, 0] == 0 and low_light(image, 4.0)[-1, -1, 0] == 255


def test_lost_resolution_keeps_the_size_and_loses_more_with_larger_factors() -> None:
    image = scene(61, 83)
    assert np.array_equal(lost_resolution(image, 1), image)
    errors = [np.abs(lost_resolution(image, f).astype(int) - image).mean() for f in (1.3, 2, 3.7, 6, 8)]
    assert errors == sorted(errors) and errors[0] > 0
    assert not np.array_equal(lost_resolution(image, 4), lost_resolution(image, 4, antialias=False))


def test_snow_is_colourless_and_lies_between_the_image_and_white() -> None:
    clean = scene(150, 200)
    snowy = snow(clean, rng("s", 1))
    assert (snowy >= np.minimum(clean, 225)).all() and (snowy != clean).any()
    black = snow(np.zeros((150, 200, 3), np.uint8), rng("s", 1))
    assert (black == black[..., :1]).all()
    assert 0.02 < (black > 40).mean() < 0.5, "flakes cover a part of the image"
