"""Scores of the network in training: all images at the end of a round, a few within it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from torch import nn

from mirl_dist.data.resident_images import ResidentImages
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.evaluation.evaluate import EvalJob, EvalResult, EvalSettings, evaluate, first_images


@dataclass
class Evaluation:
    """What is scored, how, and from where.

    curve_images: how many images of each score are scored within rounds, from `resident`, which holds them in memory;
    look_ahead: the node's cache has room for two shards of every rank.
    """

    ranks: Ranks
    pool: ShardPool
    jobs: list[EvalJob]
    settings: EvalSettings
    resident: ResidentImages
    curve_images: int
    look_ahead: bool
    stop: StopSignal

    def score_all(self, network: nn.Module) -> EvalResult:
        """Score every image. Raises Stopped on every rank when any was asked to stop."""
        return evaluate(network, self.pool, self.jobs, self.ranks, self.settings, self.look_ahead, self.stop)

    def score_first(self, network: nn.Module) -> EvalResult:
        """Score the first images of each score by the headline protocol. Raises Stopped as `score_all`."""
        settings = self.settings._replace(protocols=self.settings.protocols[:1])
        return evaluate(network, self.resident, self._first_jobs(), self.ranks, settings, False, self.stop)

    def curve_point(self, result: EvalResult) -> dict[str, float]:
        """The mean PSNR in dB of the first images of each score, by the headline protocol; 'task/set' -> mean."""
        first = {(job.name, job.place.entry.key) for job in self._first_jobs()}
        values: dict[str, list[float]] = {}
        for image in result.images:
            if image.protocol == self.settings.protocols[0].name and (image.name, image.image) in first:
                values.setdefault(image.name, []).append(image.psnr)
        return {name: fmean(psnr) for name, psnr in values.items()}

    def _first_jobs(self) -> list[EvalJob]:
        return first_images(self.jobs, self.curve_images)
