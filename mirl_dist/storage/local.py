"""A store in a directory: data is written to a temporary file, fsynced, and renamed. See `Store` for its methods."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mirl_dist.storage.base import DAY, NotFound, Rejected, Unavailable

_TEMPORARY = ".writing-"
_BLOCK = 1 << 20
_ATTEMPTS = 100


class Folder:
    """A store in a local directory, or one on a file system shared by all nodes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def where(self, name: str = "") -> str:
        return str(self._root / name) if name else str(self._root)

    def put(self, name: str, data: bytes) -> None:
        self._replace(name, lambda file: file.write(data))

    def put_file(self, name: str, path: Path) -> None:
        def copy(file: BinaryIO) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, _BLOCK)

        self._replace(name, copy)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self._root / name
        with self._map_errors(name), self._temporary_file(path, lambda file: file.write(data)) as temporary:
            try:
                os.link(temporary, path)  # unlike a rename, fails if the name exists
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise Rejected(
                    f"{self.where(name)}: this file system has no hard links ({error.strerror}), by which one of "
                    "several launches takes a run. Choose a folder on another file system."
                ) from error
            _flush_folder(path.parent)
            return True

    def get(self, name: str) -> bytes:
        with self._map_errors(name):
            return (self._root / name).read_bytes()

    def size(self, name: str) -> int:
        """Return the size in bytes. Raise NotFound for anything but a file."""
        with self._map_errors(name):
            path = self._root / name
            if not path.is_file():
                raise FileNotFoundError(str(path))
            return path.stat().st_size

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        with self._map_errors(name), (self._root / name).open("rb") as file:
            file.seek(offset)
            while block := file.read(_BLOCK):
                yield block

    def exists(self, name: str) -> bool:
        with self._map_errors(name):
            return (self._root / name).is_file()

    def list(self, prefix: str) -> list[str]:
        """Return the full names of all complete files below `prefix` (a folder's name, or '' for all), sorted."""
        with self._map_errors(prefix):
            paths = []
            for folder, _, files in os.walk(self._root / prefix, onerror=_raise_unless_missing):
                paths += [Path(folder, f).relative_to(self._root) for f in files if not f.startswith(_TEMPORARY)]
            return sorted(path.as_posix() for path in paths)

    def remove(self, name: str) -> None:
        """Delete `name` if it exists, and the folders that this leaves empty."""
        with self._map_errors(name):
            path = self._root / name
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == self._root or not _remove_if_empty(parent):
                    return

    def sweep(self, older_than_seconds: float = DAY) -> None:
        """Delete all temporary files of crashed writers, whatever their age. Nothing else may write meanwhile."""
        with self._map_errors(""):
            for leftover in self._root.rglob(f"{_TEMPORARY}*"):
                leftover.unlink(missing_ok=True)

    def _replace(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        path = self._root / name
        with self._map_errors(name), self._temporary_file(path, write) as temporary:
            os.replace(temporary, path)
            _flush_folder(path.parent)

    @contextmanager
    def _temporary_file(self, path: Path, write: Callable[[BinaryIO], object]) -> Iterator[str]:
        """Yield the path of an fsynced temporary file in the folder of `path`; delete the file afterwards."""
        temporary = str(path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            with _open_new(temporary, path.parent) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            Path(temporary).unlink(missing_ok=True)

    @contextmanager
    def _map_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{self.where(name)} does not exist") from error
        except OSError as error:
            text = f"{self.where(name)}: {error.strerror or error}. Nothing is half-written; what was there before is"
            if error.errno in _TRANSIENT_ERRNOS:
                raise Unavailable(f"{text} intact. Make room or repair the disk, then start again.") from error
            raise Rejected(f"{text} intact. Correct the rights, or choose another folder.") from error


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_TRANSIENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE)


def _raise_unless_missing(error: OSError) -> None:
    """Raise all errors but FileNotFoundError, so that an unreadable folder is not listed as empty."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _open_new(path: str, folder: Path) -> BinaryIO:
    """Create a file with umask permissions (unlike `tempfile`'s), so that other users can read it."""
    for _ in range(_ATTEMPTS):
        _make_folder(folder)
        with suppress(FileNotFoundError):  # a concurrent `remove` deleted the empty folder
            return open(path, "xb")
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents durably: each one survives a power failure."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError, FileNotFoundError):  # concurrent mkdir, or parent deleted: `_open_new` retries
        folder.mkdir()
        _flush_folder(folder.parent)


def _remove_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _flush_folder(folder: Path) -> None:
    """Fsync a folder, so that changes of names in it survive a power failure."""
    with suppress(FileNotFoundError):  # the name and its folder were deleted concurrently
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
