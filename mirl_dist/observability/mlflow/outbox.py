"""What waits to be told to a tracking store: items in order, each in the journal before anybody may send it.

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

from mirl_dist.observability.mlflow.journal import Journal, Pending, count
from mirl_dist.observability.mlflow.records import (
    POINTS_PER_CALL,
    DamagedRecord,
    Record,
    legal_name,
    to_line,
    parse_all,
)
from mirl_dist.observability.mlflow.segments import PendingRecord, pending_record

MEMORY_BYTES, POINT_BYTES = 64 * 2**20, 200  # what may wait in memory; one point there, roughly
MAX_PENDING_BYTES = 16 * 2**20

_log = logging.getLogger("mirl_dist.tracking")


class Outbox:
    """Items in the order of their making, for any thread; what was inherited, and what earlier lives left, comes first.

    store_name: for people. life: 32 hex digits, this process's own. journal: None for memory only. inherited: the
    `backlog` of the life that this one goes on from. changed: notified when something was sent. mine: whether this
    process delivers; what earlier lives left is known from then on. sent: items so far.
    """

    def __init__(self, store_name: str, life: str, journal: Journal | None, inherited: bytes = b"") -> None:
        self.changed = threading.Condition()
        self.mine = journal is None
        self.sent = self.forgotten = 0
        self._store_name, self._journal = store_name, journal
        self._queue: OrderedDict[str, PendingRecord] = OrderedDict()
        self._files = self._memory = 0  # how many are files; bytes in memory alone
        self._session_id, self._count, self._last_ms = life, 0, 0
        self._disk_warned = False
        self._order = self._inherit(inherited)

    def put(self, item: Record) -> None:
        """Keep an item for sending; it gets its id and its time here. The clock of a life never runs backwards."""
        with self.changed:
            item.at_ms = self._tick()
            self._keep(item)

    def put_points(self, do: str, where: str, values: Iterable[tuple[str, float, int]]) -> None:
        """Keep (name, value, step) for sending, under one time.

        Values that are not finite are left out: MLflow would draw infinity as 1.8e308.
        """
        with self.changed:
            now = self._tick()
            points = [(legal_name(n), float(v), now, step) for n, v, step in values if math.isfinite(v)]
            for start in range(0, len(points), POINTS_PER_CALL):
                self._keep(Record(do, where, points=points[start : start + POINTS_PER_CALL], at_ms=now))

    def claim_older(self) -> bool:
        """Whether this process delivers from now on: it holds the journal's lock and knows what earlier lives left."""
        if not self.mine:
            assert self._journal is not None
            if not self._journal.lock():
                return False
            older = self._older()
            with self.changed:
                self._queue = self._merged(older)
                self._files = sum(entry.kind == "file" for entry in self._queue.values())
                self.mine = True
        return True

    def has_pending(self) -> tuple[int, int]:
        """How many items wait that are files, and that are none."""
        return self._files, len(self._queue) - self._files

    def count(self) -> Pending:
        with self.changed:
            return count(self._queue.values())

    def in_memory(self) -> Pending:
        """What of it no disk has."""
        with self.changed:
            return count([entry for entry in self._queue.values() if entry.record is not None])

    def next(self, *, files: bool, others: bool) -> list[PendingRecord]:
        """What goes in the next delivery: points of one run, up to the limit, or one item; files or others or both."""
        batch, points = list[PendingRecord](), 0
        with self.changed:
            for entry in self._queue.values():
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

    def done(self, batch: list[PendingRecord]) -> None:
        """These need not be sent any more."""
        with self.changed:
            for entry in batch:
                self._drop(entry)
            self.sent += len(batch)
            if self._journal is not None:
                with contextlib.suppress(OSError):  # what is not noted is sent again, which does no harm
                    self._journal.sent(batch)
            self.changed.notify_all()

    def pending_lines(self) -> bytes:
        """All that waits now as lines, for a life on another machine; the largest files are left out above 16 MiB."""
        with self.changed:
            entries = list((self._queue if self.mine else self._merged(self._older())).values())
            size = sum((entry.end - entry.start or _weight(entry)) + entry.size * 4 // 3 for entry in entries)
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
        items, damaged = parse_all(lines)
        if damaged:
            _log.warning("%d damaged lines that a commit kept for %s are left out", damaged, self._store_name)
        order = {item.id: number for number, item in enumerate(items)}
        known = set[str]()
        if self._journal is not None and items:
            with contextlib.suppress(OSError):
                known = self._journal.knows(order)
        for item in items:
            if item.id not in known:
                self._keep(item)
        return order

    def _older(self) -> list[PendingRecord]:
        assert self._journal is not None
        try:
            return self._journal.older()
        except OSError as error:
            _log.warning("what waits for %s in %s cannot be read (%s)", self._store_name, self._journal.folder, error)
            return []

    def _merged(self, older: list[PendingRecord]) -> OrderedDict[str, PendingRecord]:
        everything = [*older, *self._queue.values()]
        first = [entry for entry in everything if entry.id in self._order]
        first.sort(key=lambda entry: self._order[entry.id])
        rest = [entry for entry in everything if entry.id not in self._order]
        return OrderedDict((entry.id, entry) for entry in first + rest)

    def _tick(self) -> int:
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        return self._last_ms

    def _keep(self, item: Record) -> None:
        if not item.id:
            item.id = f"{self._session_id}-{self._count}"
            self._count += 1
        entry = None
        if self._journal is not None:
            try:
                entry = self._journal.append(item)
            except OSError as error:
                if not self._disk_warned:
                    _log.warning(
                        "the journal %s takes no more (%s): what %s is to hear waits in memory only. Make room, or "
                        "correct the rights.",
                        *(self._journal.folder, error.strerror or error, self._store_name),
                    )
                self._disk_warned = True
        if entry is None:
            entry = pending_record(item)
            entry.record = item
            self._memory += _weight(entry)
        self._queue[entry.id] = entry
        self._files += entry.kind == "file"
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Keep memory bounded; runs, params and what is on disk are never forgotten."""
        while self._memory > MEMORY_BYTES:
            oldest = next((e for e in self._queue.values() if e.record is not None and _weight(e)), None)
            if oldest is None:
                break
            if not self.forgotten:
                _log.warning("too much waits for %s: the oldest is being forgotten", self._store_name)
            self.forgotten += oldest.points or 1
            self._drop(oldest)

    def _drop(self, entry: PendingRecord) -> None:
        if self._queue.pop(entry.id, None) is not None:
            self._files -= entry.kind == "file"
            if entry.record is not None:
                self._memory -= _weight(entry)


def _weight(entry: PendingRecord) -> int:
    return POINT_BYTES * entry.points + entry.size
