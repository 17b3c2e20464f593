"""Scores restored images in threads, off the way of the network that restores the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.config.tasks import Task
from mirl_dist.data import image_strip
from mirl_dist.data.sample import Pixels
from mirl_dist.data.shards import SamplePlace
from mirl_dist.distributed import hardware
from mirl_dist.errors import UserError
from mirl_dist.evaluation import metrics, protocols
from mirl_dist.evaluation.protocols import ScoringProtocol
from mirl_dist.evaluation.score import ImageScore

Image = NDArray[np.float32]
_STRIP_PIXELS = 192
_MOST_SCORING_THREADS = 4


class EvalSettings(NamedTuple):
    """The settings for restoring and scoring images.

    protocols: the first is the headline. seed: of the test noise. tile_pixels: side of tiles, which share
    `tile_overlap` pixels; None restores whole images. compile: restore with torch.compile.
    """

    protocols: tuple[ScoringProtocol, ...]
    seed: int
    tile_pixels: int | None = None
    tile_overlap: int = 32
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    def as_recorded(self) -> dict[str, str]:
        """Return the settings that affect scores but are not part of a protocol, as text for a ticket."""
        tile = f"{self.tile_pixels} pixels, {self.tile_overlap} shared" if self.tile_pixels else "whole image"
        return {"precision": self.precision, "compile": "yes" if self.compile else "no", "tile": tile}


class EvalJob(NamedTuple):
    """One image to restore for one task. name: 'task/set'; pictured: include it in the strip of images."""

    name: str
    task: Task
    set: str
    place: SamplePlace
    pictured: bool


class ImageResult(NamedTuple):
    scores: tuple[ImageScore, ...]
    row: image_strip.Row | None
    is_grey: bool


class RestoredImage(NamedTuple):
    """The images of one job for one input of a protocol: network input and output, float32, and the clean image."""

    degraded: Image
    restored: Image
    clean: Pixels


def score_images(images: Mapping[tuple[int, str], RestoredImage], job: EvalJob, settings: EvalSettings) -> ImageResult:
    """Score the restored and the degraded image of a job by every protocol."""
    scores, row, key = [], None, job.place.entry.key
    for protocol in settings.protocols:
        degraded, restored, clean = images[protocol.input(job.task)]
        quality, before = (protocols.score(protocol, each, clean) for each in (restored, degraded))
        scores.append(ImageScore(protocol.name, job.name, key, *quality, *before))
        if job.pictured and row is None:
            strips = (metrics.to_8bit(degraded), metrics.to_8bit(restored), clean)
            row = image_strip.Row(f"{job.name} {key}", tuple(image_strip.centre(i, _STRIP_PIXELS) for i in strips))
    return ImageResult(tuple(scores), row, is_grey=bool((clean == clean[..., :1]).all()))


class Scorer:
    """Scores images in threads while the network restores the next ones, a few images at most behind it."""

    def __init__(self, settings: EvalSettings) -> None:
        self._settings, self._threads = settings, min(_MOST_SCORING_THREADS, hardware.processes())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="scoring")
        self._waiting: deque[tuple[int, EvalJob, Future[ImageResult]]] = deque()
        self._results: dict[int, ImageResult] = {}

    def add(self, number: int, job: EvalJob, images: Mapping[tuple[int, str], RestoredImage]) -> None:
        """Queue the images of the job of this number. Raise the error of an earlier job."""
        while len(self._waiting) >= self._threads:
            self._take_oldest()
        self._waiting.append((number, job, self._pool.submit(score_images, images, job, self._settings)))

    def _take_oldest(self) -> None:
        number, job, future = self._waiting.popleft()
        with naming(job):
            self._results[number] = future.result()

    def results(self) -> dict[int, ImageResult]:
        """Wait for all jobs; return their results by number."""
        while self._waiting:
            self._take_oldest()
        return self._results

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def naming(job: EvalJob) -> Iterator[None]:
    """Name the job's image in UserErrors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{job.name}, image '{job.place.entry.key}': {error}") from None
