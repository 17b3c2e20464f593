"""A config's shards to live batches: store, cache, supply, stream."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import shard_cache_folder
from mirl_dist.data.cache import ShardCache
from mirl_dist.data.calibration import CalibrationPatches
from mirl_dist.data.loader import TrainLoader, passes_behind
from mirl_dist.data.manifest import Shard
from mirl_dist.data.parallel import distributed_map
from mirl_dist.data.prefetch import shards_ahead
from mirl_dist.data.resident_images import ResidentImages
from mirl_dist.data.sample import Batch
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, Position
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.data.shards import Shards
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import Stopped, UserError
from mirl_dist.evaluation import evaluate
from mirl_dist.observability import progress
from mirl_dist.observability.console import warn
from mirl_dist.storage import Folder
from mirl_dist.storage.retry import Patience


def shard_pool_of(config: Config, shards: Shards, who: str, stop_asked: Callable[[], bool]) -> ShardPool:
    """The shards of a config, through the node's cache where they are not read in place. who: for messages."""
    cache = None
    if config.data.cache.folder is not None or not isinstance(shards.store, Folder):
        folder = Path(config.data.cache.folder).expanduser() if config.data.cache.folder else shard_cache_folder()
        cache = ShardCache(folder, round(config.data.cache.gigabytes * 1e9))

    def say(line: str) -> None:
        warn(f"mirl-dist, {who}: {line}")

    patience = Patience(config.store.patience_seconds)
    return ShardPool(shards, cache, config.data.damage, say, stop_asked=stop_asked, patience=patience)


def check_damage(supply: ShardPool, jobs: Sequence[evaluate.EvalJob], ranks: Ranks, damage: str) -> None:
    """Raise UserError, on every rank, for damage in the shards that scores will come from, before any work is lost; in a
    folder also for indices of training shards that are not theirs. The ranks share the work."""
    shards = supply.shards
    if damage == "refuse" and isinstance(shards.store, Folder):
        distributed_map(ranks, partial(_read_index, shards), shards.train, 1, _silent, "reading indices")
    scored = {job.place.shard.name: job.place.shard for job in jobs}
    with progress.Bars() as bars:
        told = bars if ranks.is_main and supply.cache is not None else _silent
        distributed_map(ranks, supply.verify, list(scored.values()), 1, told, "checking evaluation shards")


def evaluation_looks_ahead(supply: ShardPool, jobs: Sequence[evaluate.EvalJob], ranks: Ranks) -> bool:
    """Whether the node's cache has room for two evaluation shards of every rank. Raises UserError if not for one."""
    if supply.cache is None or not jobs:
        return True
    limit, node_ranks = supply.cache.limit, _node_ranks(ranks)
    shards = {job.place.shard.name: job.place.shard.bytes for job in jobs}
    largest = max(shards.values())
    if sum(shards.values()) > limit and node_ranks * largest > limit:
        raise UserError(
            f"data.cache.gigabytes: found {limit / 1e9:g}, but {node_ranks} ranks on this node score evaluation shards "
            f"of up to {largest / 1e9:.3g} GB. Set it to {node_ranks * largest * 1.01 / 1e9:.3g} or more.",
            everywhere=True,
        )
    return sum(shards.values()) <= limit or 2 * node_ranks * largest <= limit


def _node_ranks(ranks: Ranks) -> int:
    """The most ranks on any node: the same number on every rank, so that all raise a UserError, or none."""
    return max(Counter(ranks.gather_objects(platform.node())).values())


def _read_index(shards: Shards, shard: Shard) -> None:
    shards.index(shard)


def _silent(done: int, total: int, what: str) -> None:
    pass


def resident_images_of(
    config: Config, supply: ShardPool, jobs: Sequence[evaluate.EvalJob], ranks: Ranks
) -> ResidentImages:
    """This rank's part of the images that are scored within rounds; none where that is not asked for. Raises UserError or
    Stopped, on every rank, where an image does not come to one of them."""
    few = evaluate.first_images(jobs, config.evaluate.curve_images) if config.evaluate.every_epochs is not None else []
    mine = [few[number].place for number in evaluate.assign_jobs(few, ranks.rank, ranks.world)]
    held, why, stopped = ResidentImages(), "", False
    try:
        held.read(supply, mine)
    except UserError as fault:
        why = str(fault)
    except Stopped:
        stopped = True
    told = ranks.gather_objects((why, stopped), what="gather of images to look at")
    if any(stopped for _, stopped in told):
        raise Stopped("stopped as asked before any step was trained")
    for text, _ in told:
        if text:
            raise UserError(text, everywhere=True)
    return held


def calibration_of(
    config: Config, supply: ShardPool, order: GlobalSampler, ranks: Ranks, stop_asked: Callable[[], bool]
) -> Callable[[int], Iterator[Batch]]:
    """The samples of a round's first global batches, for criteria that need gradients: round -> batches of one sample
    on this rank's device. The same for any number of ranks and any memory: one sample, one shard at a time."""
    patches = CalibrationPatches(order.tasks, config.run.seed, config.data.patch_pixels, config.data.augment)

    def batches(round_: int) -> Iterator[Batch]:
        places = islice(order.positions(Position(0, 0), config.train.epochs), config.prune.criterion_batches)
        slots = [slot for at in places for slot in order.slots(round_, at)]
        for stack in patches.of(slots, supply, stop_asked):
            yield Batch.of(stack, pin=False).to(ranks.device)

    return batches


def train_loader_of(
    config: Config, supply: ShardPool, order: GlobalSampler, shares: BatchSplit, ranks: Ranks
) -> TrainLoader:
    """The training batches of this rank. Raises UserError, on every rank, for a cache that is too small."""
    lanes = shares.per_rank * len(order.sources)
    limit = None if supply.cache is None else supply.cache.limit
    behind = passes_behind(config.data.workers)
    return TrainLoader(
        supply,
        order,
        seed=config.run.seed,
        patch_pixels=config.data.patch_pixels,
        augment=config.data.augment,
        workers=config.data.workers,
        rank=ranks.rank,
        shares=shares,
        ahead=shards_ahead(lanes, behind, order.steps_per_epoch, order.shards(), limit, _node_ranks(ranks)),
        pin=ranks.device.type == "cuda",
    )
