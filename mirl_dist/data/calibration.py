"""Training samples read one by one, out of the stream: for criteria that look at gradients between rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from mirl_dist.config.tasks import Task
from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.loader import location_of
from mirl_dist.data.manifest import Shard
from mirl_dist.data.sample import NumpyBatch, Patch, collate, make_patch
from mirl_dist.data.sampler import Slot
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.errors import Stopped, UserError


class CalibrationPatches:
    """Slots to patches, as training would see them."""

    def __init__(self, tasks: Sequence[Task], seed: int, patch_pixels: int, augment: str) -> None:
        self._tasks, self._seed, self._patch, self._augment = tuple(tasks), seed, patch_pixels, augment

    def of(self, slots: Sequence[Slot], supply: ShardPool, stop_asked: Callable[[], bool]) -> Iterator[NumpyBatch]:
        """A stack of one patch per slot, in the order of slots; each shard is brought once, one at a time, before the
        first is handed out. A damaged sample's place is taken by the next whole one. Raises UserError, and Stopped when
        asked to stop."""
        found: list[Patch | None] = [None] * len(slots)
        by_shard = sorted(range(len(slots)), key=lambda number: slots[number].shard)
        for shard_number, numbers in groupby(by_shard, key=lambda number: slots[number].shard):
            shard = supply.shards.train[shard_number]
            with supply.holding([shard]):
                local = supply.get(shard)
                for number in numbers:
                    if stop_asked():
                        raise Stopped("stopped as asked while reading samples to select by")
                    found[number] = self._patch_of(slots[number], shard, local)
        for patch in found:
            assert patch is not None
            yield collate([patch])

    def _patch_of(self, slot: Slot, shard: Shard, local: LocalShard) -> Patch:
        count = shard.samples
        whole = (n for n in ((slot.sample + step) % count for step in range(count)) if n not in local.bad)
        number = next(whole, None)
        if number is None:
            raise UserError(f"{shard.name} has no whole sample left to select by. Build or copy the shards again.")
        try:
            read = location_of(local, local.entries[number], slot)
            return make_patch(read, self._tasks[slot.task], self._seed, self._patch, self._augment)
        except OSError as error:
            raise UserError(f"{shard.name} cannot be read: {error}. Check the disk, then start again.") from None
