"""Laws of the named protocols: published numbers, whose noise is whose, and what may share a pass."""

from __future__ import annotations

import typing
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mirl_dist.config.schema_training import EvaluateSection
from mirl_dist.config.seeding import rng
from mirl_dist.config.tasks import Task
from mirl_dist.data.degradations import degrade
from mirl_dist.errors import UserError
from mirl_dist.evaluation.metrics import psnr, to_8bit
from mirl_dist.evaluation.protocols import PROTOCOLS, as_restored, cropped, degraded, score
from tests.evaluation.test_metrics import reference_pair

NOISE_25, RAIN = Task.of("denoise_25"), Task.of("derain")
Image = NDArray[Any]


def vectors() -> tuple[Image, Image]:
    restored, clean = reference_pair()
    return restored, to_8bit(clean)


@pytest.mark.parametrize(
    ("name", "psnr_db", "ssim"),
    [
        ("promptir", 27.300818947051035, 0.8385490775108337),
        ("restormer", 27.29811946529217, 0.7737950140491829),
        ("basicsr_rgb", 27.29811946529217, 0.7737950140491829),
        ("basicsr_y", 32.0915973425301, 0.8688822914166272),
        ("mioir", 27.28608349954241, None),
    ],
)
def test_every_protocol_scores_the_reference_pair_as_it_was_scored_elsewhere(
    name: str, psnr_db: float, ssim: float | None
) -> None:
    found = score(PROTOCOLS[name], *vectors())
    assert found.psnr == pytest.approx(psnr_db, abs=1e-6)
    if ssim is not None:
        assert found.ssim == pytest.approx(ssim, abs=1e-6)


def test_the_reference_values_tell_the_protocols_apart() -> None:
    restored, clean = vectors()
    found = {name: score(protocol, restored, clean) for name, protocol in PROTOCOLS.items()}
    assert found["restormer"] == found["basicsr_rgb"], "these differ in what the network is given"
    assert len({round(q.psnr, 3) for q in found.values()}) == 4
    truncated = np.floor(restored.astype(np.float64) * 255).astype(np.float32) / np.float32(255)
    assert score(PROTOCOLS["basicsr_rgb"], truncated, clean).psnr == pytest.approx(27.295179459284963, abs=1e-6)


def test_the_config_offers_these_protocols_and_no_others() -> None:
    (words, _ellipsis) = typing.get_args(EvaluateSection.model_fields["protocols"].annotation)
    assert typing.get_args(words) == tuple(PROTOCOLS)
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("promptir", ["rgb", "multiple of 16", "truncated", "not quantised", "7x7 uniform", "sample covariance"]),
        ("restormer", ["whole image", "seed 0 for each image", "neither clipped nor quantised", "reflection"]),
        ("basicsr_rgb", ["rgb", "multiple of 16", "truncated", "no border", "11x11 gaussian"]),
        ("basicsr_y", ["Y of BT.601", "16 to 235", "not rounded", "11x11 gaussian"]),
        ("mioir", ["whole image", "clipped and rounded", "4 pixels of border", "11x11 gaussian"]),
    ],
)
def test_a_protocols_sentence_says_every_convention(name: str, words: list[str]) -> None:
    protocol = PROTOCOLS[name]
    everywhere = ["noise", "clipped", "output", "scikit-image", "ssim", "mean over images"]
    if protocol.output == "8bit":
        everywhere += ["rounded to uint8", "border", "data range 255", "BasicSR"]
    for word in words + everywhere:
        assert word in protocol.text, word
    assert "\n" not in protocol.text


def test_truncated_and_unquantised_noise_have_their_reference_values() -> None:
    _, clean = vectors()
    noise = np.random.RandomState(0).randn(48, 64, 3)
    truncated = degrade.add_noise(clean, noise, 25)
    assert truncated.reshape(-1)[:6].tolist() == [222, 236, 237, 244, 255, 184]
    assert clean.reshape(-1)[:6].tolist() == [178, 226, 213, 188, 230, 209]
    assert int(truncated.sum()) == 1271014
    assert truncated.mean() - clean.mean() == pytest.approx(-1.1142578125, abs=1e-9)
    assert psnr(as_restored(truncated), as_restored(clean), peak=1) == pytest.approx(20.45593947301317, abs=1e-4)
    free = degraded(PROTOCOLS["restormer"], NOISE_25, clean, rng("any"))
    assert free.dtype == np.float32
    assert free.min() < 0 and free.max() > 1, "not clipped"
    square = np.mean((free.astype(np.float64) - clean / 255) ** 2)
    assert 10 * np.log10(1 / square) == pytest.approx(20.281080414664938, abs=1e-4)


def test_restormers_noise_is_that_of_seed_0_for_every_image_of_every_run() -> None:
    one, other = np.zeros((20, 24, 3), np.uint8), np.full((20, 24, 3), 100, np.uint8)
    restormer = PROTOCOLS["restormer"]
    a = degraded(restormer, NOISE_25, one, rng("one"))
    b = degraded(restormer, NOISE_25, other, rng("other"))
    assert np.abs(b - a - 100 / 255).max() < 1e-6
    np.random.seed(0)  # as the published script does it
    assert np.abs(a - np.random.normal(0, 25 / 255, one.shape)).max() < 1e-7
    drawn = [degraded(restormer, Task.of("denoise_hard"), one, rng(word)).std() * 255 for word in "ab"]
    assert drawn[0] != drawn[1] and all(47 < sigma < 73 for sigma in drawn), "the strength is drawn for each image"


def test_mioirs_noise_is_the_published_draw_rounded() -> None:
    _, clean = vectors()
    rounded = degraded(PROTOCOLS["mioir"], NOISE_25, clean, rng("a"))
    cut = degraded(PROTOCOLS["promptir"], NOISE_25, clean, rng("a"))
    assert rounded.dtype == cut.dtype == np.uint8
    step = rounded.astype(int) - cut
    assert set(np.unique(step)) == {0, 1}
    assert 0.4 < step.mean() < 0.6, "truncation is half a level darker"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_task_without_noise_is_degraded_alike_by_all_protocols(name: str) -> None:
    _, clean = vectors()
    for word in ("deblur_easy", "superres_4", "enlighten_mild"):
        task = Task.of(word)
        expected = degrade.degrade_for_test(task, clean, rng("a"))
        assert np.array_equal(degraded(PROTOCOLS[name], task, clean, rng("a")), expected)


def test_protocols_share_a_pass_where_crop_and_noise_are_the_same() -> None:
    def passes(task: Task) -> int:
        return len({protocol.input(task) for protocol in PROTOCOLS.values()})

    assert passes(NOISE_25) == 3, "promptir with both of BasicSR; restormer; mioir"
    assert passes(RAIN) == 2, "cropped, and whole"


def test_crops_keep_the_centre_in_multiples_of_sixteen_or_the_whole() -> None:
    image = np.arange(37 * 50 * 3, dtype=np.uint32).reshape(37, 50, 3).astype(np.uint8)
    for name, protocol in PROTOCOLS.items():
        expected = image if name in ("restormer", "mioir") else image[2:34, 1:49]  # of 5 rows too many, 3 go below
        assert np.array_equal(cropped(protocol, image), expected)
    assert cropped(PROTOCOLS["promptir"], np.zeros((321, 481, 3), np.uint8)).shape == (320, 480, 3)


def test_mioir_does_not_look_at_the_border() -> None:
    restored, clean = vectors()
    framed = restored.copy()
    framed[:4], framed[-4:], framed[:, :4], framed[:, -4:] = 0, 1, 0, 1
    assert score(PROTOCOLS["mioir"], framed, clean) == score(PROTOCOLS["mioir"], restored, clean)
    assert score(PROTOCOLS["basicsr_rgb"], framed, clean) != score(PROTOCOLS["basicsr_rgb"], restored, clean)
    inside = (slice(4, -4), slice(4, -4))
    assert score(PROTOCOLS["basicsr_rgb"], restored[inside], clean[inside]) == score(
        PROTOCOLS["mioir"], restored, clean
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_images_of_the_least_size_can_be_scored_and_equal_ones_reach_the_ceiling(name: str) -> None:
    side = PROTOCOLS[name].least_pixels
    restored, clean = (image[:side, :side] for image in vectors())
    part = cropped(PROTOCOLS[name], clean)
    same = score(PROTOCOLS[name], as_restored(part), part)
    assert (same.psnr, round(same.ssim, 9)) == (100.0, 1.0)
    least = side - 1
    with pytest.raises(UserError, match=r"found an image of \d+ x \d+ pixels where the (window|protocol)"):
        small = cropped(PROTOCOLS[name], clean[:least, :least])
        score(PROTOCOLS[name], as_restored(small), small)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_cannot_be_scored_is_refused_and_what_is_out_of_range_is_clipped(name: str) -> None:
    protocol, (restored, clean) = PROTOCOLS[name], vectors()
    wild = np.where(restored > 0.5, restored + np.float32(2), restored - np.float32(2))
    assert score(protocol, wild, clean) == score(protocol, np.clip(wild, 0, 1), clean)
    with pytest.raises(UserError, match="found NaN or infinite pixels where the restored image"):
        score(protocol, restored * np.float32("nan"), clean)
    with pytest.raises(UserError, match=r"found shapes \(40, 64, 3\) and \(48, 64, 3\)"):
        score(protocol, restored[:40], clean)
    with pytest.raises(UserError, match="Give RGB images with channels last"):
        score(protocol, restored[..., 0], clean[..., 0])
