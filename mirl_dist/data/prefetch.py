"""Acquires the shards of a reader before their first use, and releases them after their last use."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from mirl_dist.data.manifest import Shard
from mirl_dist.data.sampler import Slot
from mirl_dist.errors import UserError

_SLOTS = 16384  # maximum window size in slots; takes a few megabytes
_PASSES_PER_FILL = 32  # so that the window grows while training runs, and the first batch of a round need not wait


def shards_ahead(
    lanes: int, behind: int, steps_per_epoch: int, shards: Sequence[Shard], limit: int | None, node_ranks: int
) -> int:
    """Return how many shards a rank may acquire beyond those in use: one per lane, if the cache has space for them.

    lanes: shards that the rank reads concurrently. behind: passes for which shards are kept after their use. limit:
    bytes of the node's cache; None without a cache. Raises UserError for a cache so small that the ranks of a node
    could deadlock waiting for space.
    """
    target = min(len(shards), max(2, lanes))
    if limit is None or sum(s.bytes for s in shards) <= limit:
        return target
    largest, shortest = max(s.bytes for s in shards), min(s.samples for s in shards)
    # Within `behind` passes, a lane moves to another shard at the end of a shard and at the start of an epoch.
    used = min(len(shards), lanes * (1 + math.ceil(behind / shortest) + math.ceil(behind / steps_per_epoch)))
    fits = limit // node_ranks // largest
    if fits <= used:
        raise UserError(
            f"data.cache.gigabytes: found {limit / 1e9:g}, but each of {node_ranks} ranks on this node needs "
            f"{used + 1} shards of up to {largest / 1e9:.3g} GB at a time. Set it to "
            f"{node_ranks * (used + 1) * largest * 1.01 / 1e9:.3g} or more, or build smaller shards "
            "(shard_megabytes in the recipe).",
            everywhere=True,
        )
    return min(target, fits - used)


class PrefetchWindow:
    """Iterates over the forward passes of one rank, acquiring the shards of upcoming passes.

    At most `extra` shards are held beyond those in use. The shards of a pass are released `behind` passes after it was
    returned, because loader processes read passes later than they are returned.
    """

    def __init__(
        self,
        passes: Iterator[list[Slot]],
        acquire: Callable[[int], None],
        release: Callable[[int], None],
        *,
        behind: int,
        extra: int,
    ) -> None:
        """acquire, release: called with the number of a training shard."""
        self._passes, self._acquire, self._release = passes, acquire, release
        self._behind, self._extra = behind, extra
        self._upcoming: deque[list[Slot]] = deque()
        self._handed_out: deque[set[int]] = deque()
        self._next: list[Slot] | None = None  # read from `passes`, its shards not acquired yet
        self._uses: Counter[int] = Counter()

    def __iter__(self) -> PrefetchWindow:
        return self

    def __next__(self) -> list[Slot]:
        while len(self._handed_out) > self._behind:
            self._drop_uses(self._handed_out.popleft())
        self._fill(at_least=1)
        if not self._upcoming:
            raise StopIteration
        slots = self._upcoming.popleft()
        self._handed_out.append({slot.shard for slot in slots})
        self._fill(at_least=0)
        return slots

    def acquire_extra(self, shard: int) -> None:
        """Acquire one more shard for the pass returned last; it is released with that pass."""
        if shard not in self._handed_out[-1]:
            self._handed_out[-1].add(shard)
            self._add_use(shard)

    def close(self) -> None:
        """Release all shards."""
        for shards in (*self._handed_out, *({slot.shard for slot in slots} for slots in self._upcoming)):
            self._drop_uses(shards)
        self._handed_out.clear()
        self._upcoming.clear()

    def _fill(self, at_least: int) -> None:
        """Acquire the shards of upcoming passes; those of the first `at_least` passes even if that exceeds `extra`.

        The window grows by _PASSES_PER_FILL passes at most.
        """
        used = set().union(*self._handed_out)
        for _ in range(_PASSES_PER_FILL):
            if len(self._upcoming) >= at_least and sum(map(len, self._upcoming)) >= _SLOTS:
                return
            if self._next is None:
                self._next = next(self._passes, None)
            if self._next is None:
                return
            shards = dict.fromkeys(slot.shard for slot in self._next)
            if len(self._upcoming) >= at_least and len((self._uses.keys() | shards.keys()) - used) > self._extra:
                return
            self._upcoming.append(self._next)
            self._next = None
            for shard in shards:
                self._add_use(shard)

    def _add_use(self, shard: int) -> None:
        self._uses[shard] += 1
        if self._uses[shard] == 1:
            self._acquire(shard)

    def _drop_uses(self, shards: set[int]) -> None:
        for shard in shards:
            self._uses[shard] -= 1
            if self._uses[shard] == 0:
                del self._uses[shard]
                self._release(shard)
