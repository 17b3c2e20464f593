"""Reads the states of the other ranks, and decides which rank reports those missing from a collective."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from mirl_dist.distributed.flight_recorder import RankState, diagnose
from mirl_dist.distributed.live_store import StatusStore

READS = 5
"""Number of reads of the other ranks' states before a report."""
_SILENT_READS = 4  # reads without a new beat after which a process counts as silent


class PeerMonitor:
    """Reader of the other ranks' states, called once per period from shortly before this rank's timeout."""

    def __init__(self, store: StatusStore, rank: int, names: Sequence[str]) -> None:
        """names: one per rank, for messages."""
        self._store, self._rank, self._names = store, rank, names
        self._sequence, self._reads, self._turns_left = 0, 0, 0
        self._last_beats: dict[int, tuple[int, int]] = {}  # rank -> its last beat, and the read that found it first

    def read(self, own: RankState, *, overdue: bool) -> str | None:
        """Read all states once. Return a diagnosis if this rank is `overdue` and should report it, else None.

        The lowest rank waiting in the same collective reports. Other ranks report only if it has not done so after
        READS further reads.
        """
        if self._sequence != own.sequence:
            self._sequence, self._reads, self._turns_left, self._last_beats = own.sequence, 0, READS, {}
        self._reads += 1
        states = self._read_states()
        for rank, state in states.items():
            if self._last_beats.get(rank, (-1, 0))[0] != state.beat:
                self._last_beats[rank] = (state.beat, self._reads)
        if not overdue or self._reads < READS:
            return None
        silent = [rank for rank, (_, read) in self._last_beats.items() if self._reads - read >= _SILENT_READS]
        if self._rank > self._lowest_waiting(own, states, silent) and self._turns_left > 0:
            self._turns_left -= 1
            return None
        return diagnose(own, states, silent, self._names)

    def _read_states(self) -> dict[int, RankState]:
        others = [rank for rank in range(len(self._names)) if rank != self._rank]
        texts = self._store.get([str(rank) for rank in others])
        return {rank: RankState(*json.loads(text)) for rank, text in zip(others, texts, strict=True)}

    def _lowest_waiting(self, own: RankState, states: Mapping[int, RankState], silent: Collection[int]) -> int:
        """Return the lowest running rank that waits in the same collective; this rank if there is no other."""
        waiting = (r for r, s in states.items() if s.waiting and s.sequence == own.sequence and r not in silent)
        return min(waiting, default=self._rank)
