"""The step that a run is in, kept on this machine, so that launch after launch does not die in one and the same step.

    <tmp>/mirl-dist-<uid>/footprints/<16 hex digits of the SHA-256 of the run's address>

One line of JSON, replaced in place by one write: that costs microseconds, and SIGKILL finds the line before or the line
after. It outlives the process, not the machine. The line says where the run is, and in which step how many launches
have died in a row. A launch dies in a step if its process ends there and reports no reason; starting, the time between
steps, a UserError and a requested stop do not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mirl_dist.config.local_paths import process_folder
from mirl_dist.errors import MirlError, Stopped, UserError

_LINE_BYTES = 160  # in one page: a write of it is not interrupted


class StepRecord(NamedTuple):
    """inside: whether a step is in progress; round_, updates: the newest step; died_*: the step in which `deaths`
    launches in a row have died."""

    inside: int = 0
    round_: int = 0
    updates: int = 0
    died_round: int = 0
    died_updates: int = 0
    deaths: int = 0


def read_record(data: bytes) -> StepRecord:
    """The record that a file holds; an empty one where the file is new or damaged."""
    try:
        values = json.loads(data)
        return StepRecord(*values) if all(type(value) is int for value in values) else StepRecord()
    except (ValueError, TypeError):
        return StepRecord()


class CrashLoopGuard:
    """Records the steps of one run, in the one process that reports them. repeated: the round, and the updates before
    the step, in which too many launches in a row died; the caller then refuses to train, with `describe`."""

    repeated: tuple[int, int] | None = None

    def __init__(self, handle: int = -1, path: Path = Path()) -> None:
        """handle: of the open file; -1 records nothing."""
        self._handle, self._path = handle, path
        self._record = StepRecord()

    @classmethod
    def open(cls, run_id: str, limit: int) -> CrashLoopGuard:
        """Open the record of a run; only the launch that holds the run's lease may call this.

        run_id: unlike that of any other run; limit: deaths in one step, 1 or more. The launch after the last of them is
        refused, and so is each launch after one more; the launch after a refusal may try again.
        """
        try:
            path = process_folder() / "footprints" / hashlib.sha256(run_id.encode()).hexdigest()[:16]
            path.parent.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            last = read_record(os.pread(handle, _LINE_BYTES, 0))
        except (OSError, UserError):  # no room, or another user's folder: a run does not end for that
            return cls()
        opened = cls(handle, path)
        opened._record = _count_deaths(last)
        if last.inside and opened._record.deaths >= limit:
            opened.repeated = last.round_, last.updates
        opened.end_step()
        return opened

    @classmethod
    def disabled(cls) -> CrashLoopGuard:
        """A guard for processes that report no steps."""
        return cls()

    def begin_step(self, round_: int, updates: int) -> None:
        """The step after `updates` of them begins."""
        self._write(self._record._replace(inside=1, round_=round_, updates=updates))

    def end_step(self) -> None:
        """No step is in progress: a process that dies now has not died in one."""
        self._write(self._record._replace(inside=0))

    def close(self) -> None:
        """The launch ends and its reason is known; the file is removed unless it counts deaths. May be called again."""
        self.end_step()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            if not _count_deaths(self._record).deaths:
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def __enter__(self) -> CrashLoopGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, unless the launch ends with an error that nobody foresaw."""
        if kind is None or issubclass(kind, (MirlError, Stopped, SystemExit)):
            self.close()

    def describe(self, keys: Sequence[str]) -> str:
        """What to say of `repeated`. keys: the samples of that step."""
        round_, updates = self.repeated or (0, 0)
        named = ", ".join(keys[:16]) + (f" and {len(keys) - 16} more" if len(keys) > 16 else "")
        return (
            f"{self._record.deaths} launches in a row died in step {updates + 1} of round {round_} on this machine, so "
            f"probably of that step. Its samples as task:key: {named}. Look at what the last launch said, at the "
            "memory it had (the system's log names what was killed), and at those samples. The next start tries the "
            f"step again; to have it tried more often, raise guard.same_step_failures, or remove {self._path}."
        )

    def _write(self, record: StepRecord) -> None:
        self._record = record
        if self._handle >= 0:
            with contextlib.suppress(OSError):  # a full disk: the first write takes all the room that is needed
                os.pwrite(self._handle, json.dumps(record).ljust(_LINE_BYTES).encode(), 0)


def _count_deaths(last: StepRecord) -> StepRecord:
    """The record that a launch begins with after one that ended at `last`."""
    here, died = (last.round_, last.updates), (last.died_round, last.died_updates)
    deaths = last.deaths if here <= died else 0  # the step is behind
    if last.inside:
        deaths, died = (deaths + 1 if here == died else 1), here
    return StepRecord(0, *here, *died, deaths)
