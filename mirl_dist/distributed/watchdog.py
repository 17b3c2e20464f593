"""Detects hanging ranks: every rank publishes its state once a second, so the ranks that block others can be named.

A rank that waits too long in a collective names the missing ranks and exits; the launcher then restarts all ranks from
the last commit. The main thread only records its state (flight_recorder.py); threads do the rest.
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
    """Time limits in seconds. timeout: longest wait in a collective; period: interval between two exchanges."""

    timeout: float
    period: float


class _Terminator:
    """Exits this process with code 1, after a message and a delay in which other ranks can read its report."""

    def __init__(self, rank: int, delay_seconds: float, leave: Callable[[int], None]) -> None:
        self._rank, self._delay_seconds, self._leave = rank, delay_seconds, leave
        self.closed = threading.Event()
        """Set once the watchdog is stopped or has exited the process."""

    def terminate(self, text: str) -> None:
        """Warn and exit after the delay, unless the watchdog is stopped first. This process may serve the store."""
        warn(f"mirl-dist, {rank_label(self._rank)}: {text}")
        if not self.closed.wait(self._delay_seconds):
            self._leave(1)
            self.closed.set()


class _StateExchange:
    """Publisher of this rank's state, and reader of stop requests and hang reports from any rank."""

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
        """Number of completed exchanges with the store."""
        self._recorder, self._store, self._rank = recorder, store, rank
        self._limits, self._terminator = limits, terminator
        self._peers = PeerMonitor(store, rank, names)

    def publish_first(self) -> None:
        """Write the initial value of every key that other ranks read."""
        if self._rank == 0:
            self._store.set(_STOP, "")
            self._store.set(_REPORTED_BY, "")
        self._store.set(str(self._rank), json.dumps(self._recorder.state()))

    def request_stop(self) -> None:
        self.stop_requested = self._stop_pending = True

    def exchange(self) -> bool:
        """Publish this rank's state and read the shared keys once. Return False once a hang was reported."""
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
            if diagnosis is not None and self._recorder.state()[:3] == own[:3]:  # still waiting in that collective
                self._store.set(_REPORTED_BY, str(self._rank))
                self._terminator.terminate(f"{diagnosis}. {_AGAIN}")
        self.beat += 1
        return True


class Watchdog:
    """Two threads of a rank: one exchanges states with the other ranks, one detects an unresponsive store."""

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
        """names: one per rank, for messages. store_host: description of the process that serves the store. leave: exits
        this process immediately with a code."""
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
        """Whether a stop was requested on any rank."""
        return self._exchange.stop_requested

    def start(self) -> Watchdog:
        """Start both threads on every rank. A collective must follow, so that all ranks publish before any reads."""
        self._exchange.publish_first()
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)  # no thread may be inside the store at interpreter shutdown
        return self

    def stop(self) -> None:
        """Stop both threads and close the store connection."""
        self._terminator.closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * self._limits.period)
        self._store.close()

    def request_stop(self) -> None:
        """Request a stop on all ranks without blocking."""
        self._exchange.request_stop()
        self._wake.set()

    def _run_exchange(self) -> None:
        try:
            while not self._terminator.closed.is_set() and self._exchange.exchange():
                self._wake.wait(self._limits.period)
                self._wake.clear()
        except (RuntimeError, OSError):
            pass  # the store is gone: collectives with its host fail by themselves, or the other thread exits

    def _watch_store(self) -> None:
        """Exit if this rank waits past the timeout and the store is unresponsive (stopped process or lost node)."""
        quiet, seen = 0, -1
        while not self._terminator.closed.wait(self._limits.period):
            quiet, seen = (quiet + 1 if self._exchange.beat == seen else 0), self._exchange.beat
            own = self._recorder.state()
            if own.waiting and own.seconds > self._limits.timeout and quiet > READS:
                silent = f"{self._store_host}, through which ranks tell where they are, no longer responds"
                text = f"{describe_wait(own)}, and {silent}: it has ended or is stopped, or its node is gone. {_AGAIN}"
                self._terminator.terminate(text)
