"""The files of a journal: segments of lines, the contents beside them, and what of them is delivered."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mirl_dist.observability.mlflow.records import BlobRef, DamagedRecord, Record, parse, to_line

_FILE_NAME = re.compile(r"(\d{8})(\.jsonl|\.sent|-\d+\.data)")


class RecordLine(NamedTuple):
    """Where the line of a record lies: bytes `start` to `end` of a segment. file: with its content, or ''."""

    segment: Segment
    start: int
    end: int
    file: str = ""


@dataclass(eq=False)
class PendingRecord:
    """A record that waits: what must be known of it, and where its line lies (or the record, where no disk has it)."""

    id: str
    kind: str
    run_key: str
    at_ms: int
    points: int
    size: int  # of a file's content, in bytes
    line: RecordLine | None = None
    record: Record | None = None

    def raw(self) -> bytes:
        """Its line, or that of the record in memory. Raises OSError."""
        if self.line is None:
            assert self.record is not None
            return to_line(self.record)
        return self.line.segment.raw(self.line.start, self.line.end)

    def line_bytes(self) -> int:
        """The length of its line on disk; 0 where no disk has it."""
        return self.line.end - self.line.start if self.line else 0

    def read(self) -> Record:
        """The whole record. Raises DamagedRecord, OSError."""
        if self.record is not None:
            return self.record
        record, blob = parse(self.raw())
        if blob is not None and self.line is not None:
            record.data = (self.line.segment.folder / blob.file).read_bytes()
            if len(record.data) != blob.size:
                raise DamagedRecord(f"{blob.file} has {len(record.data)} bytes instead of {blob.size}")
        return record


def pending_record(record: Record) -> PendingRecord:
    """What must be known of a record that waits."""
    return PendingRecord(record.id, record.kind, record.run_key, record.at_ms, len(record.points), len(record.data))


class Segment:
    """One file of lines. waiting: how many of them are not delivered, for one's own or after `left`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number, self._handle = folder, number, -1
        self.path, self._sent_path = (folder / f"{number:08d}.{ending}" for ending in ("jsonl", "sent"))
        self.end = self.pending = self.damaged = 0

    @classmethod
    def new(cls, folder: Path) -> Segment:
        """The next one of a folder, to be appended to. Raises OSError."""
        for number in itertools.count(max(_numbers(folder), default=0) + 1):
            made = cls(folder, number)
            with contextlib.suppress(FileExistsError):
                made._handle = os.open(made.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                break
        return made

    def append(self, record: Record) -> PendingRecord:
        """Write the record's line, after a file's content. Raises OSError, and is then as before."""
        entry, blob = pending_record(record), None
        if record.kind == "file":
            blob = BlobRef(f"{self.number:08d}-{self.end}.data", entry.size)
            write_file(self.folder / blob.file, record.data)
        line = to_line(record, blob)
        done = 0
        while done < len(line):  # not at the file's end but after the last whole line: a torn one is written over
            done += os.pwrite(self._handle, line[done:], self.end + done)
        entry.line = RecordLine(self, self.end, self.end + len(line), blob.file if blob else "")
        self.end += len(line)
        self.pending += 1
        return entry

    def raw(self, start: int, end: int) -> bytes:
        """Some of its bytes. Raises OSError."""
        handle = self._handle if self._handle >= 0 else os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(handle, end - start, start)
        finally:
            if handle != self._handle:
                os.close(handle)

    def read_all(self) -> list[PendingRecord]:
        """Every whole line, delivered or not. Raises OSError."""
        text = self.path.read_bytes()
        entries, start = list[PendingRecord](), 0
        self.damaged = 0
        while end := text.find(b"\n", start) + 1:
            try:
                record, blob = parse(text[start:end])
                entry = pending_record(record)
                file, entry.size = blob or ("", 0)
                entry.line = RecordLine(self, start, end, file)
                entries.append(entry)
            except DamagedRecord:
                self.damaged += 1
            start = end
        return entries

    def read_pending(self) -> list[PendingRecord]:
        """What is not delivered yet. Raises OSError."""
        entries = self.read_all()  # first, so that what is delivered meanwhile does not count
        sent, at = sorted(self._sent()), 0
        pending = []
        for entry in entries:
            assert entry.line is not None
            while at < len(sent) and sent[at][1] <= entry.line.start:
                at += 1
            if at == len(sent) or entry.line.start < sent[at][0]:
                pending.append(entry)
        self.pending = len(pending)
        return pending

    def note_sent(self, lines: Collection[RecordLine]) -> None:
        """Note that these are delivered, and drop their contents. Raises OSError when it is not noted."""
        self.pending -= len(lines)
        regions: list[list[int]] = []
        for line in lines:
            if regions and regions[-1][1] == line.start:
                regions[-1][1] = line.end
            else:
                regions.append([line.start, line.end])
        append_lines(self._sent_path, [json.dumps(region) for region in regions])
        for line in lines:
            if line.file:
                (self.folder / line.file).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove a segment that is delivered; its ids stay known. Raises OSError."""
        lives: dict[str, list[list[int]]] = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in self.read_all():
                life, _, number = entry.id.rpartition("-")
                ranges = lives.setdefault(life, [])
                if ranges and ranges[-1][1] == int(number) - 1:
                    ranges[-1][1] += 1
                else:
                    ranges.append([int(number), int(number)])
        if lives:
            with contextlib.suppress(OSError):  # a full disk gets room by what follows; twice delivered is no harm
                append_lines(self.folder / "gone.jsonl", [json.dumps(lives)])
        self.path.unlink(missing_ok=True)
        for path in (*self.folder.glob(f"{self.number:08d}-*.data"), self._sent_path):
            path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _sent(self) -> Iterator[tuple[int, int]]:
        for region in json_lines(self._sent_path):
            with contextlib.suppress(ValueError, TypeError):
                start, end = region
                yield int(start), int(end)


def json_lines(path: Path) -> Iterator[Any]:
    """What the whole lines of a small file say; torn and missing ones say nothing."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a small file, after ending what a killed process may have left of one."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as stream:
        stream.write(b"".join(b"\n" + line.encode() + b"\n" for line in lines))


def write_file(path: Path, data: bytes) -> None:
    """Write a file, or raise OSError and leave none."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(handle, "wb") as stream:
            stream.write(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def segments_of(folder: Path) -> list[Segment]:
    """All segments of a folder in order, also those whose lines are gone; none where there is no folder.

    Raises OSError.
    """
    try:
        return [Segment(folder, number) for number in sorted(set(_numbers(folder)))]
    except FileNotFoundError:
        return []


def _numbers(folder: Path) -> Iterator[int]:
    for name in os.listdir(folder):
        if match := _FILE_NAME.fullmatch(name):
            yield int(match[1])
