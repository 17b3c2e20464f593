"""Who waits for whom: ranks tell each other once a second where they stand, so that one that hangs or is slow is named.

A rank that waits too long in a meeting says who has not come, and ends; its launcher starts all again from the last
commit. The main thread only writes down where it is: what is told and judged is the work of threads.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mirl_dist.distributed.flight_recorder import FlightRecorder, RankState, diagnose, waited
from mirl_dist.observability.console import rank_here, warn

_PERIOD_SECONDS = 1.0
_LOOKS = 5  # at the others before one is judged
_SILENT_LOOKS = 4  # without a beat: its process does not run
_LAST_PERIODS = 2
_STOP, _VERDICT = "stop", "verdict"
_AGAIN = "Start again: a run goes on from its last commit."


class StatusStore(Protocol):
    """What all ranks can write on and read. A board that is gone raises RuntimeError or OSError; one may block.

    get: what stands under some keys, which have all been set.
    """

    def set(self, key: str, value: str) -> None: ...
    def get(self, keys: list[str]) -> list[bytes]: ...
    def close(self) -> None: ...


class LiveStore:
    """A board over a store at host:port, which is not asked any more once its server has closed the connection.

    Torch prints a page of C++ frames when it meets a dead server, so a connection of our own minds that.
    """

    def __init__(self, store: Any, host: str, port: int) -> None:
        self._store = store
        self._line = socket.create_connection((host, port), timeout=60)
        self._line.setblocking(False)

    def _check_alive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self._line.recv(1):
                raise ConnectionResetError("the store has closed the connection")

    def set(self, key: str, value: str) -> None:
        self._check_alive()
        self._store.set(key, value)

    def get(self, keys: list[str]) -> list[bytes]:
        self._check_alive()
        found: list[bytes] = self._store.multi_get(keys)
        return found

    def close(self) -> None:
        self._line.close()


class Watchdog:
    """Two threads of a rank. One tells where it stands and hears the others; the other minds that the first can."""

    def __init__(
        self,
        meetings: FlightRecorder,
        board: StatusStore,
        rank: int,
        names: Sequence[str],
        home: str,
        timeout_seconds: float,
        *,
        period_seconds: float = _PERIOD_SECONDS,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """names: of all ranks, for messages; home: where the board lives; leave: ends the process at once."""
        self.stop_requested = False
        self._meetings, self._board, self._rank, self._names, self._home = meetings, board, rank, names, home
        self._timeout, self._period, self._leave = timeout_seconds, period_seconds, leave
        self._beat, self._stop_pending, self._wake, self._ended = 0, False, threading.Event(), threading.Event()
        self._looking_at, self._looks, self._late = 0, 0, 0
        self._last_beats: dict[int, tuple[int, int]] = {}
        self._threads = [
            threading.Thread(target=run, daemon=True, name="watch") for run in (self._run_exchange, self._watch_store)
        ]

    def start(self) -> Watchdog:
        """To be called by every rank; afterwards the ranks meet, so that all have written before one reads."""
        if self._rank == 0:
            self._board.set(_STOP, "")
            self._board.set(_VERDICT, "")
        self._board.set(str(self._rank), json.dumps(self._meetings.state()))
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)  # a thread inside the store must not meet the end of Python
        return self

    def stop(self) -> None:
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * self._period)
        self._board.close()

    def request_stop(self) -> None:
        """Ask all ranks to stop; returns at once."""
        self.stop_requested = self._stop_pending = True
        self._wake.set()

    def _run_exchange(self) -> None:
        try:
            while not self._ended.is_set() and self._exchange():
                self._wake.wait(self._period)
                self._wake.clear()
        except (RuntimeError, OSError):
            pass  # the board is gone: a rank that waits for its keeper fails by itself, or is minded

    def _exchange(self) -> bool:
        """False when there is nothing more to tell."""
        mine = self._meetings.state(self._beat)
        self._board.set(str(self._rank), json.dumps(mine))
        if self._stop_pending:
            self._board.set(_STOP, "1")
            self._stop_pending = False
        stop, said_by = self._board.get([_STOP, _VERDICT])
        self.stop_requested = self.stop_requested or stop != b""
        if said_by:
            if mine.waiting and mine.seconds > self._timeout / 2:
                self._end(f"waited too; rank {said_by.decode()} has said for whom")
            return False
        if mine.waiting and mine.seconds > self._timeout - (_LOOKS + 1) * self._period:
            self._look(mine)
        self._beat += 1
        return True

    def _look(self, mine: RankState) -> None:
        """At the others, shortly before this rank has waited too long and from then on."""
        if self._looking_at != mine.sequence:
            self._looking_at, self._looks, self._late, self._last_beats = mine.sequence, 0, 0, {}
        self._looks += 1
        others = [rank for rank in range(len(self._names)) if rank != self._rank]
        said = zip(others, self._board.get([str(rank) for rank in others]), strict=True)
        standings = {rank: RankState(*json.loads(words)) for rank, words in said}
        for rank, standing in standings.items():
            if self._last_beats.get(rank, (-1, 0))[0] != standing.beat:
                self._last_beats[rank] = (standing.beat, self._looks)
        if mine.seconds >= self._timeout and self._looks >= _LOOKS:
            self._judge(mine, standings)

    def _judge(self, mine: RankState, others: dict[int, RankState]) -> None:
        """Say who has not come, and end; the lowest rank that waits here says it, others only when it does not."""
        self._late += 1
        silent = [rank for rank, (_, at) in self._last_beats.items() if self._looks - at >= _SILENT_LOOKS]
        here = [
            r for r, other in others.items() if other.waiting and other.sequence == mine.sequence and r not in silent
        ]
        if self._rank > min(here, default=self._rank) and self._late <= _LOOKS:
            return
        if self._meetings.state()[:3] == mine[:3]:  # nobody came while this rank looked
            self._board.set(_VERDICT, str(self._rank))
            self._end(f"{diagnose(mine, others, silent, self._names)}. {_AGAIN}")

    def _watch_store(self) -> None:
        """When the board does not answer: for a stopped process holds it, or a node that is gone."""
        quiet, seen = 0, -1
        while not self._ended.wait(self._period):
            quiet, seen = (quiet + 1 if self._beat == seen else 0), self._beat
            mine = self._meetings.state()
            if mine.waiting and mine.seconds > self._timeout and quiet > _LOOKS:
                keeper = f"{self._home}, through which ranks tell where they are, does not answer any more"
                self._end(f"{waited(mine)}, and {keeper}: it has ended or is stopped, or its node is gone. {_AGAIN}")

    def _end(self, text: str) -> None:
        """Not at once: this process may keep the board, on which others have yet to read that this one has spoken."""
        warn(f"mirl-dist, {rank_here(self._rank)}: {text}")
        if not self._ended.wait(_LAST_PERIODS * self._period):
            self._leave(1)
            self._ended.set()
