"""Turns sampler slots into reads of local shards, replacing each damaged sample by the next intact one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import CLEAN, DEGRADED, SampleEntry, Shard
from mirl_dist.data.mixture import Source
from mirl_dist.data.prefetch import PrefetchWindow
from mirl_dist.data.sample import Member, SampleLocation
from mirl_dist.data.sampler import Slot
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.errors import Stopped, UserError


class ReadRequest(NamedTuple):
    """A sample to read, the slot it fills, and whether it replaces a damaged sample."""

    location: SampleLocation
    slot: Slot
    is_replacement: bool


class FailedRead(NamedTuple):
    """A failed read and its problem. transient: a system error, not damaged data."""

    request: ReadRequest
    problem: str
    transient: bool


class RequestStream:
    """Iterates over the forward passes of a prefetch window, as lists of read requests.

    If a stop is requested while waiting for a shard, the stream ends and keeps the exception in `stopped`. Batches that
    are ready are still trained on, so that all ranks may reach the step at which they commit.
    """

    def __init__(
        self, pool: ShardPool, window: PrefetchWindow, sources: Sequence[Source], damaged: dict[str, str]
    ) -> None:
        """damaged: filled with 'shard' or 'shard key' -> problem, for everything that is skipped."""
        self._pool, self._window, self._sources, self._damaged = pool, window, sources, damaged
        self._train = pool.shards.train
        self.stopped: Stopped | None = None

    def __iter__(self) -> Iterator[list[ReadRequest]]:
        try:
            for slots in self._window:
                yield [self.request(slot) for slot in slots]
        except Stopped as stopped:
            self.stopped = stopped

    def request(self, slot: Slot) -> ReadRequest:
        """Return the read of a slot's sample, or of the next intact one if that sample is known to be damaged."""
        number = self._find_whole_sample(slot.shard, slot.sample)
        if number is not None:
            return self._request_sample(slot.shard, number, slot, is_replacement=number != slot.sample)
        return self._request_elsewhere(slot)

    def mark_damaged(self, failed: FailedRead) -> None:
        """Record the sample of a failed read as damaged in the pool. Raises UserError if damage is refused."""
        shard = self._shard_of(failed)
        with self._pool.holding([shard]):
            local = self._pool.get(shard)
            key = failed.request.location.key
            number = next(i for i, entry in enumerate(local.entries) if entry.key == key)
            self._pool.mark_damaged(local, number, failed.problem)

    def refetch(self, failed: FailedRead) -> None:
        """Fetch the shard of a failed read again."""
        self._pool.refetch(self._shard_of(failed))

    def _find_whole_sample(self, shard: int, sample: int) -> int | None:
        """Return the number of the first intact sample of a shard from `sample` on, cyclically; None without any."""
        local, count = self._pool.get(self._train[shard]), self._train[shard].samples
        for step in range(count):
            number = (sample + step) % count
            if number not in local.damaged:
                return number
            key = f" {local.entries[number].key}" if local.entries else ""
            self._damaged[local.shard.name + key] = local.damaged[number]
        return None

    def _request_elsewhere(self, slot: Slot) -> ReadRequest:
        """Return the read of a slot whose shard has no intact sample, from the source's next shard that has one."""
        source = next(s for s in self._sources if slot.task in s.task_cycle and slot.shard in s.shards)
        at = source.shards.index(slot.shard)
        for other in (*source.shards[at + 1 :], *source.shards[:at]):
            self._window.acquire_extra(other)
            number = self._find_whole_sample(other, slot.sample % self._train[other].samples)
            if number is not None:
                return self._request_sample(other, number, slot, is_replacement=True)
        raise UserError(
            f"data.damage: no shard of {source.name} has a whole sample left. Build or copy the shards again."
        )

    def _request_sample(self, shard: int, number: int, slot: Slot, is_replacement: bool) -> ReadRequest:
        local = self._pool.get(self._train[shard])
        return ReadRequest(location_of(local, local.entries[number], slot), slot, is_replacement)

    def _shard_of(self, failed: FailedRead) -> Shard:
        return next(s for s in self._train if s.name == failed.request.location.shard)


def location_of(local: LocalShard, entry: SampleEntry, slot: Slot) -> SampleLocation:
    """Return the location of a sample, with the task, round and pass of a slot."""
    clean, degraded = entry.image(CLEAN), entry.image(DEGRADED)
    assert clean is not None, "manifest.read_index lets no sample through without a clean image"
    return SampleLocation(
        str(local.path),
        local.shard.name,
        entry.key,
        entry.height,
        entry.width,
        Member(clean[0], clean[1].offset, clean[1].size),
        None if degraded is None else Member(degraded[0], degraded[1].offset, degraded[1].size),
        slot.task,
        slot.round_,
        slot.pass_index,
    )
