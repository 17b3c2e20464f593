"""Laws of scoring: the named protocol, noise that belongs to the image, every image once."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from mirl_dist.config import yaml_loader
from mirl_dist.config.tasks import Task
from mirl_dist.data.building.build import build
from mirl_dist.data.building.recipe import Recipe
from mirl_dist.data.image_strip import rows
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.data.shards import Shards
from mirl_dist.distributed import hardware
from mirl_dist.errors import Stopped, UserError
from mirl_dist.evaluation import evaluate, protocols
from mirl_dist.evaluation.metrics import to_8bit
from mirl_dist.evaluation.protocols import PROTOCOLS
from mirl_dist.evaluation.scorer import EvalJob, EvalSettings
from mirl_dist.storage import Folder
from tests.data.loaders import pool_of, quiet
from tests.services.lab import PROGRAMS

TASKS = (Task.of("denoise_25"), Task.of("denoise_50"), Task.of("derain"))


class Darker(nn.Module):
    """Stands in for a network: every image a tenth darker, so that each has a score of its own."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * 0.9


class SomeRanks:
    """One of `world` threads that meet where ranks would."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world: int, board: list[Any], meet: threading.Barrier) -> None:
        self.rank, self.world, self._board, self._meet = rank, world, board, meet

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather_objects(self, item: Any, *, what: str = "") -> list[Any]:
        self._board[self.rank] = item
        self._meet.wait(60)
        gathered = list(self._board)
        self._meet.wait(60)
        return gathered

    def any(self, flag: bool, *, what: str) -> bool:
        return any(self.gather_objects(flag, what=what))


ONE, ALL = (PROTOCOLS["promptir"],), tuple(PROTOCOLS.values())
PUBLISHED = EvalSettings(ONE, seed=0)


def scores_on(
    world: int,
    supply: ShardPool,
    jobs: list[EvalJob],
    asked: Callable[[int], bool] = lambda rank: False,
    settings: EvalSettings = PUBLISHED,
    model: nn.Module | None = None,
) -> list[Any]:
    """What every rank scored, or the exception that it met; asked: whether a rank is asked to stop, at each image."""
    board: list[Any] = [None] * world
    found: list[Any] = [None] * world
    meet = threading.Barrier(world)

    def one(rank: int) -> None:
        ranks: Any = SomeRanks(rank, world, board, meet)
        try:
            found[rank] = evaluate.evaluate(
                model or Darker(), supply, jobs, ranks, settings, stop_asked=lambda: asked(rank), look_ahead=True
            )
        except (UserError, Stopped) as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def pair(supply: ShardPool, job: EvalJob, seed: int = 0, protocol: str = "promptir") -> tuple[Any, Any]:
    return evaluate.degraded_and_clean(supply, job, PROTOCOLS[protocol], seed)


@pytest.fixture(scope="module")
def supply(tmp_path_factory: pytest.TempPathFactory) -> ShardPool:
    """Three photographs whole, of sizes that are no multiples of 16, clean and with made rain."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "images").mkdir()
    from skimage import data

    for name, (height, width) in {"astronaut": (70, 93), "coffee": (64, 64), "rocket": (90, 55)}.items():
        picture = getattr(data, name)()[100 : 100 + height, 100 : 100 + width]
        Image.fromarray(picture).save(folder / "images" / f"{name}.png")
    clean = {"folder": str(folder / "images")}
    tree = {
        "name": "scores",
        "least_pixels": 48,
        "train": [{"set": "some", "kind": "clean", "clean": clean}],
        "evaluate": [
            {"set": "photos", "kind": "clean", "clean": clean},
            {"set": "rain", "kind": "derain", "clean": clean, "make": "rain"},
        ],
        "allow_overlap": True,
    }
    build(yaml_loader.build(Recipe, tree, "the test"), Folder(folder / "built"), 1, quiet)
    return pool_of(folder / "built")


def test_the_next_image_is_restored_while_one_is_scored(supply: ShardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, second, score = evaluate.plan_jobs(supply.shards, TASKS, None), threading.Event(), protocols.score

    class Counting(Darker):
        calls = 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:
                second.set()
            return super().forward(image)

    def patient(*given: Any) -> tuple[float, float]:
        assert second.wait(60), "the second image is not restored before the first one is scored"
        return score(*given)

    expected = scores_on(1, supply, jobs)
    monkeypatch.setattr(protocols, "score", patient)
    assert scores_on(1, supply, jobs, model=Counting()) == expected


def test_a_run_that_trains_in_tf32_is_scored_without_it(supply: ShardPool) -> None:
    switches, allowed = (torch.backends.cuda.matmul, torch.backends.cudnn), list[bool]()

    class Watched(Darker):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            allowed.extend(bool(switch.allow_tf32) for switch in switches)
            return super().forward(image)

    hardware.use_exact_arithmetic("tf32")
    try:
        scores_on(1, supply, evaluate.plan_jobs(supply.shards, TASKS, None), model=Watched())
        assert allowed and not any(allowed)
        assert all(switch.allow_tf32 for switch in switches), "training goes on as before"
    finally:
        hardware.use_exact_arithmetic()


def test_an_image_that_cannot_be_scored_is_named(supply: ShardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> tuple[float, float]:
        raise UserError("it is odd")

    monkeypatch.setattr(protocols, "score", refuse)
    job = evaluate.plan_jobs(supply.shards, TASKS, None)[0]
    (fault,) = scores_on(1, supply, [job])
    assert isinstance(fault, UserError)
    assert str(fault) == f"{job.name}, image '{job.place.entry.key}': it is odd"


def test_a_denoising_set_is_scored_at_every_sigma_that_is_trained(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS, None)
    assert [j.name for j in jobs] == ["denoise_25/photos"] * 3 + ["denoise_50/photos"] * 3 + ["derain/rain"] * 3
    assert evaluate.plan_jobs(supply.shards, TASKS, ("rain",)) == jobs[6:]
    with pytest.raises(UserError, match=r"evaluate\.sets: found set5; the shards have photos, rain"):
        evaluate.plan_jobs(supply.shards, TASKS, ("set5",))


def test_a_clean_set_is_scored_for_exactly_the_tasks_that_degrade_on_reading(
    supply: ShardPool,
) -> None:
    words = (
        "deblur_easy",
        "superres_4",
        "dejpeg_40",
        "enlighten_mild",
        "denoise_hard",
        "derain",
        "deblur",
        "enlighten",
    )
    jobs = evaluate.plan_jobs(supply.shards, [Task.of(word) for word in words], None)
    made = [word for word in words[:5] for _ in range(3)]
    assert [job.name for job in jobs] == [f"{word}/photos" for word in made] + ["derain/rain"] * 3
    [alone] = scores_on(1, supply, jobs)
    [scores] = alone.scores.values()
    assert list(scores) == [*(f"{word}/photos" for word in words[:5]), "derain/rain"]
    assert len({score.degraded_psnr for score in scores.values()}) == 6, "each task degrades in its own way"
    for found in scores_on(3, supply, jobs):
        assert found == alone
    drawn = ("deblur_easy", "enlighten_mild", "denoise_hard")
    for word in (*words[:5], "derain"):
        mine = [job for job in jobs if job.task.name == word]
        pairs = [pair(supply, job) for job in mine]
        assert all(d.dtype == c.dtype == np.uint8 and d.shape == c.shape for d, c in pairs)
        assert any(not np.array_equal(d, c) for d, c in pairs), "an easy level may leave one image as it was"
        again = [pair(supply, job)[0] for job in mine]
        assert all(np.array_equal(d, a) for (d, _), a in zip(pairs, again, strict=True))
        others = [pair(supply, job, 1)[0] for job in mine]
        same = all(np.array_equal(d, o) for (d, _), o in zip(pairs, others, strict=True))
        assert same == (word not in drawn), "chance where the task has some, and there alone"


def test_scores_are_those_of_the_published_protocol(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS[:1], ("photos",))
    [found] = scores_on(1, supply, jobs)
    psnr, ssim = [], []
    for job in jobs:
        degraded, clean = pair(supply, job)
        assert clean.shape[0] % 16 == clean.shape[1] % 16 == 0
        restored = (torch.from_numpy(degraded).float() / 255 * 0.9).clamp(0, 1).numpy()
        truth = clean.astype(np.float32) / 255
        psnr.append(peak_signal_noise_ratio(truth, restored, data_range=1))
        ssim.append(structural_similarity(truth, restored, data_range=1, channel_axis=-1))
    score = found.scores["promptir"]["denoise_25/photos"]
    assert score.images == 3
    assert score.psnr == pytest.approx(np.mean(psnr), abs=1e-6)
    assert score.ssim == pytest.approx(np.mean(ssim), abs=1e-6)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_scores_and_pictures_are_the_same_bits_on_any_number_of_ranks(supply: ShardPool, world: int) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS, None)
    settings = PUBLISHED._replace(protocols=ALL)
    [alone] = scores_on(1, supply, jobs, settings=settings)
    assert alone.pictures is not None
    for found in scores_on(world, supply, jobs, settings=settings):
        assert found.scores == alone.scores
        assert found.images == alone.images
        assert found.table() == alone.table()
        assert found.pictures == alone.pictures


@pytest.mark.parametrize("images_before", [0, 1])
def test_all_ranks_stop_when_one_is_asked_to_and_the_next_evaluation_is_whole(
    supply: ShardPool, images_before: int
) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS, None)
    looks = iter(range(100))

    def asked(rank: int) -> bool:
        return rank == 1 and next(looks) >= images_before

    for found in scores_on(3, supply, jobs, asked):
        assert isinstance(found, Stopped)
        assert str(found) == "stopped on request while evaluating; the round's training is committed"
    [alone] = scores_on(1, supply, jobs)
    assert scores_on(3, supply, jobs) == [alone] * 3, "nothing was left held, and nobody waits for somebody"


def test_a_rank_without_images_that_is_asked_to_stop_does_not_leave_alone(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS[:1], ("photos",))
    empty = next(rank for rank in range(4) if not evaluate.assign_jobs(jobs, rank, 4))
    found = scores_on(4, supply, jobs, lambda rank: rank == empty)
    assert len({type(one) for one in found}) == 1


def test_an_image_too_small_to_score_is_refused_by_name_before_any_training(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (12, 40, 3), dtype=np.uint8)).save(tmp_path / "images/low.png")
    Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "images/fine.png")
    clean = {"folder": str(tmp_path / "images"), "include": ["fine.png"]}
    tree = {
        "name": "low",
        "least_pixels": 32,
        "train": [{"set": "some", "kind": "clean", "clean": clean}],
        "evaluate": [{"set": "low", "kind": "clean", "clean": clean | {"include": ["low.png"]}}],
    }
    build(yaml_loader.build(Recipe, tree, "the test"), Folder(tmp_path / "built"), 1, quiet)
    with pytest.raises(
        UserError, match=r"evaluation image '.*low.*' is 12 x 40 pixels \(1 such\); scores need 16 a side"
    ):
        evaluate.plan_jobs(Shards(Folder(tmp_path / "built")), TASKS, None)


def test_a_rank_is_dealt_runs_of_shards_and_every_job_once(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS, None)
    for world in (1, 2, 3, 4, 20):
        dealt = [evaluate.assign_jobs(jobs, rank, world) for rank in range(world)]
        assert sorted(n for mine in dealt for n in mine) == list(range(len(jobs)))
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        for mine in dealt:
            names = [jobs[n].place.shard.name for n in mine]
            assert names == sorted(names)


class Counting(Darker):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return super().forward(image)


def test_an_image_is_restored_once_for_all_protocols_that_give_the_network_the_same(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS[1:], None)
    counting = Counting()
    [together] = scores_on(1, supply, jobs, settings=PUBLISHED._replace(protocols=ALL), model=counting)
    assert counting.passes == 3 * 3 + 3 * 2, "noise: three inputs of each image; stored pairs: cropped, and whole"
    assert list(together.scores) == list(PROTOCOLS), "the headline first"
    for protocol in ALL:
        [alone] = scores_on(1, supply, jobs, settings=PUBLISHED._replace(protocols=(protocol,)))
        assert together.scores[protocol.name] == alone.scores[protocol.name]
        assert tuple(i for i in together.images if i.protocol == protocol.name) == alone.images
    assert len({scores["denoise_50/photos"].psnr for scores in together.scores.values()}) == 5


def test_every_image_is_told_with_all_its_digits_and_means_are_exact(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS, None)
    [found] = scores_on(1, supply, jobs, settings=PUBLISHED._replace(protocols=ALL[:2]))
    lines = list(csv.DictReader(io.StringIO(found.table().decode())))
    assert list(lines[0]) == ["protocol", "name", "image", "psnr", "ssim", "degraded_psnr", "degraded_ssim"]
    assert [(line["protocol"], line["name"], line["image"]) for line in lines] == [
        (protocol, job.name, job.place.entry.key) for protocol in ("promptir", "restormer") for job in jobs
    ]
    for protocol, scores in found.scores.items():
        for name, score in scores.items():
            of = [line for line in lines if (line["protocol"], line["name"]) == (protocol, name)]
            assert len(of) == score.images == 3
            for what in ("psnr", "ssim", "degraded_psnr", "degraded_ssim"):
                assert math.fsum(float(line[what]) for line in of) / 3 == getattr(score, what)


def test_inputs_follow_the_protocol_and_noise_the_image_and_the_sigma(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS[:1], ("photos",))
    for job in jobs:
        size = (job.place.entry.height, job.place.entry.width)
        for name in PROTOCOLS:
            degraded, clean = pair(supply, job, protocol=name)
            whole = PROTOCOLS[name].multiple == 1
            assert clean.shape[:2] == (size if whole else tuple(side // 16 * 16 for side in size))
            assert degraded.dtype == (np.float32 if name == "restormer" else np.uint8)
            other = pair(supply, job, 1, name)[0]
            assert np.array_equal(degraded, other) == (name == "restormer"), "whose seed is 0, always"
    (given, clean), again = pair(supply, jobs[1]), pair(supply, jobs[1])[0]
    assert np.array_equal(given, again) and clean.shape == (64, 64, 3)
    assert 15 < (given.astype(float) - clean).std() < 26
    for change in ({"set": "elsewhere"}, {"task": TASKS[1]}, {"place": jobs[0].place}):
        assert not np.array_equal(given, pair(supply, jobs[1]._replace(**change))[0])


def test_the_degraded_score_is_that_of_a_network_that_does_nothing(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS, None)
    [found] = scores_on(1, supply, jobs, settings=PUBLISHED._replace(protocols=ALL), model=nn.Identity())
    assert found.images
    for image in found.images:
        assert (image.psnr, image.ssim) == (image.degraded_psnr, image.degraded_ssim)


def test_few_are_the_first_images_of_each_score_without_pictures(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS, None, pictures=2)
    assert [job.pictured for job in jobs] == [True, True, False] * 3
    chosen = evaluate.first_images(jobs, 2)
    assert chosen == [job._replace(pictured=False) for n, job in enumerate(jobs) if n % 3 < 2]
    assert evaluate.first_images(jobs, 9) == [job._replace(pictured=False) for job in jobs]
    [found] = scores_on(1, supply, chosen)
    assert found.pictures is None
    assert {score.images for score in found.scores["promptir"].values()} == {2}


@pytest.mark.parametrize("name", ["promptir", "restormer"])
def test_a_strip_shows_the_first_images_of_each_score_and_says_which(supply: ShardPool, name: str) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS[1:], None, pictures=2)
    [found] = scores_on(2, supply, jobs, settings=PUBLISHED._replace(protocols=(PROTOCOLS[name], *ONE)))[:1]
    shown, pictured = rows(found.pictures), [job for job in jobs if job.pictured]
    assert [row.title for row in shown] == [f"{job.name} {job.place.entry.key}" for job in pictured]
    for row, job in zip(shown, pictured, strict=True):
        given, clean = pair(supply, job, protocol=name)
        degraded = given if given.dtype == np.uint8 else to_8bit(given)
        restored = to_8bit(evaluate.restore(Darker(), given, torch.device("cpu")))
        assert all(np.array_equal(*two) for two in zip(row.images, (degraded, restored, clean), strict=True))


def test_what_was_measured_with_is_told_in_words() -> None:
    assert PUBLISHED.as_recorded() == {"precision": "fp32", "compile": "no", "tile": "whole image"}
    other = EvalSettings(ONE, 0, tile_pixels=256, precision="bf16", compile=True)
    assert other.as_recorded() == {"precision": "bf16", "compile": "yes", "tile": "256 pixels, 32 shared"}


class Wide(nn.Module):
    """A network whose answer depends on all that it is given, and on the precision it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.sin(torch.arange(81.0)).reshape(3, 3, 3, 3) / 40)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = 0.9 * image + self.mix(image) - 0.1 * image.mean(dim=(-2, -1), keepdim=True)
        return out


def test_tiles_and_bf16_reach_the_network(supply: ShardPool) -> None:
    jobs = evaluate.plan_jobs(supply.shards, TASKS[:1], None)
    ways = {
        "plain": PUBLISHED,
        "tiles": PUBLISHED._replace(tile_pixels=32, tile_overlap=8),
        "bf16": PUBLISHED._replace(precision="bf16"),
    }
    psnr = {}
    for word, settings in ways.items():
        [found] = scores_on(1, supply, jobs, settings=settings, model=Wide())
        psnr[word] = found.scores["promptir"]["denoise_25/photos"].psnr
    assert abs(psnr["tiles"] - psnr["plain"]) > 1e-3
    assert 1e-6 < abs(psnr["bf16"] - psnr["plain"]) < 0.2
    image = np.full((20, 30, 3), 77, np.uint8)
    assert evaluate.restore(Wide(), image, torch.device("cpu"), precision="bf16").dtype == np.float32


def test_a_compiled_network_scores_the_same_for_every_size_from_one_tracing(
    supply: ShardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[Any] = []

    def traces_only(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=traces_only))
    oblong, square, tall = evaluate.plan_jobs(supply.shards, TASKS[:1], None)
    jobs = [square, oblong, tall]  # nothing is to be concluded from a square that comes first
    settings = PUBLISHED._replace(protocols=ALL)
    model = Darker()
    [compiled] = scores_on(1, supply, jobs, settings=settings._replace(compile=True), model=model)
    [plain] = scores_on(1, supply, jobs, settings=settings, model=model)
    assert compiled == plain
    assert len(traced) == 1, "photographs have three sizes, cropped and whole"


def test_where_compiling_fails_the_fault_says_what_to_do(supply: ShardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise OSError("no g++ here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    jobs = evaluate.plan_jobs(supply.shards, TASKS[:1], None)
    [found] = scores_on(1, supply, jobs, settings=PUBLISHED._replace(compile=True))
    assert isinstance(found, UserError)
    assert re.search(r"torch.compile fails \(.*\), where the network is compiled for scoring", str(found))
    assert "Install a C++ compiler (g++), or set evaluate.compile=false." in str(found)


def test_a_score_is_the_same_on_1_2_and_3_real_ranks_to_the_last_bit(lab: Any, tmp_path: Path) -> None:
    script = str(PROGRAMS / "score.py")
    reports = {}
    for world in (1, 2, 3):
        ended = lab.start(str(lab.shards), cwd=tmp_path, world=world, script=script).wait()
        assert ended.rc == 0, ended.said()
        reports[world] = [json.loads((tmp_path / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    [alone] = reports[1]
    assert alone["images"] == 2 * 4 and set(alone["scores"]) == {"promptir", "restormer"}
    assert sum(len(rank["own_jobs"]) for rank in reports[3]) == 4 and all(rank["own_jobs"] for rank in reports[3])
    for world in (2, 3):
        for rank in reports[world]:
            assert {key: rank[key] for key in rank if key != "own_jobs"} == {
                key: alone[key] for key in alone if key != "own_jobs"
            }
