"""Laws of scoring: the named protocol, noise that belongs to the image, every image once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from streams import quiet, supply_of
from torch import nn

from mirl_dist import evaluate, yaml_tree
from mirl_dist.data.build import build
from mirl_dist.data.manifest import CLEAN
from mirl_dist.data.recipe import Recipe
from mirl_dist.data.shards import Shards
from mirl_dist.data.supply import Supply
from mirl_dist.faults import Fault, Stopped
from mirl_dist.storage import Folder
from mirl_dist.tasks import Task

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
        everyone = list(self._board)
        self._meet.wait(60)
        return everyone

    def any(self, flag: bool, *, what: str) -> bool:
        return any(self.gather_objects(flag, what=what))


def scores_on(
    world: int, supply: Supply, jobs: list[evaluate.Job], asked: Callable[[int], bool] = lambda rank: False
) -> list[Any]:
    """What every rank scored, or the exception that it met; asked: whether a rank is asked to stop, at each image."""
    board: list[Any] = [None] * world
    found: list[Any] = [None] * world
    meet = threading.Barrier(world)

    def one(rank: int) -> None:
        ranks: Any = SomeRanks(rank, world, board, meet)
        try:
            found[rank] = evaluate.evaluate(
                Darker(), supply, jobs, ranks, seed=0, stop_asked=lambda: asked(rank), look_ahead=True
            )
        except (Fault, Stopped) as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(scope="module")
def supply(tmp_path_factory: pytest.TempPathFactory) -> Supply:
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
    build(yaml_tree.build(Recipe, tree, "the test"), Folder(folder / "built"), 1, quiet)
    return supply_of(folder / "built")


def test_a_denoising_set_is_scored_at_every_sigma_that_is_trained(supply: Supply) -> None:
    jobs = evaluate.plan(supply.shards, TASKS, None)
    assert [j.name for j in jobs] == ["denoise_25/photos"] * 3 + ["denoise_50/photos"] * 3 + ["derain/rain"] * 3
    assert evaluate.plan(supply.shards, TASKS, ("rain",)) == jobs[6:]
    with pytest.raises(Fault, match=r"evaluate\.sets: found set5; the shards have photos, rain"):
        evaluate.plan(supply.shards, TASKS, ("set5",))


def test_a_clean_set_is_scored_for_every_trained_task_that_degrades_on_reading_and_for_no_other(
    supply: Supply,
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
    jobs = evaluate.plan(supply.shards, [Task.of(word) for word in words], None)
    made = [word for word in words[:5] for _ in range(3)]
    assert [job.name for job in jobs] == [f"{word}/photos" for word in made] + ["derain/rain"] * 3
    [alone] = scores_on(1, supply, jobs)
    assert list(alone.scores) == [*(f"{word}/photos" for word in words[:5]), "derain/rain"]
    assert len({score.degraded_psnr for score in alone.scores.values()}) == 6, "each task degrades in its own way"
    for found in scores_on(3, supply, jobs):
        assert found == alone
    drawn = ("deblur_easy", "enlighten_mild", "denoise_hard")
    for word in (*words[:5], "derain"):
        mine = [job for job in jobs if job.task.name == word]
        pairs = [evaluate.degraded_and_clean(supply, job, seed=0) for job in mine]
        assert all(d.dtype == c.dtype == np.uint8 and d.shape == c.shape for d, c in pairs)
        assert any(not np.array_equal(d, c) for d, c in pairs), "an easy level may leave one image as it was"
        again = [evaluate.degraded_and_clean(supply, job, seed=0)[0] for job in mine]
        assert all(np.array_equal(d, a) for (d, _), a in zip(pairs, again, strict=True))
        others = [evaluate.degraded_and_clean(supply, job, seed=1)[0] for job in mine]
        same = all(np.array_equal(d, o) for (d, _), o in zip(pairs, others, strict=True))
        assert same == (word not in drawn), "chance where the task has some, and there alone"


def test_scores_are_those_of_the_published_protocol(supply: Supply) -> None:
    jobs = evaluate.plan(supply.shards, TASKS[:1], ("photos",))
    [found] = scores_on(1, supply, jobs)
    psnr, ssim = [], []
    for job in jobs:
        degraded, clean = evaluate.degraded_and_clean(supply, job, seed=0)
        assert clean.shape[0] % 16 == clean.shape[1] % 16 == 0
        restored = (torch.from_numpy(degraded).float() / 255 * 0.9).clamp(0, 1).numpy()
        truth = clean.astype(np.float32) / 255
        psnr.append(peak_signal_noise_ratio(truth, restored, data_range=1))
        ssim.append(structural_similarity(truth, restored, data_range=1, channel_axis=-1))
    score = found.scores["denoise_25/photos"]
    assert score.images == 3
    assert score.psnr == pytest.approx(np.mean(psnr), abs=1e-6)
    assert score.ssim == pytest.approx(np.mean(ssim), abs=1e-6)


def test_test_noise_belongs_to_the_image_and_the_sigma_alone(supply: Supply) -> None:
    jobs = evaluate.plan(supply.shards, TASKS[:2], ("photos",))
    first = [evaluate.degraded_and_clean(supply, job, 0)[0] for job in jobs]
    again = [evaluate.degraded_and_clean(supply, job, 0)[0] for job in reversed(jobs)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[3]), "another sigma"
    assert not np.array_equal(first[0], evaluate.degraded_and_clean(supply, jobs[0], 1)[0]), "another seed"
    clean = supply.image(jobs[1].place, CLEAN)
    noise = first[1].astype(float) - evaluate.degraded_and_clean(supply, jobs[1], 0)[1]
    assert clean.shape == (64, 64, 3) and 15 < noise.std() < 26


@pytest.mark.parametrize("world", [2, 3, 4])
def test_scores_and_pictures_are_the_same_to_the_last_bit_on_any_number_of_ranks(supply: Supply, world: int) -> None:
    jobs = evaluate.plan(supply.shards, TASKS, None)
    [alone] = scores_on(1, supply, jobs)
    assert alone.pictures is not None
    for found in scores_on(world, supply, jobs):
        assert found.scores == alone.scores
        assert found.pictures == alone.pictures


@pytest.mark.parametrize("images_before", [0, 1])
def test_all_ranks_stop_when_one_of_them_is_asked_to_and_the_next_evaluation_is_whole(
    supply: Supply, images_before: int
) -> None:
    jobs = evaluate.plan(supply.shards, TASKS, None)
    looks = iter(range(100))

    def asked(rank: int) -> bool:
        return rank == 1 and next(looks) >= images_before

    for found in scores_on(3, supply, jobs, asked):
        assert isinstance(found, Stopped)
        assert str(found) == "stopped as asked while evaluating; the round's training is committed"
    [alone] = scores_on(1, supply, jobs)
    assert scores_on(3, supply, jobs) == [alone] * 3, "nothing was left held, and nobody waits for somebody"


def test_a_rank_without_images_that_is_asked_to_stop_does_not_leave_alone(supply: Supply) -> None:
    jobs = evaluate.plan(supply.shards, TASKS[:1], ("photos",))
    empty = next(rank for rank in range(4) if not evaluate.deal(jobs, rank, 4))
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
    build(yaml_tree.build(Recipe, tree, "the test"), Folder(tmp_path / "built"), 1, quiet)
    with pytest.raises(Fault, match=r"evaluation image '.*low.*' is 12 x 40 pixels \(1 such\); scores need 16 a side"):
        evaluate.plan(Shards(Folder(tmp_path / "built")), TASKS, None)


def test_a_rank_is_dealt_runs_of_shards_and_every_job_once(supply: Supply) -> None:
    jobs = evaluate.plan(supply.shards, TASKS, None)
    for world in (1, 2, 3, 4, 20):
        dealt = [evaluate.deal(jobs, rank, world) for rank in range(world)]
        assert sorted(n for mine in dealt for n in mine) == list(range(len(jobs)))
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        for mine in dealt:
            names = [jobs[n].place.shard.name for n in mine]
            assert names == sorted(names)
