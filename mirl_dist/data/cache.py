"""Keeps whole, verified files on this node, shared by all its processes, within a limit in bytes.

    <folder>/<sha256>.tar                  a file whose bytes have that digest
    <folder>/<sha256>.<bytes>.damaged      what the store has instead, where it has something else
    <folder>/<sha256>.<bytes>.tar.partial  a download in progress, or of a process that died: the next one goes on
    <folder>/room.lock                     held while a file is added, removed or renamed

Everything rests on locks that the kernel takes back from a process that dies: a process that downloads a file holds
its partial alone, one that uses a file shares a lock on it, and only what nobody holds is removed, the longest unused
first. The folder lies on a disk of the node: network file systems may not keep such locks.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mirl_dist.errors import UserError
from mirl_dist.storage import Unavailable
from mirl_dist.storage.hashing import digest_of_file

_FILE_NAME = re.compile(r"[0-9a-f]{64}(\.tar|\.\d+\.damaged|\.(?P<bytes>\d+)\.(tar|damaged)\.partial)")
_PAUSE_SECONDS = 0.05
Fetch = Callable[[Path], None]
"""Completes a file from its present length on."""


class WrongBytes(Exception):
    """A file was downloaded whole, and does not have the digest that was asked for."""


class CachedShard:
    """A file in the cache that stays there until `release`. fresh: this call downloaded it, and knows its bytes."""

    def __init__(self, path: Path, handle: int, fresh: bool) -> None:
        self.path, self._handle, self.fresh = path, handle, fresh

    @property
    def state(self) -> tuple[int, int]:
        """Inode and size, which tell it from other files; nobody changes a file once it has its name."""
        stat = os.fstat(self._handle)
        return stat.st_ino, stat.st_size

    def digest(self) -> str:
        """Hex SHA-256 of this very file, whatever lies at its path now."""
        with open(os.dup(self._handle), "rb") as stream:
            stream.seek(0)
            return digest_of_file(stream)

    def matches(self, digest: str) -> bool:
        """Whether its bytes can be read and have that SHA-256."""
        try:
            return self.digest() == digest
        except OSError:
            return False

    def is_in_place(self) -> bool:
        """Whether it is still the file at its path."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the file back to the cache; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class _CacheFile(NamedTuple):
    path: Path
    bytes: int
    used: float


class ShardCache:
    """A folder of at most `limit` bytes. Any number of processes may use one; all should set the same limit."""

    def __init__(self, folder: Path, limit: int, patience: float = 600.0) -> None:
        """patience: seconds to wait for room that others hold. Raises UserError for a folder that cannot be written."""
        self.folder, self.limit, self._patience = folder, limit, patience
        with self._user_errors():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "room.lock").touch()

    def acquire(
        self, digest: str, size: int, fetch: Fetch, stop: Callable[[], bool] = lambda: False, *, damaged: bool = False
    ) -> CachedShard:
        """Give the file with that SHA-256, downloaded by `fetch` unless it is there, by one of many that ask at once.

        damaged: whatever `fetch` gives in its place, unverified. Raises WrongBytes when other bytes were downloaded
        (they are removed), Unavailable when there was no room for long, UserError when there can never be or `stop`
        says that the file is not needed any more.
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
                    raise Unavailable(self._no_room_text(size))
                time.sleep(_PAUSE_SECONDS)
        raise UserError(f"{whole}: the work that wanted this file has ended.")

    def discard(self, shard: CachedShard) -> None:
        """Release and remove a file with wrong bytes, but not another that has taken its place."""
        try:
            with self._user_errors(), self._room_lock():
                if shard.is_in_place():
                    shard.path.unlink()
        finally:
            shard.release()

    def _claim_partial(self, whole: Path, partial: Path, size: int) -> int | None:
        """Open the partial file, locked for this caller alone, and make room for it; None when that fails now."""
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
            with self._room_lock():  # between one lock and the other nobody may remove it, and nobody see neither name
                os.rename(partial, whole)
                fcntl.flock(handle, fcntl.LOCK_SH)
        except BaseException:
            shard.release()
            raise
        return shard

    def _make_room(self, size: int) -> bool:
        """Remove what nobody holds, longest unused first, until `size` more bytes fit."""
        files = sorted(self._list_files(), key=lambda file: file.used)
        total = sum(file.bytes for file in files)
        for file in files:
            if total + size <= self.limit:
                break
            handle = _lock_file(file.path, fcntl.LOCK_EX)
            if handle is not None:
                file.path.unlink(missing_ok=True)
                os.close(handle)
                total -= file.bytes
        return total + size <= self.limit

    def _list_files(self) -> Iterator[_CacheFile]:
        """Files of the cache; a download in progress counts whole."""
        for entry in os.scandir(self.folder):
            match = _FILE_NAME.fullmatch(entry.name)
            if match is not None:
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                yield _CacheFile(Path(entry.path), int(match.group("bytes") or stat.st_size), stat.st_mtime)

    def _no_room_text(self, size: int) -> str:
        used = sum(file.bytes for file in self._list_files())
        return (
            f"the cache {self.folder} has no room for {size / 1e9:.3g} GB: of its {self.limit / 1e9:g} GB "
            f"{used / 1e9:.3g} GB are in use. Raise data.cache.gigabytes, or choose a folder of its own for each run."
        )

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
    """Open and lock the file that lies at `path` now; None where there is none or another holds it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None
