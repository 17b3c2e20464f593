"""What a reader will need soon: shards are wanted ahead of their first use, and released after their last."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from mirl_dist.data.manifest import Shard
from mirl_dist.data.sampler import Slot
from mirl_dist.errors import UserError

_SLOTS = 16384  # that are looked ahead at, at most: a few megabytes


def shards_ahead(
    lanes: int, behind: int, steps_per_epoch: int, shards: Sequence[Shard], limit: int | None, node_ranks: int
) -> int:
    """How many shards a rank may want beyond those in use: one for each lane, as far as the cache allows.

    lanes: places of walks that the rank reads at once; behind: passes for which shards are kept after their use; limit:
    bytes of the node's cache, None without one. Raises Fault for a cache in which the ranks of a node could wait for
    each other's room for ever.
    """
    wanted = min(len(shards), max(2, lanes))
    if limit is None or sum(s.bytes for s in shards) <= limit:
        return wanted
    largest, shortest = max(s.bytes for s in shards), min(s.samples for s in shards)
    # In `behind` passes a lane leaves shards that it has read, and begins elsewhere when an epoch begins.
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
    return min(wanted, fits - used)


class Window:
    """A view over the coming forward passes of one rank, moved on by `__next__`.

    A pass is handed out when its turn comes; the shards of the passes after it are wanted as soon as they are seen, as
    long as no more than `extra` shards are wanted beyond those in use; a pass's own shards are released when `behind`
    more passes have been handed out, since loader processes read later than passes are handed out.
    """

    def __init__(
        self,
        passes: Iterator[list[Slot]],
        want: Callable[[int], None],
        release: Callable[[int], None],
        *,
        behind: int,
        extra: int,
    ) -> None:
        """want, release: take the number of a training shard."""
        self._passes, self._want, self._release = passes, want, release
        self._behind, self._extra = behind, extra
        self._coming: deque[list[Slot]] = deque()
        self._gone: deque[set[int]] = deque()
        self._next: list[Slot] | None = None  # seen, and not wanted yet
        self._uses: Counter[int] = Counter()

    def __iter__(self) -> Window:
        return self

    def __next__(self) -> list[Slot]:
        while len(self._gone) > self._behind:
            self._forget(self._gone.popleft())
        self._look_ahead(at_least=1)
        if not self._coming:
            raise StopIteration
        now = self._coming.popleft()
        self._gone.append({slot.shard for slot in now})
        self._look_ahead(at_least=0)
        return now

    def lend(self, shard: int) -> None:
        """Want one more shard for the pass that was handed out last, and release it with that pass."""
        if shard not in self._gone[-1]:
            self._gone[-1].add(shard)
            self._use(shard)

    def close(self) -> None:
        """Release everything."""
        for shards in (*self._gone, *({slot.shard for slot in slots} for slots in self._coming)):
            self._forget(shards)
        self._gone.clear()
        self._coming.clear()

    def _look_ahead(self, at_least: int) -> None:
        """Want the shards of coming passes, of so many in any case."""
        used = set().union(*self._gone)
        while len(self._coming) < at_least or sum(map(len, self._coming)) < _SLOTS:
            if self._next is None:
                self._next = next(self._passes, None)
            if self._next is None:
                return
            shards = dict.fromkeys(slot.shard for slot in self._next)
            if len(self._coming) >= at_least and len((self._uses.keys() | shards.keys()) - used) > self._extra:
                return
            self._coming.append(self._next)
            self._next = None
            for shard in shards:
                self._use(shard)

    def _use(self, shard: int) -> None:
        self._uses[shard] += 1
        if self._uses[shard] == 1:
            self._want(shard)

    def _forget(self, shards: set[int]) -> None:
        for shard in shards:
            self._uses[shard] -= 1
            if self._uses[shard] == 0:
                del self._uses[shard]
                self._release(shard)
