"""Reads training samples one by one, without the loader, for pruning criteria that need gradients between rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from mirl_dist.config.tasks import Task
from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import Shard
from mirl_dist.data.read_requests import location_of
from mirl_dist.data.sample import NumpyBatch, Patch, collate, make_patch
from mirl_dist.data.sampler import Slot
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.errors import Stopped, UserError


class CalibrationPatches:
    """Reads the patches of given sampler slots, identical to those of training."""

    def __init__(self, tasks: Sequence[Task], seed: int, patch_pixels: int, augment: str) -> None:
        self._tasks, self._seed, self._patch_pixels, self._augment = tuple(tasks), seed, patch_pixels, augment

    def of(self, slots: Sequence[Slot], pool: ShardPool, stop_asked: Callable[[], bool]) -> Iterator[NumpyBatch]:
        """Yield a batch of one patch for each slot, in the order of `slots`.

        All patches are read before the first batch is yielded, so that each shard is fetched only once and one at a
        time. A damaged sample is replaced by the next intact one of its shard. Raises UserError if a shard has no
        intact sample or cannot be read, and Stopped if `stop_asked` returns True.
        """
        patches: list[Patch | None] = [None] * len(slots)
        by_shard = sorted(range(len(slots)), key=lambda number: slots[number].shard)
        for shard_number, numbers in groupby(by_shard, key=lambda number: slots[number].shard):
            shard = pool.shards.train[shard_number]
            with pool.holding([shard]):
                local = pool.get(shard)
                for number in numbers:
                    if stop_asked():
                        raise Stopped("stopped as asked while reading samples to select by")
                    patches[number] = self._read_patch(slots[number], shard, local)
        for patch in patches:
            assert patch is not None
            yield collate([patch])

    def _read_patch(self, slot: Slot, shard: Shard, local: LocalShard) -> Patch:
        count = shard.samples
        whole = (n for n in ((slot.sample + step) % count for step in range(count)) if n not in local.damaged)
        number = next(whole, None)
        if number is None:
            raise UserError(f"{shard.name} has no whole sample left to select by. Build or copy the shards again.")
        try:
            location = location_of(local, local.entries[number], slot)
            return make_patch(location, self._tasks[slot.task], self._seed, self._patch_pixels, self._augment)
        except OSError as error:
            raise UserError(f"{shard.name} cannot be read: {error}. Check the disk, then start again.") from None
