"""Queue of records not yet delivered to MLflow: in order, each in the journal before anybody may send it.

What the journal cannot keep (a full disk, a folder that may not be written) waits in memory, bounded. No store is known
here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable

from mirl_dist.observability.mlflow.journal import Journal, Pending, count_pending
from mirl_dist.observability.mlflow.records import (
    POINTS_PER_CALL,
    DamagedRecord,
    Record,
    legal_name,
    parse_all,
    to_line,
)
from mirl_dist.observability.mlflow.segments import PendingRecord, pending_record

MEMORY_BYTES, POINT_BYTES = 64 * 2**20, 200  # what may wait in memory; one point there, roughly
MAX_PENDING_BYTES = 16 * 2**20

_log = logging.getLogger("mirl_dist.tracking")


class _Stamps:
    """Gives records their ids and times. The clock of a process never runs backwards."""

    def __init__(self, session_id: str) -> None:
        self._session_id, self._count, self._last_ms = session_id, 0, 0

    def next_ms(self) -> int:
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        return self._last_ms

    def next_id(self) -> str:
        self._count += 1
        return f"{self._session_id}-{self._count - 1}"


class _Queue:
    """Pending records by id, in the order in which they are to go. files: how many are files; memory: bytes of those
    that no disk has; order: places of inherited ones, by id."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, PendingRecord] = OrderedDict()
        self.files = self.memory = 0
        self.order: dict[str, int] = {}

    def add(self, entry: PendingRecord) -> None:
        self.entries[entry.id] = entry
        self.files += entry.kind == "file"
        self.memory += _memory_size(entry) if entry.record is not None else 0

    def drop(self, entry: PendingRecord) -> None:
        """Remove an entry, if it is there."""
        if self.entries.pop(entry.id, None) is not None:
            self.files -= entry.kind == "file"
            self.memory -= _memory_size(entry) if entry.record is not None else 0

    def replace(self, entries: OrderedDict[str, PendingRecord]) -> None:
        """Take these, among them all that are in memory."""
        self.entries = entries
        self.files = sum(entry.kind == "file" for entry in entries.values())


class Outbox:
    """Records in the order of their making, for any thread; inherited ones, and what earlier processes left, first.

    store_name: for people. session_id: 32 hex digits, this process's own. journal: None for memory only. inherited: the
    pending lines of the process that this one goes on from. changed: notified when something was sent. owns_delivery:
    whether this process delivers; what earlier ones left is known from then on. sent: records so far.
    """

    def __init__(self, store_name: str, session_id: str, journal: Journal | None, inherited: bytes = b"") -> None:
        self.changed = threading.Condition()
        self.owns_delivery = journal is None
        self.sent = self.forgotten = 0
        self._store_name, self._journal = store_name, journal
        self._queue, self._stamps = _Queue(), _Stamps(session_id)
        self._disk_warned = False
        self._queue.order = self._inherit(inherited)

    def put(self, record: Record) -> None:
        """Keep a record for sending; it gets its id and its time here."""
        with self.changed:
            record.at_ms = self._stamps.next_ms()
            self._keep(record)

    def put_points(self, kind: str, run_key: str, values: Iterable[tuple[str, float, int]]) -> None:
        """Keep (name, value, step) for sending, under one time.

        Values that are not finite are left out: MLflow would draw infinity as 1.8e308.
        """
        with self.changed:
            now = self._stamps.next_ms()
            points = [(legal_name(n), float(v), now, step) for n, v, step in values if math.isfinite(v)]
            for start in range(0, len(points), POINTS_PER_CALL):
                self._keep(Record(kind, run_key, points=points[start : start + POINTS_PER_CALL], at_ms=now))

    def claim_older(self) -> bool:
        """Whether this process delivers from now on: it holds the journal's lock and knows what earlier lives left."""
        if not self.owns_delivery:
            assert self._journal is not None
            if not self._journal.lock():
                return False
            older = self._read_older()
            with self.changed:
                self._queue.replace(self._merge(older))
                self.owns_delivery = True
        return True

    def count_files_and_others(self) -> tuple[int, int]:
        """How many records wait that are files, and that are none."""
        return self._queue.files, len(self._queue.entries) - self._queue.files

    def count(self) -> Pending:
        with self.changed:
            return count_pending(self._queue.entries.values())

    def count_in_memory(self) -> Pending:
        """What of it no disk has."""
        with self.changed:
            return count_pending([entry for entry in self._queue.entries.values() if entry.record is not None])

    def next_batch(self, *, files: bool, others: bool) -> list[PendingRecord]:
        """What goes in the next delivery: points of one run, up to the limit, or one record; files, others or both."""
        batch, points = list[PendingRecord](), 0
        with self.changed:
            for entry in self._queue.entries.values():
                if not (files if entry.kind == "file" else others):
                    continue
                joins = entry.kind == "points" and (
                    not batch or (batch[0].kind, batch[0].run_key) == ("points", entry.run_key)
                )
                points += entry.points
                if batch and not (joins and points <= POINTS_PER_CALL):
                    break
                batch.append(entry)
                if not joins:
                    break
        return batch

    def mark_sent(self, batch: list[PendingRecord]) -> None:
        """These need not be sent any more."""
        with self.changed:
            for entry in batch:
                self._queue.drop(entry)
            self.sent += len(batch)
            if self._journal is not None:
                with contextlib.suppress(OSError):  # what is not noted is sent again, which does no harm
                    self._journal.note_sent(batch)
            self.changed.notify_all()

    def pending_lines(self) -> bytes:
        """All that waits now as lines, for a life on another machine; the largest files are left out above 16 MiB."""
        with self.changed:
            entries = list((self._queue.entries if self.owns_delivery else self._merge(self._read_older())).values())
            size = sum((entry.line_bytes() or _memory_size(entry)) + entry.size * 4 // 3 for entry in entries)
            for entry in sorted(entries, key=lambda entry: -entry.size):
                if size <= MAX_PENDING_BYTES or not entry.size:
                    break
                size -= entry.size * 4 // 3
                entries.remove(entry)
            lines = []
            for entry in entries:
                with contextlib.suppress(OSError, DamagedRecord):
                    lines.append(to_line(entry.read()) if entry.kind == "file" else entry.raw())
            return b"".join(lines)

    def close(self) -> None:
        """Let other processes deliver."""
        with self.changed:
            if self._journal is not None:
                self._journal.close()

    def _inherit(self, lines: bytes) -> dict[str, int]:
        """Take what no life of this folder knows; the order in which all of it is to go."""
        records, damaged = parse_all(lines)
        if damaged:
            _log.warning("%d damaged lines that a commit kept for %s are left out", damaged, self._store_name)
        order = {record.id: number for number, record in enumerate(records)}
        known = set[str]()
        if self._journal is not None and records:
            with contextlib.suppress(OSError):
                known = self._journal.known_ids(order)
        for record in records:
            if record.id not in known:
                self._keep(record)
        return order

    def _read_older(self) -> list[PendingRecord]:
        assert self._journal is not None
        try:
            return self._journal.read_older()
        except OSError as error:
            _log.warning("what waits for %s in %s cannot be read (%s)", self._store_name, self._journal.folder, error)
            return []

    def _merge(self, older: list[PendingRecord]) -> OrderedDict[str, PendingRecord]:
        everything = [*older, *self._queue.entries.values()]
        first = [entry for entry in everything if entry.id in self._queue.order]
        first.sort(key=lambda entry: self._queue.order[entry.id])
        rest = [entry for entry in everything if entry.id not in self._queue.order]
        return OrderedDict((entry.id, entry) for entry in first + rest)

    def _keep(self, record: Record) -> None:
        if not record.id:
            record.id = self._stamps.next_id()
        entry = None
        if self._journal is not None:
            try:
                entry = self._journal.append(record)
            except OSError as error:
                if not self._disk_warned:
                    _log.warning(
                        "the journal %s takes no more (%s): what %s is to hear waits in memory only. Make room, or "
                        "correct the rights.",
                        *(self._journal.folder, error.strerror or error, self._store_name),
                    )
                self._disk_warned = True
        if entry is None:
            entry = pending_record(record)
            entry.record = record
        self._queue.add(entry)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Keep memory bounded; runs, params and what is on disk are never forgotten."""
        while self._queue.memory > MEMORY_BYTES:
            oldest = next((e for e in self._queue.entries.values() if e.record is not None and _memory_size(e)), None)
            if oldest is None:
                break
            if not self.forgotten:
                _log.warning("too much waits for %s: the oldest is being forgotten", self._store_name)
            self.forgotten += oldest.points or 1
            self._queue.drop(oldest)


def _memory_size(entry: PendingRecord) -> int:
    return POINT_BYTES * entry.points + entry.size
