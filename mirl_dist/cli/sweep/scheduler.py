"""Runs a sweep's runs as processes on this machine, a few at a time, each with its share of GPUs and processors."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.live import Live

from mirl_dist.cli.sweep.spec import SweepPlan, SweepRun, arguments
from mirl_dist.cli.sweep.status import RunStatus, State, make_table, read_status
from mirl_dist.distributed.signals import INTERRUPTED, RESUMABLE, record_signals
from mirl_dist.errors import UserError
from mirl_dist.observability.console import say, warn

_POLL_SECONDS, _READ_SECONDS = 0.2, 2.0
_GRACE_SECONDS = 20.0  # `train --launch` needs time to end its ranks


def _open_log(log: Path) -> BinaryIO:
    try:
        return open(log, "ab")
    except OSError as error:
        text = f"folder: {log} cannot be written: {error.strerror}"
        raise UserError(f"{text}. Put {log.parent} right, or choose another place.") from None


class Scheduler:
    """Starts the unfinished runs of a plan, one in each free slot.

    A run that another launch is training is not started until that launch has ended without finishing it. Progress is
    shown as a live table on a terminal, elsewhere as lines. environments: environment variables of each slot.
    statuses: run name -> status.
    """

    def __init__(self, plan: SweepPlan, environments: list[dict[str, str]]) -> None:
        self.statuses = {run.name: read_status(run) for run in plan.runs}
        self._plan, self._environments = plan, environments
        self._waiting = [run for run in plan.runs if self.statuses[run.name].state != "finished"]
        self._slots: dict[int, tuple[SweepRun, subprocess.Popen[bytes]]] = {}  # the runs started here, by slot
        self._last_signs: dict[str, tuple[bytes, float]] = {}
        self._read_at = time.monotonic()
        self._console = Console(stderr=True)

    def work(self, lost: Callable[[], bool]) -> int | None:
        """Train until all runs have ended.

        Returns None, 75 if a stop was requested, or 130 if a second Ctrl-C ended the runs immediately. lost: whether
        another sweep has taken over this one, which then stops. Raises UserError if a log cannot be written, after the
        started runs have ended.
        """
        stopping, fault = False, None
        table = functools.partial(make_table, self._plan, self.statuses)
        live = Live(console=self._console, get_renderable=table, refresh_per_second=2)
        with live if self._console.is_terminal else contextlib.nullcontext(), record_signals() as signals:
            while self._waiting or self._slots:
                self._collect_ended(stopping)
                if signals.count(signal.SIGINT) > 1:
                    self._kill()
                    return INTERRUPTED
                if not stopping and (signals or lost()):
                    stopping = True
                    self._ask_to_stop(signal.Signals(signals[0]).name if signals else "another sweep works here")
                if not stopping:
                    try:
                        self._start_runs()
                    except UserError as error:
                        stopping, fault = True, error
                        self._ask_to_stop("a log cannot be written")
                self._read_statuses()
                time.sleep(_POLL_SECONDS)
        if fault is not None:
            raise fault
        return RESUMABLE if stopping else None

    def _start_runs(self) -> None:
        """Start a run in each free slot."""
        for done in [run for run in self._waiting if self.statuses[run.name].state == "finished"]:
            self._waiting.remove(done)
            self._set_state(done, "finished", "by another launch")
        for slot in sorted(set(range(self._plan.sweep.slots)) - self._slots.keys()):
            run = next((run for run in self._waiting if not self._is_trained_elsewhere(run)), None)
            if run is None:
                return
            self._waiting.remove(run)
            log = self._plan.log(run)
            with _open_log(log) as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "mirl_dist", *arguments(self._plan, run)],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=os.environ | self._environments[slot],
                    start_new_session=True,  # Ctrl-C reaches only this process, which forwards it
                )
            self._slots[slot] = run, process
            self._set_state(run, "running", f"pid {process.pid}, log {log}")

    def _is_trained_elsewhere(self, run: SweepRun) -> bool:
        """Return whether another launch is training a run: its lease was renewed recently."""
        status, now = self.statuses[run.name], time.monotonic()
        if status.state != "running":
            return False
        if run.name not in self._last_signs:
            warn(f"mirl-dist: {run.name} is trained by another launch ({status.who}); waiting for its end")
        sign, since = self._last_signs.get(run.name, (None, now))
        if sign != status.sign:
            since = now
        self._last_signs[run.name] = status.sign, since
        return now - since <= run.config.store.lease_seconds  # afterwards, our launch may take over

    def _collect_ended(self, stopping: bool) -> None:
        """Free the slots of ended runs, and record how they ended."""
        for slot, (run, process) in list(self._slots.items()):
            code = process.poll()
            if code is None:
                continue
            del self._slots[slot]
            status = self.statuses[run.name] = self._read_status(run)
            if code == 0:
                self._set_state(run, "finished", "" if status.psnr is None else f"{status.psnr:.2f} dB")
            elif code == RESUMABLE or (stopping and code in (-signal.SIGTERM, -signal.SIGINT)):
                self._set_state(run, "stopped", "resumes with the next start of the sweep")
            elif code == 2 and status.state == "running" and not stopping:
                self._waiting.append(run)  # another launch acquired it first, and is training it
            else:
                ending = f"killed by signal {-code}" if code < 0 else f"code {code}"
                self._set_state(run, "failed", f"{ending}, log {self._plan.log(run)}")

    def _ask_to_stop(self, why: str) -> None:
        names = ", ".join(run.name for run, _ in self._slots.values()) or "no run"
        more = "again" if why == "SIGINT" else "twice"
        warn(f"mirl-dist: {why}: {names} asked to stop; press Ctrl-C {more} to kill them.")
        self._waiting.clear()
        self._send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        """End the runs immediately: repeat SIGINT, on which they end all their ranks; after a grace period, SIGKILL."""
        deadline = time.monotonic() + _GRACE_SECONDS
        for _ in range(3):
            self._send_signal(signal.SIGINT)
            time.sleep(2 * _POLL_SECONDS)
        while any(process.poll() is None for _, process in self._slots.values()):
            if time.monotonic() > deadline:
                for _, process in self._slots.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        for run, _ in self._slots.values():
            self._set_state(run, "stopped", "ended at once")

    def _send_signal(self, number: int) -> None:
        for _, process in self._slots.values():
            process.send_signal(number)  # does nothing if the process has ended

    def _set_state(self, run: SweepRun, state: State, why: str = "") -> None:
        """Record the new state of a run, and print it. why: a reason, printed with it."""
        self.statuses[run.name] = self.statuses[run.name]._replace(state=state, step=None, steps=None)
        if not self._console.is_terminal or state == "failed":
            say(f"{run.name}: {state}{f' ({why})' if why else ''}")

    def _read_statuses(self) -> None:
        """Update the status of running runs, at most every few seconds."""
        if time.monotonic() - self._read_at < _READ_SECONDS:
            return
        own_runs = {run.name for run, _ in self._slots.values()}  # whose processes live, whatever their stores say
        for run in self._plan.runs:
            if self.statuses[run.name].state == "running":
                status = self._read_status(run)
                self.statuses[run.name] = status._replace(state="running") if run.name in own_runs else status
        self._read_at = time.monotonic()

    def _read_status(self, run: SweepRun) -> RunStatus:
        """Return the status of a run, or the last known one if it cannot be read."""
        try:
            return read_status(run)
        except UserError:  # the store is unavailable, or a commit was removed while being read
            return self.statuses[run.name]
