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
from typing import Any

from mirl_dist.observability.mlflow.records import BlobRef, DamagedRecord, Record, to_line, parse

_OURS = re.compile(r"(\d{8})(\.jsonl|\.sent|-\d+\.data)")


@dataclass(eq=False)
class PendingRecord:
    """An item that waits: what must be known of it, and where its line stands (or the item, where no disk has it)."""

    id: str
    kind: str
    run_key: str
    at_ms: int
    points: int
    size: int  # of a file's content, in bytes
    segment: Segment | None = None
    start: int = 0
    end: int = 0
    file: str = ""
    record: Record | None = None

    def raw(self) -> bytes:
        """Its line, or that of the item in memory. Raises OSError."""
        if self.segment is None:
            assert self.record is not None
            return to_line(self.record)
        return self.segment.raw(self.start, self.end)

    def read(self) -> Record:
        """The whole item. Raises Damaged, OSError."""
        if self.record is not None:
            return self.record
        item, lies = parse(self.raw())
        if lies is not None and self.segment is not None:
            item.data = (self.segment.folder / lies.file).read_bytes()
            if len(item.data) != lies.size:
                raise DamagedRecord(f"{lies.file} has {len(item.data)} bytes instead of {lies.size}")
        return item


def pending_record(item: Record) -> PendingRecord:
    return PendingRecord(item.id, item.kind, item.run_key, item.at_ms, len(item.points), len(item.data))


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

    def append(self, item: Record) -> PendingRecord:
        """Write the item's line, after a file's content. Raises OSError, and is then as before."""
        entry, lies = pending_record(item), None
        if item.kind == "file":
            entry.file = f"{self.number:08d}-{self.end}.data"
            lies = BlobRef(entry.file, entry.size)
            write_file(self.folder / entry.file, item.data)
        line = to_line(item, lies)
        done = 0
        while done < len(line):  # not at the file's end but after the last whole line: a torn one is written over
            done += os.pwrite(self._handle, line[done:], self.end + done)
        entry.segment, entry.start, entry.end = self, self.end, self.end + len(line)
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
        found, start = list[PendingRecord](), 0
        self.damaged = 0
        while end := text.find(b"\n", start) + 1:
            try:
                item, lies = parse(text[start:end])
                entry = pending_record(item)
                entry.segment, entry.start, entry.end = self, start, end
                entry.file, entry.size = lies or ("", 0)
                found.append(entry)
            except DamagedRecord:
                self.damaged += 1
            start = end
        return found

    def read_pending(self) -> list[PendingRecord]:
        """What is not delivered yet. Raises OSError."""
        found = self.read_all()  # first, so that what is delivered meanwhile does not count
        sent, at = sorted(self._sent()), 0
        left = []
        for entry in found:
            while at < len(sent) and sent[at][1] <= entry.start:
                at += 1
            if at == len(sent) or entry.start < sent[at][0]:
                left.append(entry)
        self.pending = len(left)
        return left

    def note_sent(self, entries: Collection[PendingRecord]) -> None:
        """Note that these are delivered, and drop their contents. Raises OSError when it is not noted."""
        self.pending -= len(entries)
        regions: list[list[int]] = []
        for entry in entries:
            if regions and regions[-1][1] == entry.start:
                regions[-1][1] = entry.end
            else:
                regions.append([entry.start, entry.end])
        append_lines(self._sent_path, [json.dumps(region) for region in regions])
        for entry in entries:
            if entry.file:
                (self.folder / entry.file).unlink(missing_ok=True)

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
        for said in json_lines(self._sent_path):
            with contextlib.suppress(ValueError, TypeError):
                start, end = said
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
        if match := _OURS.fullmatch(name):
            yield int(match[1])
