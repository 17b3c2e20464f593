"""Queue of records not yet delivered to MLflow, in order; each is in the journal before it may be sent.

If the journal cannot be written (full disk, missing permission), records are kept in memory up to a limit, and move to
the journal once that works again. This module does not depend on a store.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from mirl_dist.observability.mlflow.journal import Journal, Pending
from mirl_dist.observability.mlflow.records import POINTS_PER_CALL, Record, legal_name, parse_all

MEMORY_BYTES = 64 * 2**20  # limit for records in memory
MAX_PENDING_BYTES = 16 * 2**20
DISK_PAUSE_SECONDS = 5.0  # pause after a failed write, so that a busy or full disk is not retried in every step

_log = logging.getLogger("mirl_dist.tracking")
T = TypeVar("T")


class _Stamps:
    """Source of record ids and timestamps. Timestamps of a process never decrease."""

    def __init__(self, session_id: str) -> None:
        self._session_id, self._count, self._last_ms = session_id, 0, 0

    def next_ms(self) -> int:
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        return self._last_ms

    def next_id(self) -> str:
        self._count += 1
        return f"{self._session_id}-{self._count - 1}"


class Outbox:
    """Queue of records in creation order, usable from all threads; inherited and earlier processes' records come first.

    store_name: name for messages. session_id: 32 hex digits, unique to this process. inherited: pending lines from the
    commit that this process resumes. changed: condition notified after each delivery. owns_delivery: whether this
    process delivers. sent: number of points and other records sent so far.
    """

    def __init__(self, store_name: str, session_id: str, journal: Journal, inherited: bytes = b"") -> None:
        self.changed, self.journal = threading.Condition(), journal
        self.owns_delivery, self.sent = False, 0
        self._store_name, self._memory = store_name, Journal(None, MEMORY_BYTES)
        self._stamps = _Stamps(session_id)
        self._warned, self._disk_retry_at = set[str](), -math.inf
        self._inherit(inherited)

    def put(self, record: Record) -> None:
        """Queue a record, and assign its id and time."""
        with self.changed:
            record.at_ms = self._stamps.next_ms()
            self._keep(record)

    def put_points(self, kind: str, run_key: str, values: Iterable[tuple[str, float, int]]) -> None:
        """Queue points (name, value, step) with a common timestamp.

        Non-finite values are omitted, because MLflow would plot infinity as 1.8e308.
        """
        with self.changed:
            now = self._stamps.next_ms()
            points = [(legal_name(n), float(v), now, step) for n, v, step in values if math.isfinite(v)]
            for start in range(0, len(points), POINTS_PER_CALL):
                self._keep(Record(kind, run_key, points=points[start : start + POINTS_PER_CALL], at_ms=now))

    def claim(self) -> bool:
        """Try to take the journal's delivery lock. Return whether this process delivers from now on."""
        self.owns_delivery = self.owns_delivery or self.journal.lock()
        return self.owns_delivery

    def waits(self) -> tuple[bool, bool]:
        """Return whether files are pending, and whether other records are."""
        answers = [self._ask(journal.waits, (False, False)) for journal in (self.journal, self._memory)]
        return any(files for files, _ in answers), any(others for _, others in answers)

    def count(self) -> Pending:
        counts = [self._ask(journal.count, Pending(0, 0, None)) for journal in (self.journal, self._memory)]
        since = min((count.since for count in counts if count.since is not None), default=None)
        return Pending(sum(count.points for count in counts), sum(count.records for count in counts), since)

    def count_in_memory(self) -> Pending:
        """Count the pending records that are in memory only."""
        return self._memory.count()

    def next_batch(self, *, files: bool, others: bool) -> list[Record]:
        """Return the next delivery: points of one run up to MLflow's limit, or a single other record.

        files, others: which kinds may be sent; other records take precedence over files.
        """
        for is_file in [False] * others + [True] * files:
            for journal in (self.journal, self._memory):
                if batch := self._ask(partial(journal.next_batch, is_file=is_file), list[Record]()):
                    return batch
        return []

    def mark_sent(self, batch: list[Record]) -> None:
        """Mark records as delivered."""
        with self.changed:
            for journal in (self.journal, self._memory):
                with contextlib.suppress(OSError):  # unmarked records are sent again by the next process: harmless
                    journal.mark_sent(batch)
            self.sent += sum(len(record.points) or 1 for record in batch)
            self.changed.notify_all()

    def pending_lines(self) -> bytes:
        """Return all pending records as lines, for a process on another machine.

        The largest files are omitted to stay below 16 MiB.
        """
        # Read memory first: a record that moves to the journal meanwhile appears twice, and its id identifies it.
        memory = self._memory.lines(MAX_PENDING_BYTES)
        return self._ask(partial(self.journal.lines, MAX_PENDING_BYTES - len(memory)), b"") + memory

    def move_to_disk(self) -> None:
        """Move records from memory to the journal until memory is empty or a write fails."""
        with self.changed:
            try:
                while any(self._memory.waits()):
                    self._move_batch()
            except OSError as error:
                self._warn_of_disk(error)

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        try:
            return question()
        except OSError as error:
            self._warn_of_disk(error)
            return otherwise

    def _inherit(self, lines: bytes) -> None:
        """Queue the pending lines of a commit, except records already delivered from this journal."""
        records, damaged = parse_all(lines)
        if damaged:
            _log.warning(
                "%d damaged lines of a commit's pending records for %s were skipped", damaged, self._store_name
            )
        try:
            if records:
                self.journal.inherit(records)
        except OSError as error:
            self._warn_of_disk(error)
            for record in records:
                self._keep_in_memory(record)

    def _keep(self, record: Record) -> None:
        record.id = self._stamps.next_id()
        if time.monotonic() >= self._disk_retry_at:
            try:
                if not any(self._memory.waits()):
                    return self.journal.append([record])
                self._move_batch()  # one batch only, because this may be the training thread
            except OSError as error:
                self._warn_of_disk(error)
        self._keep_in_memory(record)

    def _move_batch(self) -> None:
        """Move the oldest records, and the oldest file, from memory to the journal."""
        for is_file in (False, True):
            batch = self._memory.next_batch(is_file=is_file)
            self.journal.append(batch)
            self._memory.mark_sent(batch)

    def _keep_in_memory(self, record: Record) -> None:
        """Keep a record in memory. If memory is full, drop the oldest points or files, never runs or params."""
        while len(record.data) <= MEMORY_BYTES // 2:  # a larger file would displace everything else
            try:
                return self._memory.append([record])
            except OSError:
                if not self._memory.drop_oldest():
                    break
            self._warn_once("memory", "too much waits for %s: the oldest is being forgotten", self._store_name)

    def _warn_of_disk(self, error: OSError) -> None:
        """Warn once that the journal fails, and pause before the next attempt."""
        self._disk_retry_at = time.monotonic() + DISK_PAUSE_SECONDS
        self._warn_once(
            "disk",
            "the journal %s takes no more (%s): records for %s wait in memory only. "
            "Make room or correct the rights, or choose another tracking.journal.",
            *(self.journal.folder, error.strerror or error, self._store_name),
        )

    def _warn_once(self, subject: str, text: str, *values: object) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            _log.warning(text, *values)
