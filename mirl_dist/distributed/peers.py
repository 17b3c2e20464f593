"""Reads where the other ranks are, and decides which rank reports that some have not reached a collective."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from mirl_dist.distributed.flight_recorder import RankState, diagnose
from mirl_dist.distributed.live_store import StatusStore

READS = 5
"""How often the others are read before a report."""
_SILENT_READS = 4  # without a new beat: the process does not run


class PeerMonitor:
    """The states of the other ranks, read once a period from shortly before this rank has waited too long."""

    def __init__(self, store: StatusStore, rank: int, names: Sequence[str]) -> None:
        """names: of all ranks, for messages."""
        self._store, self._rank, self._names = store, rank, names
        self._sequence, self._reads, self._turns_left = 0, 0, 0
        self._last_beats: dict[int, tuple[int, int]] = {}  # rank -> its last beat, and the read that found it first

    def read(self, own: RankState, *, overdue: bool) -> str | None:
        """Read all states once. Returns the diagnosis when this rank is `overdue` and the one to report it, else None.

        The lowest rank that waits in the same collective reports; others do only when it has not for a while.
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
        """The lowest rank that waits in the collective of this one and whose process runs; this one without others."""
        waiting = (r for r, s in states.items() if s.waiting and s.sequence == own.sequence and r not in silent)
        return min(waiting, default=self._rank)
