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

from mirl_dist.distributed.flight_recorder import FlightRecorder, RankState, describe_wait, diagnose
from mirl_dist.distributed.process_group import LiveStore
from mirl_dist.observability.console import rank_label, warn

READS = 5
"""Number of reads of the other ranks' states before a report."""
_SILENT_READS = 4  # reads without a new beat after which a process counts as silent
_PERIOD_SECONDS = 1.0
_PERIODS_BEFORE_EXIT = 2
_STOP, _REPORTED_BY = "stop", "verdict"
_AGAIN = "Start again: a run resumes from its last commit."


class _PeerMonitor:
    """Reader of the other ranks' states, called once per period from shortly before this rank's timeout."""

    def __init__(self, store: LiveStore, rank: int, names: Sequence[str]) -> None:
        self._store, self._rank, self._names = store, rank, names
        self._sequence, self._reads, self._turns_left = 0, 0, 0
        self._last_beats: dict[int, tuple[int, int]] = {}  # rank -> its last beat, and the read that found it first

    def read(self, own: RankState, *, overdue: bool) -> str | None:
        """Read all states once. Return a diagnosis if this rank is `overdue` and should report it, else None.

        The lowest running rank that waits in the same collective reports. Other ranks report only if it has not done so
        after READS further reads.
        """
        if self._sequence != own.sequence:
            self._sequence, self._reads, self._turns_left, self._last_beats = own.sequence, 0, READS, {}
        self._reads += 1
        others = [rank for rank in range(len(self._names)) if rank != self._rank]
        texts = self._store.get([str(rank) for rank in others])
        states = {rank: RankState(*json.loads(text)) for rank, text in zip(others, texts, strict=True)}
        for rank, state in states.items():
            if self._last_beats.get(rank, (-1, 0))[0] != state.beat:
                self._last_beats[rank] = (state.beat, self._reads)
        if not overdue or self._reads < READS:
            return None
        silent = [rank for rank, (_, read) in self._last_beats.items() if self._reads - read >= _SILENT_READS]
        waiting = (r for r, s in states.items() if s.waiting and s.sequence == own.sequence and r not in silent)
        if self._rank > min(waiting, default=self._rank) and self._turns_left > 0:
            self._turns_left -= 1
            return None
        return diagnose(own, states, silent, self._names)


class _StateExchange:
    """Publisher of this rank's state, and reader of stop requests and hang reports from any rank."""

    def __init__(
        self,
        recorder: FlightRecorder,
        store: LiveStore,
        rank: int,
        names: Sequence[str],
        timeout_seconds: float,
        period_seconds: float,
    ) -> None:
        self.stop_requested = self._stop_pending = False
        self.beat = 0
        """Number of completed exchanges with the store."""
        self.recorder, self.store, self._rank = recorder, store, rank
        self._timeout_seconds, self._period_seconds = timeout_seconds, period_seconds
        self._peers = _PeerMonitor(store, rank, names)

    def publish_first(self) -> None:
        """Write the initial value of every key that other ranks read."""
        if self._rank == 0:
            self.store.set(_STOP, "")
            self.store.set(_REPORTED_BY, "")
        self.store.set(str(self._rank), json.dumps(self.recorder.state()))

    def request_stop(self) -> None:
        self.stop_requested = self._stop_pending = True

    def exchange(self) -> str | None:
        """Publish this rank's state and read the shared keys once. Return None as long as no hang was reported.

        Then return the message with which this rank should exit; '' if it does not wait for the missing ranks.
        """
        own = self.recorder.state(self.beat)
        self.store.set(str(self._rank), json.dumps(own))
        if self._stop_pending:
            self.store.set(_STOP, "1")
            self._stop_pending = False
        stop, reported_by = self.store.get([_STOP, _REPORTED_BY])
        self.stop_requested = self.stop_requested or stop != b""
        if reported_by:
            waits = own.waiting and own.seconds > self._timeout_seconds / 2
            return f"waited too; rank {reported_by.decode()} has named the missing ranks" if waits else ""
        if own.waiting and own.seconds > self._timeout_seconds - (READS + 1) * self._period_seconds:
            diagnosis = self._peers.read(own, overdue=own.seconds >= self._timeout_seconds)
            if diagnosis is not None and self.recorder.state()[:3] == own[:3]:  # still waiting in that collective
                self.store.set(_REPORTED_BY, str(self._rank))
                return f"{diagnosis}. {_AGAIN}"
        self.beat += 1
        return None


class Watchdog:
    """Two threads of a rank: one exchanges states with the other ranks, one detects an unresponsive store."""

    def __init__(
        self,
        recorder: FlightRecorder,
        store: LiveStore,
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
        self._label, self._store_host, self._leave = rank_label(rank), store_host, leave
        self._timeout_seconds, self._period_seconds = timeout_seconds, period_seconds
        self._exchange = _StateExchange(recorder, store, rank, names, timeout_seconds, period_seconds)
        self.find_connection_error: Callable[[], str] = str
        """Returns the error of a collective in which the main thread waits forever, or ''. NCCL's; gloo raises its."""
        self._wake, self._closed = threading.Event(), threading.Event()
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
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * self._period_seconds)
        self._exchange.store.close()

    def request_stop(self) -> None:
        """Request a stop on all ranks without blocking."""
        self._exchange.request_stop()
        self._wake.set()

    def _run_exchange(self) -> None:
        try:
            while not self._closed.is_set():
                text = self._exchange.exchange()
                if text is not None:
                    if text:
                        self._terminate(text)
                    return
                self._wake.wait(self._period_seconds)
                self._wake.clear()
        except (RuntimeError, OSError):
            pass  # the store is gone: collectives with its host fail by themselves, or the other thread exits

    def _watch_store(self) -> None:
        """Exit if this rank waits past the timeout and the store is unresponsive (stopped process or lost node), or if
        a collective has failed in which the main thread would wait forever."""
        quiet, seen = 0, -1
        while not self._closed.wait(self._period_seconds):
            if error := self.find_connection_error():
                self._terminate(f"another rank has exited, or the network to it has failed (NCCL: {error}). {_AGAIN}")
                return
            quiet, seen = (quiet + 1 if self._exchange.beat == seen else 0), self._exchange.beat
            own = self._exchange.recorder.state()
            if own.waiting and own.seconds > self._timeout_seconds and quiet > READS:
                silent = f"{self._store_host}, through which ranks share their state, no longer responds"
                text = f"{describe_wait(own)}, and {silent}: it has exited or is stopped, or its node is down. {_AGAIN}"
                self._terminate(text)

    def _terminate(self, text: str) -> None:
        """Warn, and exit with code 1 after a delay in which other ranks can read the report; they may need this
        process for that, as the store's server. Do not exit if the watchdog is stopped first."""
        warn(f"mirl-dist, {self._label}: {text}")
        if not self._closed.wait(_PERIODS_BEFORE_EXIT * self._period_seconds):
            self._leave(1)
            self._closed.set()
