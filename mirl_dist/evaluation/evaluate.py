"""Computes PSNR and SSIM per protocol, task and set. Each image is scored by one rank; means are exact."""

from __future__ import annotations

import csv
import io
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from itertools import groupby, islice
from math import fsum
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import nn

from mirl_dist.config.seeding import rng
from mirl_dist.config.tasks import Task
from mirl_dist.data import image_strip
from mirl_dist.data.manifest import CLEAN, DEGRADED, Shard
from mirl_dist.data.sample import Pixels, to_tensor
from mirl_dist.data.shard_pool import ImageSource
from mirl_dist.data.shards import Shards
from mirl_dist.distributed import device_errors, hardware
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import InvariantError, Stopped, UserError
from mirl_dist.evaluation import protocols, tiling
from mirl_dist.evaluation.protocols import PROTOCOLS, ScoringProtocol
from mirl_dist.evaluation.score import ImageScore, Score
from mirl_dist.evaluation.scorer import EvalJob, EvalSettings, ImageResult, RestoredImage, Scorer, naming
from mirl_dist.models.compiled import Compiled
from mirl_dist.observability.progress import bar

Image = NDArray[np.float32]
_COLUMNS = ("degraded", "restored", "clean")


class EvalResult(NamedTuple):
    """The result of an evaluation. scores: means by protocol (in the order of the settings) and 'task/set'; images: all
    scores, by protocol and in the order of the jobs; pictures: PNG strip of pictured images, or None; grey: how many
    clean images of each set have three equal channels (sets without any are left out)."""

    scores: dict[str, dict[str, Score]]
    images: tuple[ImageScore, ...]
    pictures: bytes | None
    grey: dict[str, int]

    def table(self) -> bytes:
        """Return `images` as CSV with a header; numbers have full precision."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(ImageScore._fields)
        writer.writerows([*image[:3], *map(repr, image[3:])] for image in self.images)
        return out.getvalue().encode("utf-8", "surrogateescape")


def plan_jobs(
    shards: Shards,
    tasks: Sequence[Task],
    sets: Sequence[str] | None,
    pictures: int = 1,
    by: Sequence[ScoringProtocol] = (PROTOCOLS["promptir"],),
) -> list[EvalJob]:
    """Return a job per task and image. Sets of clean images are scored for every trained task that degrades on reading.

    sets: names, or None for all. pictures: number of images to picture per 'task/set'; by: the protocols to score with.
    Raises UserError for a set that the shards do not have, and for images too small for a protocol.
    """
    least = max(protocol.least_pixels for protocol in by)
    places = shards.places("evaluate")
    kinds = {s.set: s.kind for s in shards.manifest.role("evaluate")}
    chosen = places if sets is None else sets
    unknown = [name for name in chosen if name not in places]
    if unknown:
        raise UserError(
            f"evaluate.sets: found {', '.join(unknown)}; the shards have {', '.join(sorted(places)) or 'none'}. "
            "Correct the names, or build shards with those sets.",
            everywhere=True,
        )
    entries = (place.entry for name in chosen for place in places[name])
    small = [e for e in entries if min(e.height, e.width) < least]
    if small:
        raise UserError(
            f"evaluation image '{small[0].key}' is {small[0].height} x {small[0].width} pixels ({len(small)} such); "
            f"scores need {least} a side. Leave it out of the recipe and build the shards again.",
            everywhere=True,
        )
    return [
        EvalJob(f"{task.name}/{name}", task, name, place, at < pictures)
        for task in tasks
        for name in sorted(chosen)
        if kinds[name] == task.kind
        for at, place in enumerate(places[name])
    ]


def first_images(jobs: Sequence[EvalJob], images: int) -> list[EvalJob]:
    """Return the first `images` jobs of each 'task/set', not pictured."""
    by_name = groupby(jobs, key=lambda job: job.name)
    return [job._replace(pictured=False) for _, group in by_name for job in islice(group, images)]


def degraded_and_clean(
    source: ImageSource, job: EvalJob, protocol: ScoringProtocol, seed: int
) -> tuple[Pixels | Image, Pixels]:
    """Return network input and clean image of a job, both cropped, (H, W, 3). The clean image is uint8; the input is
    uint8, or float32 if the protocol does not quantise noise. Noise is seeded by seed, set, sample key and task."""
    clean = protocols.cropped(protocol, source.image(job.place, CLEAN))
    if job.place.entry.image(DEGRADED) is not None:
        return protocols.cropped(protocol, source.image(job.place, DEGRADED)), clean
    noise = rng("test", seed, job.set, job.place.entry.key, job.task.name)
    return protocols.degraded(protocol, job.task, clean, noise), clean


def restore(
    model: nn.Module,
    image: Pixels | Image,
    device: torch.device,
    tile_pixels: int | None = None,
    tile_overlap: int = 32,
    precision: str = "fp32",
) -> Image:
    """Restore one image, whole or in tiles (tiling.py): float32 (H, W, 3), clipped to [0, 1].

    image: (H, W, 3), uint8, or float32 in the network's range. precision: fp32 or bf16 (torch.autocast).
    """

    def restore_part(part: NDArray[Any]) -> Image:
        is_8bit = part.dtype == np.uint8
        batch = to_tensor([part]) if is_8bit else torch.from_numpy(rearrange(part, "h w c -> 1 c h w").copy())
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(batch.to(device)).float()
        restored: Image = rearrange(output, "1 c h w -> h w c").contiguous().cpu().numpy()
        return restored

    if tile_pixels is None:
        return np.clip(restore_part(image), 0, 1)
    return np.clip(tiling.restore_tiled(restore_part, image, tile_pixels, tile_overlap), 0, 1)


def _restore_job(
    model: nn.Module, source: ImageSource, job: EvalJob, settings: EvalSettings, device: torch.device
) -> dict[tuple[int, str], RestoredImage]:
    """Restore the image of a job once per distinct protocol input.

    Images are restored one at a time, never as batches: a batch rounds differently from its images alone, and which
    images share one would depend on the number of ranks.
    """
    images: dict[tuple[int, str], RestoredImage] = {}
    for protocol in settings.protocols:
        kind = protocol.input(job.task)
        if kind in images:
            continue
        image, clean = degraded_and_clean(source, job, protocol, settings.seed)
        tile, (height, width) = settings.tile_pixels, image.shape[:2]
        try:
            with device_errors.out_of_memory():
                restored = restore(model, image, device, tile, settings.tile_overlap, settings.precision)
        except device_errors.OutOfMemory:
            text = f"its {width}x{height} pixels do not fit into the memory of this rank's device"
            smaller = tile // 2 if tile else 512
            raise UserError(
                f"{text}. Use tiles, which change scores slightly: evaluate.tile_pixels (or --tile) {smaller}."
            ) from None
        images[kind] = RestoredImage(protocols.as_restored(image), restored, clean)
    return images


def assign_jobs(jobs: Sequence[EvalJob], rank: int, world: int) -> list[int]:
    """Return the indices of one rank's jobs, contiguous by shard, so that each rank fetches few shards."""
    by_shard = sorted(range(len(jobs)), key=lambda n: (jobs[n].place.shard.name, n))
    return by_shard[len(jobs) * rank // world : len(jobs) * (rank + 1) // world]


def _hold_shards(
    source: ImageSource, jobs: Sequence[EvalJob], numbers: Iterable[int], look_ahead: bool
) -> Generator[int]:
    """Yield numbers of jobs while their shard is held. look_ahead: fetch the shard after it meanwhile."""
    runs = [list(run) for _, run in groupby(numbers, key=lambda n: jobs[n].place.shard.name)]
    shards, acquired = (jobs[run[0]].place.shard for run in runs), deque[Shard]()
    try:
        for run in runs:
            for shard in islice(shards, 1 + look_ahead - len(acquired)):
                source.acquire(shard)
                acquired.append(shard)
            yield from run
            source.release(acquired.popleft())
    finally:
        for shard in acquired:
            source.release(shard)


def evaluate(
    model: nn.Module,
    source: ImageSource,
    jobs: Sequence[EvalJob],
    ranks: Ranks,
    settings: EvalSettings,
    look_ahead: bool = False,
    stop_asked: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Score every job once, distributed over the ranks; results are bit-identical on all ranks and for any world size.

    model: the unwrapped network, as ranks score different numbers of images; in training mode afterwards.
    look_ahead: the cache has room for two shards per rank. stop_asked: checked before each image.
    Raises Stopped on every rank, without a result, if any was asked to stop; UserError for an image that cannot be
    scored, and if compiling fails.
    """
    model.eval()
    own_jobs, stopped = assign_jobs(jobs, ranks.rank, ranks.world), False
    network = Compiled(model) if settings.compile else model
    with (
        hardware.without_tf32(),  # a run that trains in tf32 gets the scores that `evaluate` gets of its ticket
        bar("evaluating", len(own_jobs), shown=ranks.is_main and bool(jobs)) as advance,
        closing(_hold_shards(source, jobs, own_jobs, look_ahead)) as numbers,
        closing(Scorer(settings)) as scorer,
    ):
        for done, number in enumerate(numbers, 1):
            if stopped := stop_asked():
                break
            job = jobs[number]
            try:
                with naming(job):
                    images = _restore_job(network, source, job, settings, ranks.device)
            except Stopped:  # raised while waiting for a shard
                stopped = True
                break
            scorer.add(number, job, images)
            advance(done, job.name)
        results = {} if stopped else scorer.results()
    model.train()
    if ranks.any(stopped, what="whether to stop evaluating"):
        raise Stopped("stopped on request while evaluating; the round's training is committed")
    everyone = sorted((item for part in ranks.gather_objects(results) for item in part.items()), key=itemgetter(0))
    if [number for number, _ in everyone] != list(range(len(jobs))):
        raise InvariantError("an image was scored twice or not at all", everywhere=True)
    return _average([result for _, result in everyone], settings)


def _average(results: Sequence[ImageResult], settings: EvalSettings) -> EvalResult:
    """Average over images exactly (fsum), independently of the world size."""
    images = tuple(r.scores[at] for at in range(len(settings.protocols)) for r in results)
    scores: dict[str, dict[str, Score]] = {protocol.name: {} for protocol in settings.protocols}
    for protocol, name in dict.fromkeys((i.protocol, i.name) for i in images):
        values = [i[3:] for i in images if (i.protocol, i.name) == (protocol, name)]
        psnr, ssim, before_psnr, before_ssim = (fsum(each) / len(values) for each in zip(*values, strict=True))
        scores[protocol][name] = Score(
            psnr=psnr, ssim=ssim, degraded_psnr=before_psnr, degraded_ssim=before_ssim, images=len(values)
        )
    rows = [r.row for r in results if r.row is not None]
    grey = {(r.scores[0].name.partition("/")[2], r.scores[0].image) for r in results if r.is_grey}
    strip = image_strip.strip(rows, _COLUMNS) if rows else None
    return EvalResult(scores, images, strip, dict(Counter(sorted(name for name, _ in grey))))
