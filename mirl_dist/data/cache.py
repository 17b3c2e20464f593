"""Caches complete, verified shards on a node, shared by all its processes, within a limit in bytes.

    <folder>/<sha256>.tar                  a file with that digest
    <folder>/<sha256>.<bytes>.damaged      the store's version of a shard that is damaged in the store
    <folder>/<sha256>.<bytes>.tar.partial  a download in progress, or an interrupted one that the next process resumes
    <folder>/room.lock                     held while a file is added, removed or renamed

All coordination uses `flock`, which the kernel releases when a process dies. A download holds an exclusive lock on its
partial file, and a reader a shared lock on the complete file. Only unlocked files are evicted, least recently used
first. The folder must be on a local disk: network file systems may not support these locks.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mirl_dist.errors import UserError
from mirl_dist.storage import Unavailable
from mirl_dist.storage.hashing import digest_of_file

_FILE_NAME = re.compile(r"[0-9a-f]{64}(\.tar|\.\d+\.damaged|\.(?P<bytes>\d+)\.(tar|damaged)\.partial)")
_PAUSE_SECONDS = 0.05
Fetch = Callable[[Path], None]
"""Downloads the rest of a file, starting at its current length."""


class WrongBytes(Exception):
    """A complete download does not have the requested digest."""


class CachedShard:
    """A cached file that cannot be evicted until `release`.

    fresh: downloaded by this `acquire`, which has already verified its digest.
    """

    def __init__(self, path: Path, handle: int, fresh: bool) -> None:
        self.path, self._handle, self.fresh = path, handle, fresh

    @property
    def state(self) -> tuple[int, int]:
        """Inode and size in bytes. They identify the content, because complete files are never modified."""
        stat = os.fstat(self._handle)
        return stat.st_ino, stat.st_size

    def digest(self) -> str:
        """Return the hex SHA-256 of the open file, even if its path now names another file."""
        with open(os.dup(self._handle), "rb") as stream:
            stream.seek(0)
            return digest_of_file(stream)

    def is_in_place(self) -> bool:
        """Return whether its path still names this file."""
        return _names(self.path, self._handle)

    def release(self) -> None:
        """Allow the cache to evict the file. Idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class ShardCache:
    """A cache folder of at most `limit` bytes. Processes that share a folder should use the same limit."""

    def __init__(self, folder: Path, limit: int, patience: float = 600.0) -> None:
        """patience: seconds to wait until others release files. Raises UserError if the folder cannot be written."""
        self.folder, self.limit, self._patience = folder, limit, patience
        with self._user_errors():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "room.lock").touch()

    def acquire(
        self, digest: str, size: int, fetch: Fetch, stop: Callable[[], bool] = lambda: False, *, damaged: bool = False
    ) -> CachedShard:
        """Return the file with that SHA-256, downloading it with `fetch` if it is not cached.

        Of several concurrent callers, one downloads. damaged: accept whatever `fetch` writes, without verification.
        Raises WrongBytes if the download has another digest (it is removed), Unavailable if no space became free in
        time, and UserError if the file exceeds the limit or `stop` returned True.
        """
        if size > self.limit:
            raise UserError(
                f"data.cache.gigabytes: found {self.limit / 1e9:g}, but one shard has {size / 1e9:.3g} GB. Raise it."
            )
        ending = "damaged" if damaged else "tar"
        whole = self.folder / (f"{digest}.{size}.damaged" if damaged else f"{digest}.tar")
        partial = self.folder / f"{digest}.{size}.{ending}.partial"
        last = time.monotonic() + self._patience
        with self._user_errors():
            while not stop():
                handle = _lock_file(whole, fcntl.LOCK_SH)
                if handle is not None:
                    os.utime(handle)
                    return CachedShard(whole, handle, fresh=False)
                handle = self._claim_partial(whole, partial, size)
                if handle is not None:
                    return self._download(whole, partial, handle, None if damaged else digest, fetch)
                if time.monotonic() > last and not partial.exists():
                    used = sum(file_bytes for _, file_bytes, _ in self._list_files())
                    raise Unavailable(
                        f"the cache {self.folder} has no room for {size / 1e9:.3g} GB: of its {self.limit / 1e9:g} GB "
                        f"{used / 1e9:.3g} GB are in use. Raise data.cache.gigabytes, or choose a folder of its own "
                        "for each run."
                    )
                time.sleep(_PAUSE_SECONDS)
        raise UserError(f"{whole}: the work that wanted this file has ended.")

    def discard(self, shard: CachedShard) -> None:
        """Release a corrupt file and remove it, unless its path already names another file."""
        try:
            with self._user_errors(), self._room_lock():
                if shard.is_in_place():
                    shard.path.unlink()
        finally:
            shard.release()

    def _claim_partial(self, whole: Path, partial: Path, size: int) -> int | None:
        """Open the partial file with an exclusive lock, reserving space for it; None if that is not possible yet."""
        with self._room_lock():
            if not partial.exists():
                if whole.exists() or not self._make_room(size):
                    return None
                partial.touch()
            return _lock_file(partial, fcntl.LOCK_EX)

    def _download(self, whole: Path, partial: Path, handle: int, digest: str | None, fetch: Fetch) -> CachedShard:
        shard = CachedShard(whole, handle, fresh=True)
        try:
            fetch(partial)
            if digest is not None and shard.digest() != digest:
                partial.unlink(missing_ok=True)
                raise WrongBytes(str(partial))
            os.fsync(handle)
            # Converting a lock is not atomic: the room lock prevents eviction meanwhile, and a claim of `partial` that
            # would see neither name.
            with self._room_lock():
                os.rename(partial, whole)
                fcntl.flock(handle, fcntl.LOCK_SH)
        except BaseException:
            shard.release()
            raise
        return shard

    def _make_room(self, size: int) -> bool:
        """Evict unlocked files, least recently used first, until `size` more bytes fit; return whether they fit."""
        files = sorted(self._list_files())
        total = sum(file_bytes for _, file_bytes, _ in files)
        for _, file_bytes, path in files:
            if total + size <= self.limit:
                break
            handle = _lock_file(path, fcntl.LOCK_EX)
            if handle is not None:
                path.unlink(missing_ok=True)
                os.close(handle)
                total -= file_bytes
        return total + size <= self.limit

    def _list_files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the files of the cache: time of last use, size in bytes (of a partial file: its final size), path."""
        for entry in os.scandir(self.folder):
            if match := _FILE_NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    yield stat.st_mtime, int(match.group("bytes") or stat.st_size), Path(entry.path)

    @contextmanager
    def _room_lock(self) -> Iterator[None]:
        with (self.folder / "room.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the cache {self.folder}: {error.strerror or error}. Make room or allow it, or choose another "
                "data.cache.folder."
            ) from None


def _lock_file(path: Path, kind: int) -> int | None:
    """Open and lock the file at `path`; None if it does not exist or a conflicting lock is held."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError):
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        if _names(path, handle):  # it may have been renamed or removed before the lock
            return handle
    os.close(handle)
    return None


def _names(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
