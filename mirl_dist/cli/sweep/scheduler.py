"""The runs of a sweep as processes of this machine, a few at a time, each with its share of GPUs and processors."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mirl_dist.cli.sweep.spec import SweepPlan, SweepRun, arguments
from mirl_dist.cli.sweep.status import StatusTable
from mirl_dist.distributed.signals import RESUMABLE
from mirl_dist.errors import UserError
from mirl_dist.observability.console import warn

INTERRUPTED = 130
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_LOOK_SECONDS = 0.2
_GRACE_SECONDS = 20.0  # `train --launch` needs some to end its ranks


class StartedRun(NamedTuple):
    """A run that this process has started."""

    run: SweepRun
    process: subprocess.Popen[bytes]


class Scheduler:
    """Works off the runs of a plan that have not finished. environments: of each slot.

    A run that another launch trains is left to it, and is started here when it ends unfinished.
    """

    def __init__(self, plan: SweepPlan, board: StatusTable, environments: list[dict[str, str]]) -> None:
        self._plan, self._board, self._environments = plan, board, environments
        self._waiting = [run for run in plan.runs if board.stands[run.name].state != "finished"]
        self._slots: dict[int, StartedRun] = {}
        self._heard: dict[str, tuple[bytes, float]] = {}

    def work(self, lost: Callable[[], bool]) -> int | None:
        """Until all runs have ended. None, or the code of a sweep that was asked to stop: 75, or 130 where a second
        Ctrl-C ended its runs at once. lost: whether another sweep has taken this one's place, which ends it alike.
        Raises UserError, once the runs that it has started have ended, where the folder of the logs cannot be written."""
        asked, fault = False, None
        with hearing() as signals:
            while self._waiting or self._slots:
                self._gather(asked)
                if signals.count(signal.SIGINT) > 1:
                    self._kill()
                    return INTERRUPTED
                if not asked and (signals or lost()):
                    asked = True
                    self._ask(signal.Signals(signals[0]).name if signals else "another sweep works here")
                if not asked:
                    try:
                        self._start()
                    except UserError as found:
                        asked, fault = True, found
                        self._ask("a log cannot be written")
                self._board.refresh({started.run.name for started in self._slots.values()})
                time.sleep(_LOOK_SECONDS)
        if fault is not None:
            raise fault
        return RESUMABLE if asked else None

    def _start(self) -> None:
        """A run for each free slot."""
        for done in [run for run in self._waiting if self._board.stands[run.name].state == "finished"]:
            self._waiting.remove(done)
            self._board.put(done, "finished", "by another launch")
        for slot in sorted(set(range(self._plan.sweep.slots)) - self._slots.keys()):
            run = next((run for run in self._waiting if not self._is_elsewhere(run)), None)
            if run is None:
                return
            self._waiting.remove(run)
            log = self._plan.log(run)
            with self._opened(log) as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "mirl_dist", *arguments(self._plan, run)],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=os.environ | self._environments[slot],
                    start_new_session=True,  # a terminal's Ctrl-C comes here, and is passed on once
                )
            self._slots[slot] = StartedRun(run, process)
            self._board.put(run, "running", f"pid {process.pid}, log {log}")

    def _opened(self, log: Path) -> BinaryIO:
        try:
            return open(log, "ab")
        except OSError as error:
            folder = self._plan.local
            raise UserError(
                f"folder: {log} cannot be written: {error.strerror}. Put {folder} right, or choose another place."
            ) from None

    def _is_elsewhere(self, run: SweepRun) -> bool:
        """Whether another launch trains a run: its signs of life change while we watch."""
        stand, now = self._board.stands[run.name], time.monotonic()
        if stand.state != "running":
            return False
        if run.name not in self._heard:
            warn(f"mirl-dist: {run.name} is trained by another launch ({stand.who}); waiting for its end")
        sign, since = self._heard.get(run.name, (None, now))
        if sign != stand.sign:
            since = now
        self._heard[run.name] = stand.sign, since
        return now - since <= run.config.store.lease_seconds  # silent: our own launch will watch, and take it over

    def _gather(self, asked: bool) -> None:
        """The runs that have ended."""
        for slot, (run, process) in list(self._slots.items()):
            code = process.poll()
            if code is None:
                continue
            del self._slots[slot]
            found = self._board.look(run)
            self._board.stands[run.name] = found
            if code == 0:
                self._board.put(run, "finished", "" if found.psnr is None else f"{found.psnr:.2f} dB")
            elif code == RESUMABLE or (asked and code in (-signal.SIGTERM, -signal.SIGINT)):
                self._board.put(run, "stopped", "goes on with the next start of the sweep")
            elif code == 2 and found.state == "running" and not asked:
                self._waiting.append(run)  # another launch was faster, and trains it
            else:
                how = f"killed by signal {-code}" if code < 0 else f"code {code}"
                self._board.put(run, "failed", f"{how}, log {self._plan.log(run)}")

    def _ask(self, why: str) -> None:
        names = ", ".join(started.run.name for started in self._slots.values()) or "no run"
        warn(f"mirl-dist: {why}: {names} asked to stop; Ctrl-C, twice in all, ends them at once.")
        self._waiting.clear()
        self._signal(signal.SIGTERM)

    def _kill(self) -> None:
        """End the runs: as their own second Ctrl-C does, with all that they have started; else by SIGKILL."""
        last = time.monotonic() + _GRACE_SECONDS
        for _ in range(3):
            self._signal(signal.SIGINT)
            time.sleep(2 * _LOOK_SECONDS)
        while any(started.process.poll() is None for started in self._slots.values()):
            if time.monotonic() > last:
                for started in self._slots.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(started.process.pid, signal.SIGKILL)
            time.sleep(_LOOK_SECONDS)
        for started in self._slots.values():
            self._board.put(started.run, "stopped", "ended at once")

    def _signal(self, number: int) -> None:
        for started in self._slots.values():
            if started.process.poll() is None:
                started.process.send_signal(number)


@contextlib.contextmanager
def hearing() -> Iterator[list[int]]:
    """The signals that ask this process to stop, as they come. Only the main thread may ask for that."""
    signals: list[int] = []
    mine = [n for n in _ASKING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # nohup means it
    before = [(number, signal.signal(number, lambda got, frame: signals.append(got))) for number in mine]
    try:
        yield signals
    finally:
        for number, handler in before:
            signal.signal(number, handler)
