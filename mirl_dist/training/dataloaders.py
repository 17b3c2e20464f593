"""Opens the data of a run: its shard pool and cache, the training loader, the images to score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from torch import nn

from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import shard_cache_folder
from mirl_dist.config.schema_training import EvaluateSection
from mirl_dist.data.cache import ShardCache
from mirl_dist.data.loader import TrainLoader, passes_behind
from mirl_dist.data.manifest import Shard
from mirl_dist.data.parallel import distributed_map
from mirl_dist.data.prefetch import shards_ahead
from mirl_dist.data.sample import PatchReader
from mirl_dist.data.sampler import GlobalSampler
from mirl_dist.data.shard_pool import ResidentImages, ShardPool
from mirl_dist.data.shards import Shards
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import Stopped, UserError
from mirl_dist.evaluation.evaluate import EvalResult, assign_jobs, evaluate, first_images
from mirl_dist.evaluation.protocols import PROTOCOLS
from mirl_dist.evaluation.scorer import EvalJob, EvalSettings
from mirl_dist.observability.console import rank_label, warn
from mirl_dist.observability.progress import Bars
from mirl_dist.storage import Folder
from mirl_dist.storage.retry import Patience
from mirl_dist.training.preflight import RunPlan


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


class RunInputs(NamedTuple):
    """The data sources of a run on one rank."""

    pool: ShardPool
    loader: TrainLoader
    evaluation: Evaluation


def open_inputs(plan: RunPlan, ranks: Ranks, stop: StopSignal) -> RunInputs:
    """Open and check the data sources of a run.

    Raises UserError, on every rank, for damage and for a cache that is too small; Stopped, on every rank, if any was
    asked to stop meanwhile.
    """
    config = plan.config
    pool = shard_pool_of(config, plan.shards, rank_label(ranks.rank), stop)
    loader = train_loader_of(plan, pool, ranks)
    look_ahead = evaluation_looks_ahead(pool, plan.jobs, ranks)
    check_damage(pool, plan.jobs, ranks, config.data.damage)
    first = first_images(plan.jobs, config.evaluate.curve_images if config.evaluate.every_epochs is not None else 0)
    resident, settings = resident_images_of(first, pool, ranks), eval_settings_of(config.evaluate)
    evaluation = Evaluation(ranks, pool, plan.jobs, settings, first, resident, look_ahead, stop)
    return RunInputs(pool, loader, evaluation)


def eval_settings_of(section: EvaluateSection) -> EvalSettings:
    """Return the settings for restoring and scoring images."""
    protocols = tuple(PROTOCOLS[name] for name in section.protocols)
    own = section.model_dump(include={"seed", "tile_pixels", "tile_overlap", "precision", "compile"})
    return EvalSettings(protocols, **own)


def shard_pool_of(config: Config, shards: Shards, rank_name: str, stop_requested: Callable[[], bool]) -> ShardPool:
    """Return the shard pool. Remote shards, or all if data.cache.folder is set, go through the node's cache.

    rank_name: for messages.
    """
    section, cache = config.data.cache, None
    if section.folder is not None or not isinstance(shards.store, Folder):
        cache = ShardCache(shard_cache_folder(section.folder), round(section.gigabytes * 1e9))
    return ShardPool(
        shards,
        cache,
        config.data.damage,
        lambda line: warn(f"mirl-dist, {rank_name}: {line}"),
        stop_asked=stop_requested,
        patience=Patience(config.store.patience_seconds),
    )


def train_loader_of(plan: RunPlan, pool: ShardPool, ranks: Ranks) -> TrainLoader:
    """Return the training loader of this rank. Raises UserError, on every rank, for a cache that is too small."""
    data, sampler, split = plan.config.data, plan.sampler, plan.batch_split
    lanes, behind = split.per_rank * len(sampler.sources), passes_behind(data.workers)
    limit = None if pool.cache is None else pool.cache.limit
    return TrainLoader(
        pool,
        sampler,
        patch_reader_of(plan.config, sampler),
        workers=data.workers,
        rank=ranks.rank,
        split=split,
        ahead=shards_ahead(
            lanes, behind, sampler.steps_per_epoch, sampler.shards(), limit, _most_ranks_on_a_node(ranks)
        ),
        pin=ranks.device.type == "cuda",
    )


def patch_reader_of(config: Config, sampler: GlobalSampler) -> PatchReader:
    return PatchReader(sampler.tasks, config.run.seed, config.data.patch_pixels, config.data.augment)


def check_damage(pool: ShardPool, jobs: Sequence[EvalJob], ranks: Ranks, damage: str) -> None:
    """Verify the evaluation shards before training, and the indices of training shards if they are in a local folder.

    The indices are checked only with damage='refuse'. The ranks share the work. Raises UserError, on every rank, for
    damage.
    """
    shards = pool.shards

    def read_index(shard: Shard) -> None:
        shards.index(shard)

    if damage == "refuse" and isinstance(shards.store, Folder):
        distributed_map(ranks, read_index, shards.train, 1, _no_progress, "reading indices")
    evaluation_shards = list({job.place.shard.name: job.place.shard for job in jobs}.values())
    with Bars() as bars:
        progress = bars if ranks.is_main and pool.cache is not None else _no_progress
        distributed_map(ranks, pool.verify, evaluation_shards, 1, progress, "checking evaluation shards")


def evaluation_looks_ahead(pool: ShardPool, jobs: Sequence[EvalJob], ranks: Ranks) -> bool:
    """Return whether the node's cache has room for two evaluation shards per rank. Raises UserError if not for one."""
    if pool.cache is None or not jobs:
        return True
    limit, node_ranks = pool.cache.limit, _most_ranks_on_a_node(ranks)
    shards = {job.place.shard.name: job.place.shard.bytes for job in jobs}
    largest = max(shards.values())
    if sum(shards.values()) > limit and node_ranks * largest > limit:
        raise UserError(
            f"data.cache.gigabytes: found {limit / 1e9:g}, but {node_ranks} ranks on this node score evaluation shards "
            f"of up to {largest / 1e9:.3g} GB. Set it to {node_ranks * largest * 1.01 / 1e9:.3g} or more.",
            everywhere=True,
        )
    return sum(shards.values()) <= limit or 2 * node_ranks * largest <= limit


def resident_images_of(jobs: Sequence[EvalJob], pool: ShardPool, ranks: Ranks) -> ResidentImages:
    """Load this rank's part of the images that are scored during rounds into memory.

    Raises UserError, on every rank, if any rank cannot read an image; Stopped, on every rank, if any was asked to stop.
    """
    images, stopped, error_text = ResidentImages(), False, ""
    try:
        images.read(pool, [jobs[number].place for number in assign_jobs(jobs, ranks.rank, ranks.world)])
    except UserError as error:
        error_text = str(error)
    except Stopped:
        stopped = True
    stops, texts = zip(*ranks.gather_objects((stopped, error_text), what="gather of images to look at"), strict=True)
    if any(stops):
        raise Stopped("stopped on request before any step was trained")
    if any(texts):
        raise UserError(next(filter(None, texts)), everywhere=True)
    return images


def _most_ranks_on_a_node(ranks: Ranks) -> int:
    """Return the largest number of ranks on any node: equal on every rank, so that either all ranks raise or none."""
    return max(Counter(ranks.hosts).values())


def _no_progress(done: int, total: int, what: str) -> None:
    pass
