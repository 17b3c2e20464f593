"""A journal on disk of what a tracking store is to hear: written before anything is sent, read by later lives.

    <folder>/00000007.jsonl     a segment, one line per record; each life of a run begins its own
    <folder>/00000007-12.data   the content of a file, written whole before its line
    <folder>/00000007.sent      which bytes of the segment are delivered: '[from, to]' on each line
    <folder>/gone.jsonl         the ids of segments that were delivered and removed: numbers from, to by life
    <folder>/key                the word by which a store finds this run again
    <folder>/lock               held by the one process that delivers

Pure file work: no store is known here. A torn last line (its writer was killed) is left out, a damaged one too; a
delivery that was not noted is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import math
import os
import re
import threading
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow.records import Record
from mirl_dist.observability.mlflow.segments import PendingRecord, Segment, json_lines, segments_of, write_file

SEGMENT_BYTES = 2**20

_log = logging.getLogger("mirl_dist.tracking")


class Pending(NamedTuple):
    """What waits. since: wall-clock seconds of the oldest."""

    points: int
    records: int
    since: float | None


class Journal:
    """The journal of one run in one folder, for one life. One thread may call `read_older` while another appends."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError for a folder that can't be made."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self._own_segments: list[Segment] = []
        self._naming = threading.Lock()  # a segment of this life is never seen without being known as such
        self._lock, self._locked = -1, False

    def append(self, record: Record) -> PendingRecord:
        """Keep a record; from then on no death of this process loses it. Raises OSError, and nothing is half kept."""
        if not self._own_segments or self._own_segments[-1].end >= SEGMENT_BYTES:
            with self._naming:
                self._own_segments.append(Segment.new(self.folder))
        return self._own_segments[-1].append(record)

    def note_sent(self, entries: Collection[PendingRecord]) -> None:
        """Note what was delivered; segments that are through, and not in use, go. Raises OSError."""
        lines = [entry.line for entry in entries if entry.line is not None]
        for segment, some in itertools.groupby(lines, lambda line: line.segment):
            segment.note_sent(list(some))
            if segment.pending == 0 and segment not in self._own_segments[-1:]:
                segment.remove()

    def read_key(self) -> str:
        """The word of this folder, 32 hex digits, the same in all lives of the run. Raises OSError."""
        path, fresh = self.folder / "key", self.folder / f"{uuid.uuid4().hex}.key"
        try:
            write_file(fresh, uuid.uuid4().hex.encode())
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
            if not re.fullmatch(r"[0-9a-f]{32}", path.read_text(errors="replace")):
                os.replace(fresh, path)  # a power cut may have emptied it
        finally:
            fresh.unlink(missing_ok=True)
        return path.read_text()

    def close(self) -> None:
        """Let others deliver; a segment that is through goes. Twice is once."""
        for segment in self._own_segments:
            if segment.pending == 0:
                with contextlib.suppress(OSError):
                    segment.remove()
            segment.close()
        self._own_segments = []
        if self._lock >= 0:
            os.close(self._lock)
        self._lock, self._locked = -1, False

    def lock(self) -> bool:
        """Whether this process is now the one that delivers. The kernel takes the lock back when it dies."""
        try:
            if self._lock < 0:
                self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locked = True
        except BlockingIOError:
            self._locked = False
        except OSError:  # this file system knows no locks, and to deliver twice does no harm
            self._locked = True
        return self._locked

    def read_older(self) -> list[PendingRecord]:
        """What earlier lives left, in order; who holds the lock may deliver it, and clears up. Raises OSError."""
        with self._naming:
            first = self._own_segments[0].number if self._own_segments else math.inf
            segments = [segment for segment in segments_of(self.folder) if segment.number < first]
        entries = []
        for segment in segments:
            try:
                left = segment.read_pending()
            except FileNotFoundError:  # its life has just removed it, or was killed when it had begun to
                left = []
            if self._locked and segment.damaged:
                _log.warning("%s: %d damaged lines are left out", segment.path, segment.damaged)
            if self._locked and not left:
                segment.remove()
            entries += left
        return entries

    def known_ids(self, ids: Collection[str]) -> set[str]:
        """Those of `ids` that wait here or were delivered from here. Raises OSError."""
        known = set[str]()
        for segment in segments_of(self.folder):
            with contextlib.suppress(FileNotFoundError):
                known |= {entry.id for entry in segment.read_all()}
        gone: dict[str, list[range]] = {}
        for lives in json_lines(self.folder / "gone.jsonl"):  # last: segments may go while this looks
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                for life, ranges in lives.items():
                    gone.setdefault(life, []).extend(range(int(a), int(b) + 1) for a, b in ranges)
        known |= {i for i in ids if any(int(i[33:]) in numbers for numbers in gone.get(i[:32], ()))}
        return known & set(ids)


def pending_records(folder: Path) -> Pending:
    """What waits in a journal, whether its run lives or not; nothing is touched. Raises UserError."""
    entries = list[PendingRecord]()
    try:
        for segment in segments_of(folder):
            with contextlib.suppress(FileNotFoundError):
                entries += segment.read_pending()
    except OSError as error:
        raise UserError(
            f"found the journal {folder}, which cannot be read: {error.strerror}. Ask its owner, or correct the rights."
        ) from None
    return count_pending(entries)


def count_pending(entries: Collection[PendingRecord]) -> Pending:
    since = min((entry.at_ms / 1000 for entry in entries), default=None)
    return Pending(sum(entry.points for entry in entries), sum(not entry.points for entry in entries), since)
