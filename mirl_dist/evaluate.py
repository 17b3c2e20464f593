"""PSNR and SSIM per task and set: whole images, each scored once by one rank, averaged exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import fsum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mirl_dist import metrics, pictures
from mirl_dist.data import degrade
from mirl_dist.data.chance import generator
from mirl_dist.data.manifest import CLEAN, DEGRADED, Shard
from mirl_dist.data.sample import Pixels, to_tensor
from mirl_dist.data.shards import Place, Shards
from mirl_dist.data.supply import Supply
from mirl_dist.faults import Fault, Stopped
from mirl_dist.ranks import Ranks
from mirl_dist.report import bar
from mirl_dist.tasks import Task
from mirl_dist.ticket import Score

_STRIP_PIXELS = 192
_LEAST_PIXELS = 16


class Job(NamedTuple):
    """One image to restore for one task. `name` is 'task/set', the name of the score it counts for."""

    name: str
    task: Task
    set: str
    place: Place
    pictured: bool


class _Result(NamedTuple):
    number: int
    name: str
    psnr: float
    ssim: float
    degraded_psnr: float
    degraded_ssim: float
    row: pictures.Row | None


class Scores(NamedTuple):
    """Scores by 'task/set', and a PNG of the first image of each (None without images)."""

    scores: dict[str, Score]
    pictures: bytes | None


def _too_small(place: Place) -> bool:
    return min(place.entry.height, place.entry.width) < _LEAST_PIXELS


def plan(shards: Shards, tasks: Sequence[Task], sets: Sequence[str] | None) -> list[Job]:
    """Every (task, image) to score: a set of clean images is scored for every trained task that degrades on reading.

    sets: names, or None for all. Raises Fault for a set that the shards do not have.
    """
    places = shards.places("evaluate")
    kinds = {s.set: s.kind for s in shards.manifest.role("evaluate")}
    unknown = [name for name in sets or () if name not in places]
    if unknown:
        raise Fault(
            f"evaluate.sets: found {', '.join(unknown)}; the shards have {', '.join(sorted(places)) or 'none'}. "
            "Correct the names, or build shards with those sets.",
            everywhere=True,
        )
    small = [p.entry for name in (places if sets is None else sets) for p in places[name] if _too_small(p)]
    if small:
        raise Fault(
            f"evaluation image '{small[0].key}' is {small[0].height} x {small[0].width} pixels ({len(small)} such); "
            f"scores need {_LEAST_PIXELS} a side. Leave it out of the recipe and build the shards again.",
            everywhere=True,
        )
    jobs = []
    for task in tasks:
        for name in sorted(sets if sets is not None else places):
            if kinds[name] == task.kind:
                jobs += [Job(f"{task.name}/{name}", task, name, p, i == 0) for i, p in enumerate(places[name])]
    return jobs


def degraded_and_clean(supply: Supply, job: Job, seed: int) -> tuple[Pixels, Pixels]:
    """The test pair of a job, uint8, cropped to a multiple of 16; its chance depends on seed, set, name and task."""
    clean = np.ascontiguousarray(metrics.crop_to_multiple(supply.image(job.place, CLEAN)))
    if job.place.entry.image(DEGRADED) is not None:
        return np.ascontiguousarray(metrics.crop_to_multiple(supply.image(job.place, DEGRADED))), clean
    rng = generator("test", seed, job.set, job.place.entry.key, job.task.name)
    return degrade.for_test(job.task, clean, rng), clean


def restore(model: nn.Module, image: Pixels, device: torch.device) -> NDArray[np.float32]:
    """One image through the network: uint8 (H, W, 3) to float32 (H, W, 3) clipped to [0, 1]."""
    with torch.inference_mode():
        restored = model(to_tensor([image]).to(device))
    clipped: NDArray[np.float32] = restored[0].float().clamp(0, 1).permute(1, 2, 0).contiguous().cpu().numpy()
    return clipped


def _score(model: nn.Module, supply: Supply, number: int, job: Job, seed: int, device: torch.device) -> _Result:
    degraded, clean = degraded_and_clean(supply, job, seed)
    restored = restore(model, degraded, device)
    truth, given = (x.astype(np.float32) / np.float32(255) for x in (clean, degraded))
    row = None
    if job.pictured:
        shown = (degraded, np.round(restored * 255).astype(np.uint8), clean)
        images = tuple(pictures.centre(i, _STRIP_PIXELS) for i in shown)
        row = pictures.Row(f"{job.name}: degraded, restored, clean", images)
    return _Result(
        number,
        job.name,
        metrics.psnr(restored, truth),
        metrics.ssim(restored, truth),
        metrics.psnr(given, truth),
        metrics.ssim(given, truth),
        row,
    )


def deal(jobs: Sequence[Job], rank: int, world: int) -> list[int]:
    """The numbers of one rank's jobs: runs of shards, so that a rank brings few of them."""
    by_shard = sorted(range(len(jobs)), key=lambda n: (jobs[n].place.shard.name, n))
    return by_shard[len(jobs) * rank // world : len(jobs) * (rank + 1) // world]


@contextmanager
def _held(supply: Supply, shards: Sequence[Shard], ahead: bool) -> Iterator[Iterator[Shard]]:
    """Shards one after the other, each held until the next is asked for; ahead: the one after it comes meanwhile."""
    wanted: deque[Shard] = deque()

    def one_by_one() -> Iterator[Shard]:
        coming = iter(shards)
        for shard in shards:
            while len(wanted) < 1 + ahead and (more := next(coming, None)) is not None:
                supply.want(more)
                wanted.append(more)
            yield shard
            supply.release(wanted.popleft())

    try:
        yield one_by_one()
    finally:
        for shard in wanted:
            supply.release(shard)


def _never() -> bool:
    return False


def evaluate(
    model: nn.Module,
    supply: Supply,
    jobs: Sequence[Job],
    ranks: Ranks,
    seed: int,
    look_ahead: bool = False,
    stop_asked: Callable[[], bool] = _never,
) -> Scores:
    """Score every job once, shared out over the ranks; the same bits on every rank and for every world size.

    model: the bare network (not the wrapped one: ranks score different numbers of images), set to eval here.
    look_ahead: the cache has room for two shards of every rank. stop_asked: looked at before every image.
    Raises Stopped on every rank, with nothing scored, when any of them was asked to stop.
    """
    model.eval()
    mine, stopped = deal(jobs, ranks.rank, ranks.world), False
    results: list[_Result] = []
    with bar("evaluating", len(mine), shown=ranks.is_main and bool(jobs)) as advance:
        runs = [list(group) for _, group in groupby(mine, key=lambda n: jobs[n].place.shard.name)]
        with _held(supply, [jobs[numbers[0]].place.shard for numbers in runs], look_ahead) as held:
            for _, numbers in zip(held, runs, strict=True):
                for number in numbers:
                    if stopped := stopped or stop_asked():
                        break
                    job = jobs[number]
                    try:
                        results.append(_score(model, supply, number, job, seed, ranks.device))
                    except Stopped:  # while a shard did not come
                        stopped = True
                        break
                    except Fault as fault:
                        raise Fault(f"{job.name}, image '{job.place.entry.key}': {fault}") from None
                    advance(len(results), job.name)
                if stopped:
                    break
    model.train()
    if ranks.any(stopped, what="whether to stop evaluating"):
        raise Stopped("stopped as asked while evaluating; the round's training is committed")
    everyone = sorted((r for part in ranks.gather_objects(results) for r in part), key=lambda r: r.number)
    assert [r.number for r in everyone] == list(range(len(jobs))), "an image was scored twice or not at all"
    scores = {}
    for name in dict.fromkeys(job.name for job in jobs):
        of = [r for r in everyone if r.name == name]
        scores[name] = Score(
            psnr=fsum(r.psnr for r in of) / len(of),
            ssim=fsum(r.ssim for r in of) / len(of),
            degraded_psnr=fsum(r.degraded_psnr for r in of) / len(of),
            degraded_ssim=fsum(r.degraded_ssim for r in of) / len(of),
            images=len(of),
        )
    rows = [r.row for r in everyone if r.row is not None]
    return Scores(scores, pictures.strip(rows) if rows else None)
