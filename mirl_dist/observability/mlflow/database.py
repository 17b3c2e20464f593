"""The SQLite database of a journal: opening, closing, setting aside when damaged, and read-only access.

A committed transaction survives the death of the process, because the kernel holds the data. After a power cut the mode
matters:

Write-ahead log, synchronous=NORMAL: the database stays intact but may lack the last transactions. Only checkpoints sync
the disk, and the sending thread makes them, so appends never wait for the disk.
Rollback journal, synchronous=OFF: used on network disks, which lack the shared memory that a write-ahead log needs, and
on file systems not known to support it. Syncing would block every append. A power cut may damage the database; the
damage is detected and the database is set aside.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

FILE = "pending.db"
BUSY_SECONDS = 0.25  # longest wait for another process's transaction; short, so that training is not held up
CHECKPOINT_PAGES = 10_000  # 40 MB of log, after which an append checkpoints if the sending thread has not done so
LOCAL_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}
_SIDE_FILES = ("-wal", "-shm", "-journal")

# run.processes: number of processes that have appended. records.place: number of the process that appended the record,
# negative for inherited records; delivery order is (place, n). delivered: ranges of record ids.
_TABLES = """
CREATE TABLE IF NOT EXISTS run (key TEXT NOT NULL, processes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    n INTEGER PRIMARY KEY, session TEXT NOT NULL, number INTEGER NOT NULL, place INTEGER NOT NULL,
    is_file INTEGER NOT NULL, points INTEGER NOT NULL, at_ms INTEGER NOT NULL, line BLOB NOT NULL, data BLOB,
    UNIQUE (session, number));
CREATE INDEX IF NOT EXISTS in_order ON records (is_file, place);
CREATE TABLE IF NOT EXISTS delivered (
    session TEXT, first INTEGER, last INTEGER, PRIMARY KEY (session, last)) WITHOUT ROWID;
"""
# Temporary tables of one connection, in memory. own: place of this process once it has appended; records of later
# processes are left for them to deliver. sent: ranges of delivered ids not yet deleted, for example on a full disk.
_VIEWS = """
CREATE TEMP TABLE own (place INTEGER);
CREATE TEMP TABLE sent (session TEXT, first INTEGER, last INTEGER);
CREATE TEMP VIEW waiting AS SELECT * FROM records WHERE place <= coalesce((SELECT place FROM own), 1 << 62)
    AND NOT EXISTS (SELECT 1 FROM sent WHERE sent.session = records.session AND number BETWEEN first AND last);
"""

_log = logging.getLogger("mirl_dist.tracking")
T = TypeVar("T")


class Database:
    """A journal's database, usable from all threads of one process. It opens on first use, and again after `close`."""

    def __init__(self, folder: Path | None, memory_bytes: int = 0) -> None:
        """folder: location of the file, created if missing; None keeps everything in memory, at most `memory_bytes`."""
        self._path, self._memory_bytes = folder and folder / FILE, memory_bytes
        self._guard = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._inode, self._pid = 0, os.getpid()

    def transact(self, work: Callable[[sqlite3.Connection], T], *, writes: bool = True) -> T:
        """Run `work` in one transaction and return its result. Raise OSError after rolling back on failure.

        writes: False if `work` changes temporary tables at most. If the database is damaged, it is set aside, and
        `work` is repeated once in a new one.
        """
        for is_last in (False, True):
            if os.getpid() != self._pid:  # SQLite's connections must not be used after a fork
                raise OSError("another process has opened it")
            with self._guard:
                try:
                    if self._connection is None:
                        self._connection = self._open()
                    with self._connection as connection:  # commits, or rolls back after an error
                        connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                        return work(connection)
                except sqlite3.Error as error:
                    if self._path is None or not is_damage(error) or is_last:
                        raise OSError(str(error)) from None
                    self._set_aside(self._path, error)
        raise AssertionError("the last attempt returns or raises")

    def select(self, query: str, *values: object) -> list[Any]:
        """Return the rows of a query. Raise OSError on failure."""
        return self.transact(lambda connection: connection.execute(query, values).fetchall(), writes=False)

    def checkpoint(self) -> None:
        """Checkpoint the write-ahead log. Blocks on the disk, while other threads can still append."""
        if self._path is not None and self._connection is not None:
            with contextlib.suppress(sqlite3.Error), contextlib.closing(_connect(self._path, "rw")) as connection:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """Close the database, leaving a single file, compacted if no records are pending. Idempotent."""
        with self._guard:
            if self._connection is None:
                return
            with contextlib.closing(self._connection) as connection, contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA busy_timeout = 0")
                if not connection.execute("SELECT EXISTS (SELECT 1 FROM records)").fetchone()[0]:
                    connection.execute("VACUUM")
                connection.execute("PRAGMA journal_mode = DELETE")  # refused while another process has it open
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            connection = _connect(":memory:")
            connection.execute(f"PRAGMA max_page_count = {self._memory_bytes // 4096}")
            return _with_tables(connection)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # create it here with mode 0600: SQLite's default is world-readable
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._inode = self._path.stat().st_ino
        connection = _connect(self._path, "rw")
        try:
            if (damage := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(" ".join(damage.split()))
            wanted = "WAL" if _is_local(self._path.parent) else "TRUNCATE"
            mode = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()[0]
            connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'OFF'}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            return _with_tables(connection)
        except BaseException:
            connection.close()
            raise

    def _set_aside(self, path: Path, error: sqlite3.Error) -> None:
        """Rename a damaged database, unless another process has already done so."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        if path.stat().st_ino != self._inode:
            return
        aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
        for ending in (*_SIDE_FILES, ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}{ending}", f"{aside}{ending}")
        _log.warning(
            "the journal %s is damaged (%s) and set aside as %s. MLflow does not get the records in it, unless the "
            "last commit has them too. Read what is left with `sqlite3 %s .recover`, or remove it.",
            *(path, error, aside, aside),
        )


def is_damage(error: Exception) -> bool:
    """Whether an error means a damaged file or no SQLite database at all.

    Its subclasses mean other failures: full disk, locks, permissions.
    """
    return type(error) is sqlite3.DatabaseError


def open_read_only(folder: Path) -> sqlite3.Connection | None:
    """Open a folder's database without changing it; None if it does not exist or has no tables yet.

    Raise sqlite3.Error or OSError on failure.
    """
    path = folder / FILE
    try:
        path.stat()
    except FileNotFoundError:
        return None
    for mode in ("ro", "rw"):  # "rw" lets SQLite roll back an incomplete transaction of a killed process
        connection = _connect(path, mode)
        try:
            begun = connection.execute("SELECT EXISTS (SELECT 1 FROM sqlite_master)").fetchone()[0]
            return connection if begun else None
        except sqlite3.OperationalError:
            if mode == "rw":
                raise
    raise AssertionError("the last mode returns or raises")


def _connect(path: Path | str, mode: str = "memory") -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}" if isinstance(path, Path) else path
    return sqlite3.connect(uri, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)


def _with_tables(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT; {_VIEWS}")
    connection.execute("INSERT INTO run SELECT ?, 0 WHERE NOT EXISTS (SELECT 1 FROM run)", (uuid.uuid4().hex,))
    return connection


def _is_local(folder: Path) -> bool:
    """Whether a folder is on a local file system; False if unknown."""
    place = folder.resolve()
    try:
        mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    except OSError:
        return False
    innermost = max(reversed(mounts), key=lambda mount: len(mount.mountpoint), default=None)  # the last one of equals
    return innermost is not None and innermost.fstype in LOCAL_DISKS
