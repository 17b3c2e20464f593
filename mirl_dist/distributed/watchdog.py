"""Detects ranks that hang: ranks publish once a second where they are, so that one that others wait for is named.

A rank that waits too long in a collective reports who has not reached it, and exits; its launcher starts all ranks
again from the last commit. The main thread only records where it is (flight_recorder.py); the rest is the work of
threads.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mirl_dist.distributed.flight_recorder import FlightRecorder, describe_wait
from mirl_dist.distributed.live_store import StatusStore
from mirl_dist.distributed.peers import READS, PeerMonitor
from mirl_dist.observability.console import rank_label, warn

_PERIOD_SECONDS = 1.0
_PERIODS_BEFORE_EXIT = 2
_STOP, _REPORTED_BY = "stop", "verdict"
_AGAIN = "Start again: a run resumes from its last commit."


class _Limits(NamedTuple):
    """timeout: seconds that a rank waits for the others; period: seconds between two exchanges."""

    timeout: float
    period: float


class _Terminator:
    """Ends this process with code 1, after a message and a delay in which other ranks can read that it has reported."""

    def __init__(self, rank: int, delay_seconds: float, leave: Callable[[int], None]) -> None:
        self._rank, self._delay_seconds, self._leave = rank, delay_seconds, leave
        self.closed = threading.Event()
        """Set when there is nothing to watch any more."""

    def terminate(self, text: str) -> None:
        """Warn and exit, unless the watchdog is stopped before; this process may serve the store for the others."""
        warn(f"mirl-dist, {rank_label(self._rank)}: {text}")
        if not self.closed.wait(self._delay_seconds):
            self._leave(1)
            self.closed.set()


class _StateExchange:
    """Publishes the state of this rank and reads whether any rank was asked to stop or has reported a hang."""

    def __init__(
        self,
        recorder: FlightRecorder,
        store: StatusStore,
        rank: int,
        names: Sequence[str],
        limits: _Limits,
        terminator: _Terminator,
    ) -> None:
        self.stop_requested = self._stop_pending = False
        self.beat = 0
        """How many exchanges the store has answered."""
        self._recorder, self._store, self._rank = recorder, store, rank
        self._limits, self._terminator = limits, terminator
        self._peers = PeerMonitor(store, rank, names)

    def publish_first(self) -> None:
        """Write every key that the others will read."""
        if self._rank == 0:
            self._store.set(_STOP, "")
            self._store.set(_REPORTED_BY, "")
        self._store.set(str(self._rank), json.dumps(self._recorder.state()))

    def request_stop(self) -> None:
        self.stop_requested = self._stop_pending = True

    def exchange(self) -> bool:
        """Write and read once. Returns False when this rank has nothing more to publish, for a hang was reported."""
        own = self._recorder.state(self.beat)
        self._store.set(str(self._rank), json.dumps(own))
        if self._stop_pending:
            self._store.set(_STOP, "1")
            self._stop_pending = False
        stop, reported_by = self._store.get([_STOP, _REPORTED_BY])
        self.stop_requested = self.stop_requested or stop != b""
        timeout = self._limits.timeout
        if reported_by:
            if own.waiting and own.seconds > timeout / 2:
                self._terminator.terminate(f"waited too; rank {reported_by.decode()} has named the missing ranks")
            return False
        if own.waiting and own.seconds > timeout - (READS + 1) * self._limits.period:
            diagnosis = self._peers.read(own, overdue=own.seconds >= timeout)
            if diagnosis is not None and self._recorder.state()[:3] == own[:3]:  # nobody came while this rank looked
                self._store.set(_REPORTED_BY, str(self._rank))
                self._terminator.terminate(f"{diagnosis}. {_AGAIN}")
        self.beat += 1
        return True


class Watchdog:
    """Two threads of a rank: one exchanges states with the others, one notices when the store does not answer."""

    def __init__(
        self,
        recorder: FlightRecorder,
        store: StatusStore,
        rank: int,
        names: Sequence[str],
        store_host: str,
        timeout_seconds: float,
        *,
        period_seconds: float = _PERIOD_SECONDS,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """names: of all ranks, for messages; store_host: the process that serves the store; leave: ends this process
        at once."""
        self._recorder, self._store, self._store_host = recorder, store, store_host
        self._limits = _Limits(timeout_seconds, period_seconds)
        self._terminator = _Terminator(rank, _PERIODS_BEFORE_EXIT * period_seconds, leave)
        self._exchange = _StateExchange(recorder, store, rank, names, self._limits, self._terminator)
        self._wake = threading.Event()
        self._threads = [
            threading.Thread(target=run, daemon=True, name="watch") for run in (self._run_exchange, self._watch_store)
        ]

    @property
    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop."""
        return self._exchange.stop_requested

    def start(self) -> Watchdog:
        """Start on every rank; a collective must follow, so that all have written before one reads."""
        self._exchange.publish_first()
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)  # a thread inside the store must not meet the end of Python
        return self

    def stop(self) -> None:
        """End both threads."""
        self._terminator.closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * self._limits.period)
        self._store.close()

    def request_stop(self) -> None:
        """Ask all ranks to stop; returns at once."""
        self._exchange.request_stop()
        self._wake.set()

    def _run_exchange(self) -> None:
        try:
            while not self._terminator.closed.is_set() and self._exchange.exchange():
                self._wake.wait(self._limits.period)
                self._wake.clear()
        except (RuntimeError, OSError):
            pass  # the store is gone: a rank that waits for its host fails by itself, or the other thread ends it

    def _watch_store(self) -> None:
        """Exit when the store does not answer while this rank waits: a stopped process serves it, or a lost node."""
        quiet, seen = 0, -1
        while not self._terminator.closed.wait(self._limits.period):
            quiet, seen = (quiet + 1 if self._exchange.beat == seen else 0), self._exchange.beat
            own = self._recorder.state()
            if own.waiting and own.seconds > self._limits.timeout and quiet > READS:
                silent = f"{self._store_host}, through which ranks tell where they are, no longer responds"
                text = f"{describe_wait(own)}, and {silent}: it has ended or is stopped, or its node is gone. {_AGAIN}"
                self._terminator.terminate(text)
