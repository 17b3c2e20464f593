"""Detects a crash loop: records the current training step on this machine and counts crashes in the same step.

    <tmp>/mirl-dist-<uid>/footprints/<16 hex digits of the SHA-256 of the run's id>

The file holds one line of JSON, overwritten in place by a single write. A write takes microseconds, and after a SIGKILL
the file holds either the old or the new line. The file survives the process but is local to the machine. It records the
position of the run, and how many consecutive launches crashed in which step. A crash counts only if the process dies
inside a step without reporting an error; start-up, the time between steps, a UserError and a requested stop do not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mirl_dist.config.local_paths import process_folder
from mirl_dist.errors import MirlError, Stopped, UserError

_LINE_BYTES = 160  # fits in one page, so a write is never torn


class StepRecord(NamedTuple):
    """The content of the file.

    inside: 1 while a step is in progress, else 0; round_, updates: the latest step; died_round, died_updates: the step
    in which the last `deaths` consecutive launches crashed.
    """

    inside: int = 0
    round_: int = 0
    updates: int = 0
    died_round: int = 0
    died_updates: int = 0
    deaths: int = 0


def read_record(data: bytes) -> StepRecord:
    """Parse the content of the file; return an empty record if the file is new or damaged."""
    try:
        values = json.loads(data)
        return StepRecord(*values) if all(type(value) is int for value in values) else StepRecord()
    except (ValueError, TypeError):
        return StepRecord()


class CrashLoopGuard:
    """Records the steps of one run on rank 0; without a file, as on other ranks, it records nothing.

    repeated: the round and number of updates before the step in which too many consecutive launches crashed, or None.
    If it is set, the caller must refuse to train, with the message of `describe`.
    """

    repeated: tuple[int, int] | None = None

    def __init__(self, handle: int = -1, path: Path = Path()) -> None:
        self._handle, self._path = handle, path  # handle: file descriptor, or -1 to record nothing
        self._record = StepRecord()

    @classmethod
    def open(cls, run_id: str, limit: int) -> CrashLoopGuard:
        """Open the record of a run; the caller must hold the run's lease.

        run_id: unique to the run; limit: crashes in one step, at least 1, after which the next launch is refused. The
        launch after a refusal may try the step again; if it crashes there too, the launch after it is refused.
        """
        try:
            path = process_folder() / "footprints" / hashlib.sha256(run_id.encode()).hexdigest()[:16]
            path.parent.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            last = read_record(os.pread(handle, _LINE_BYTES, 0))
        except (OSError, UserError):  # disk full, or another user's folder: not worth failing the run
            return cls()
        opened = cls(handle, path)
        opened._record = _count_deaths(last)
        if last.inside and opened._record.deaths >= limit:
            opened.repeated = last.round_, last.updates
        opened.end_step()
        return opened

    def begin_step(self, round_: int, updates: int) -> None:
        """Record that the step after `updates` optimiser steps of the round is in progress."""
        self._write(self._record._replace(inside=1, round_=round_, updates=updates))

    def end_step(self) -> None:
        """Record that no step is in progress: a crash from now on does not count."""
        self._write(self._record._replace(inside=0))

    def close(self) -> None:
        """Close the record of a launch that ends for a known reason; remove it if it counts no crash. Idempotent."""
        self.end_step()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            if not _count_deaths(self._record).deaths:
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def __enter__(self) -> CrashLoopGuard:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close, unless an unexpected exception ends the launch: that counts as a crash."""
        if kind is None or issubclass(kind, (MirlError, Stopped, SystemExit)):
            self.close()

    def describe(self, keys: Sequence[str]) -> str:
        """Return the error message for `repeated`. keys: the samples of that step, as task:key."""
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
            with contextlib.suppress(OSError):  # disk full; later writes reuse the space of the first
                os.pwrite(self._handle, json.dumps(record).ljust(_LINE_BYTES).encode(), 0)


def _count_deaths(last: StepRecord) -> StepRecord:
    """Return the record that a launch starts with, after a launch that left the record `last`."""
    here, died = (last.round_, last.updates), (last.died_round, last.died_updates)
    deaths = last.deaths if here <= died else 0  # 0: the run has passed that step
    if last.inside:
        deaths, died = (deaths + 1 if here == died else 1), here
    return StepRecord(0, *here, *died, deaths)
