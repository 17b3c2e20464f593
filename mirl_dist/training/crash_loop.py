"""The step that a run is in, kept on this machine, so that launch after launch does not die in one and the same step.

    <tmp>/mirl-dist-<uid>/footprints/<16 hex digits of the SHA-256 of the run's address>

A mapped file: writing costs microseconds and outlives SIGKILL, though not the machine. It holds two records, written
in turn, each with a number and a checksum, so that a write cut short leaves the one before. A record says where the
run is, and in which step how many launches have died in a row. A launch dies in a step when it ends there without a
word; starting, resting, a UserError and a stop that was asked for are none.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mirl_dist.config.local_paths import process_folder
from mirl_dist.errors import MirlError, Stopped, UserError

_BODY = struct.Struct("<QBQQQQQ")
_CHECK = struct.Struct("<I")
_BYTES = _BODY.size + _CHECK.size
_OUTSIDE, _INSIDE = 0, 1


class _StepRecord(NamedTuple):
    """number: of this record; round_, updates: the newest step; died_*: the one that `deaths` launches died in."""

    number: int = 0
    state: int = _OUTSIDE
    round_: int = 0
    updates: int = 0
    died_round: int = 0
    died_updates: int = 0
    deaths: int = 0

    def packed(self) -> bytes:
        body = _BODY.pack(*self)
        return body + _CHECK.pack(zlib.crc32(body))


class CrashLoopGuard:
    """Of one run, for the one process that tells its steps. repeated: the round, and the updates before the step, that
    the last launches died in, when they were too many; the caller then refuses to train, with `text`."""

    repeated: tuple[int, int] | None = None

    def __init__(self, file: mmap.mmap | None = None, path: Path = Path()) -> None:
        self._file, self._path = file, path
        self._record = _count_deaths(_newest(file[:])) if file is not None else _StepRecord()

    @classmethod
    def open(cls, run_id: str, limit: int) -> CrashLoopGuard:
        """The run's; to be called by a launch that alone may write the run.

        run_id: unlike that of any other run; limit: deaths in one step, 1 or more.

        The launch that follows the last of them is refused, and so each that follows one more; the one after a refusal
        may try again.
        """
        digest = hashlib.sha256(run_id.encode()).hexdigest()
        path = Path("footprints", digest[:16])
        try:
            path = process_folder() / path
            path.parent.mkdir(exist_ok=True)
            with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as stream:
                stream.write(b"\0" * (2 * _BYTES - stream.seek(0, os.SEEK_END)))  # a full disk says so here
                stream.flush()
                file = mmap.mmap(stream.fileno(), 2 * _BYTES)
        except (OSError, UserError):  # no room, or nobody's place: a run does not end for want of it
            return cls()
        opened = cls(file, path)
        last = _newest(file[:])
        if last.state == _INSIDE and opened._record.deaths >= limit:
            opened.repeated = last.round_, last.updates
        opened.end_step()
        return opened

    @classmethod
    def disabled(cls) -> CrashLoopGuard:
        """The twin for processes that tell nothing."""
        return cls()

    def begin_step(self, round_: int, updates: int) -> None:
        """The step after `updates` of them begins."""
        self._write(self._record._replace(state=_INSIDE, round_=round_, updates=updates))

    def end_step(self) -> None:
        """No step is in progress: who dies now has not died of one."""
        self._write(self._record._replace(state=_OUTSIDE))

    def close(self) -> None:
        """The launch ends with a word; without deaths to remember, the file goes. Twice is once."""
        self.end_step()
        if self._file is not None:
            self._file.close()
            self._file = None
            if not _count_deaths(self._record).deaths:
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def __enter__(self) -> CrashLoopGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes, unless what ended the launch is an error that nobody foresaw."""
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

    def _write(self, record: _StepRecord) -> None:
        self._record = record._replace(number=record.number + 1)
        if self._file is not None:
            begin = self._record.number % 2 * _BYTES
            self._file[begin : begin + _BYTES] = self._record.packed()


def _newest(data: bytes) -> _StepRecord:
    """The newest whole record; a first one where there is none."""
    records = [_StepRecord()]
    for begin in (0, _BYTES):
        part = data[begin : begin + _BYTES]
        record = _StepRecord(*_BODY.unpack_from(part))
        if record.packed() == part:
            records.append(record)
    return max(records)


def _count_deaths(last: _StepRecord) -> _StepRecord:
    """What a new launch begins with, after the one that was left at `last`."""
    here, died = (last.round_, last.updates), (last.died_round, last.died_updates)
    deaths = last.deaths if here <= died else 0  # the step is behind
    if last.state == _INSIDE:
        deaths, died = (deaths + 1 if here == died else 1), here
    return _StepRecord(last.number, _OUTSIDE, *here, *died, deaths)
