"""Pending records of a run, written to disk before they are sent, and read by later processes of the run.

    <folder>/pending.db    SQLite database: records, file contents, ids of delivered records
    <folder>/lock          locked by the one process that delivers

While a process has the database open, SQLite keeps its own files beside it (-wal and -shm, or -journal).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow.database import FILE, Database, is_damage, open_read_only
from mirl_dist.observability.mlflow.records import POINTS_PER_CALL, DamagedRecord, Record, parse, to_line

_log = logging.getLogger("mirl_dist.tracking")


class Pending(NamedTuple):
    """Counts of pending points and other records. since: wall-clock seconds of the oldest, None if there are none."""

    points: int
    records: int
    since: float | None


class Journal(Database):
    """The pending records of one run, usable from all threads of one process.

    folder: created if missing; None keeps the records in memory, at most `memory_bytes`. Methods that fail raise
    OSError and change nothing. A damaged database is set aside with a warning and replaced.
    """

    def __init__(self, folder: Path | None, memory_bytes: int = 0) -> None:
        super().__init__(folder, memory_bytes)
        self.folder = folder
        self._lock = -1

    def append(self, records: Sequence[Record]) -> None:
        """Store records. Once this returns, they survive the death of this process."""

        def insert(connection: sqlite3.Connection) -> None:
            place = connection.execute("SELECT place FROM own").fetchone()
            if place is None:
                connection.execute("UPDATE run SET processes = processes + 1")
                connection.execute("INSERT INTO own SELECT processes FROM run")
                place = connection.execute("SELECT place FROM own").fetchone()
            connection.executemany(_INSERT, [_row(record, *place) for record in records])

        self.transact(insert)

    def inherit(self, records: Sequence[Record]) -> None:
        """Store a commit's records except those already delivered, and schedule them first, in this order."""
        rows = [_row(record, place) for place, record in enumerate(records, -len(records))]
        self.transact(lambda connection: connection.executemany(_INSERT, rows))

    def next_batch(self, *, is_file: bool) -> list[Record]:
        """Return the next delivery: points of one run up to MLflow's limit, or a single other record.

        is_file: return a file, otherwise other records. Damaged records are dropped with a warning.
        """
        damaged = list[tuple[str, int]]()

        def select(connection: sqlite3.Connection) -> list[Record]:
            batch, points = list[Record](), 0
            query = "SELECT session, number, line, data FROM waiting WHERE is_file = ? ORDER BY place, n"
            for session, number, line, data in connection.execute(query, (is_file,)):
                try:
                    record = parse(line, data)
                    if record.id != f"{session}-{number}":
                        raise DamagedRecord(f"its id there is {record.id}")
                except DamagedRecord as error:
                    _log.warning("%s: record %s-%s is damaged (%s) and left out", self.folder, session, number, error)
                    damaged.append((session, number))
                    continue
                points += len(record.points)
                first = batch[0] if batch else record
                if batch and (record.kind != "points" or record.run_key != first.run_key or points > POINTS_PER_CALL):
                    break
                batch.append(record)
                if record.kind != "points":
                    break
            return batch

        batch = self.transact(select, writes=False)
        if damaged:
            self._drop(damaged)
        return batch

    def mark_sent(self, records: Sequence[Record]) -> None:
        """Mark records as delivered. After an OSError this is still remembered in memory, for this process only."""
        self._drop([_split(record.id) for record in records])

    def waits(self) -> tuple[bool, bool]:
        """Return whether files are pending, and whether other records are."""
        query = "SELECT {0} WHERE is_file = 1), {0} WHERE is_file = 0)".format("EXISTS (SELECT 1 FROM waiting")
        files, others = self.select(query)[0]
        return bool(files), bool(others)

    def count(self) -> Pending:
        return self.transact(lambda connection: _count(connection, "waiting"), writes=False)

    def lines(self, most: int) -> bytes:
        """Return all pending records as lines, files last. The largest files are omitted to stay below `most` bytes."""
        lines = [line for (line,) in self.select("SELECT line FROM waiting WHERE is_file = 0 ORDER BY place, n")]
        query = "SELECT n, length(line) + length(data) * 4 / 3 FROM waiting WHERE is_file = 1 ORDER BY place, n"
        sizes = dict[int, int](self.select(query))
        total = sum(map(len, lines)) + sum(sizes.values())
        for n in sorted(sizes, key=lambda n: -sizes[n]):
            if total > most:
                total -= sizes.pop(n)
        for n in sizes:
            for line, data in self.select("SELECT line, data FROM waiting WHERE n = ?", n):
                with contextlib.suppress(DamagedRecord):
                    lines.append(to_line(parse(line, data)))
        return b"".join(lines)

    def drop_oldest(self) -> bool:
        """Drop the oldest record with points or a file. Return False if none exists."""
        oldest = "SELECT n FROM records WHERE points > 0 OR is_file = 1 ORDER BY n LIMIT 1"
        delete = f"DELETE FROM records WHERE n = ({oldest})"
        return self.transact(lambda connection: connection.execute(delete).rowcount > 0)

    def read_key(self) -> str:
        """Return the run's key in the store, 32 hex digits, the same for all processes with this folder."""
        return str(self.select("SELECT key FROM run")[0][0])

    def lock(self) -> bool:
        """Try to take the delivery lock; return whether this process holds it. The kernel releases it at exit."""
        if self.folder is None:
            return True
        try:
            if self._lock < 0:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks, or no files, on this file system; delivery is idempotent, so two do no harm
            pass
        return True

    def close(self) -> None:
        """Close the database and release the delivery lock. Idempotent."""
        super().close()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _drop(self, ids: Sequence[tuple[str, int]]) -> None:
        """Delete records and mark them as delivered, first in memory for this process, then on disk."""
        ranges: list[list[Any]] = []
        for session, number in ids:
            if ranges and ranges[-1][0] == session and ranges[-1][2] == number - 1:
                ranges[-1][2] = number
            else:
                ranges.append([session, number, number])
        self.transact(lambda c: c.executemany("INSERT INTO sent VALUES (?, ?, ?)", ranges), writes=False)

        def delete(connection: sqlite3.Connection) -> None:
            for session, first, last in connection.execute("SELECT * FROM sent").fetchall():
                ids = "session = ? AND number BETWEEN ? AND ?"
                connection.execute(f"DELETE FROM records WHERE {ids}", (session, first, last))
                joined = "UPDATE delivered SET last = ? WHERE session = ? AND last = ? - 1"
                if connection.execute(joined, (last, session, first)).rowcount == 0:
                    connection.execute("INSERT OR IGNORE INTO delivered VALUES (?, ?, ?)", (session, first, last))
            connection.execute("DELETE FROM sent")

        self.transact(delete)


def pending_records(folder: Path) -> Pending:
    """Count the pending records of a journal without changing it, whether or not its run is active.

    Raise UserError if the journal is damaged or unreadable.
    """
    try:
        if (connection := open_read_only(folder)) is None:
            return Pending(0, 0, None)
        with contextlib.closing(connection):
            return _count(connection, "records")
    except (OSError, sqlite3.Error) as error:
        if is_damage(error):
            remedy = "The next launch of the run sets it aside, and so does `mirl-dist track resend RUN`"
            raise UserError(f"found the journal {folder / FILE} damaged ({error}). {remedy}.") from None
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"found the journal {folder}, which cannot be read: {cause}. Ask its owner, or correct the rights."
        ) from None


# Skips delivered records. A record that is present already moves only if it is inherited (negative places): one that
# waited in memory and is stored now must not fall behind later records, whose steps MLflow already has then.
_INSERT = """
INSERT INTO records (session, number, place, is_file, points, at_ms, line, data) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8
WHERE NOT EXISTS (SELECT 1 FROM delivered WHERE session = ?1 AND ?2 BETWEEN first AND last)
ON CONFLICT (session, number) DO UPDATE SET place = CASE WHEN excluded.place < 0 THEN excluded.place ELSE place END
"""


def _row(record: Record, place: int) -> tuple[object, ...]:
    """Return the values of _INSERT for a record."""
    data = record.data if record.kind == "file" else None
    counts = place, data is not None, len(record.points), record.at_ms
    return (*_split(record.id), *counts, to_line(record, with_data=False), data)


def _split(id_: str) -> tuple[str, int]:
    session, _, number = id_.rpartition("-")
    return session, int(number)


def _count(connection: sqlite3.Connection, table: str) -> Pending:
    query = f"SELECT coalesce(sum(points), 0), coalesce(sum(points = 0), 0), min(at_ms) / 1000.0 FROM {table}"
    return Pending(*connection.execute(query).fetchone())
