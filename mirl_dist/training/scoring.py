"""Scores the network in training: on all images at the end of a round, on a few for validation during it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from torch import nn

from mirl_dist.data.resident_images import ResidentImages
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.evaluation.evaluate import EvalJob, EvalResult, EvalSettings, evaluate


@dataclass
class Evaluation:
    """The evaluation of a run on one rank: the images, their source, and the settings.

    first_jobs: the images that are scored during a round; resident: holds this rank's part of them in memory.
    look_ahead: whether the node's cache has room for two shards per rank.
    """

    ranks: Ranks
    pool: ShardPool
    jobs: list[EvalJob]
    settings: EvalSettings
    first_jobs: list[EvalJob]
    resident: ResidentImages
    look_ahead: bool
    stop: StopSignal

    def score_all(self, network: nn.Module) -> EvalResult:
        """Score every image. Raises Stopped on every rank if any was asked to stop."""
        return evaluate(network, self.pool, self.jobs, self.ranks, self.settings, self.look_ahead, self.stop)

    def score_first(self, network: nn.Module) -> EvalResult:
        """Score the first images of each 'task/set' by the headline protocol. Raises Stopped like `score_all`."""
        settings = self.settings._replace(protocols=self.settings.protocols[:1])
        return evaluate(network, self.resident, self.first_jobs, self.ranks, settings, False, self.stop)

    def curve_point(self, result: EvalResult) -> dict[str, float]:
        """Return 'task/set' -> mean PSNR in dB of its first images, by the headline protocol."""
        first = {(job.name, job.place.entry.key) for job in self.first_jobs}
        values: dict[str, list[float]] = {}
        for image in result.images:
            if image.protocol == self.settings.protocols[0].name and (image.name, image.image) in first:
                values.setdefault(image.name, []).append(image.psnr)
        return {name: fmean(psnr) for name, psnr in values.items()}
