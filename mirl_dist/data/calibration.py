"""Reads training samples one by one, beside the loader: for criteria that need gradients between rounds."""

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
    """Turns slots of the sampler into patches, as training would see them."""

    def __init__(self, tasks: Sequence[Task], seed: int, patch_pixels: int, augment: str) -> None:
        self._tasks, self._seed, self._patch_pixels, self._augment = tuple(tasks), seed, patch_pixels, augment

    def of(self, slots: Sequence[Slot], pool: ShardPool, stop_asked: Callable[[], bool]) -> Iterator[NumpyBatch]:
        """Batches of one patch per slot, in the order of slots.

        Each shard is fetched once, one at a time, before the first batch is yielded. The next whole sample replaces a
        damaged one. Raises UserError, and Stopped when asked to stop.
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
