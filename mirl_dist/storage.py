"""The door to storage: put, get, list, remove on a folder; other kinds of store are further classes with the same law.

Names are relative, with '/' between parts. A name exists complete or not at all: data goes to a temporary name,
is flushed to the disk, and is renamed. Three errors only; of these, NotThere alone may mean 'begin afresh'.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mirl_dist.faults import Fault

_TEMPORARY = ".writing-"


class StorageError(Fault):
    """What a store may raise; the text names the place, the cause, and what to do."""


class NotThere(StorageError):
    """The name does not exist."""


class NotAllowed(StorageError):
    """The store refused: rights, or a place that is not what it should be. Never read as 'not there'."""


class TryAgain(StorageError):
    """Nothing is wrong with the request; the store could not take it now (full, or a fault of the device)."""


class Store(Protocol):
    """What every store can do."""

    def put(self, name: str, data: bytes) -> None: ...
    def put_if_absent(self, name: str, data: bytes) -> bool: ...
    def get(self, name: str) -> bytes: ...
    def exists(self, name: str) -> bool: ...
    def list(self, prefix: str) -> list[str]: ...
    def remove(self, name: str) -> None: ...
    def sweep(self) -> None: ...
    def where(self, name: str = "") -> str: ...


class Folder:
    """A store in a directory of this machine (or of a file system that all nodes share)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def where(self, name: str = "") -> str:
        """The place for people and messages."""
        return str(self._root / name) if name else str(self._root)

    def put(self, name: str, data: bytes) -> None:
        """Write `name` durably, complete or not at all; replaces what was there."""
        path = self._root / name
        with self._named_errors(name), self._written(path, data) as temporary:
            os.replace(temporary, path)
            _flush_folder(path.parent)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; whether this call wrote it. Of several writers exactly one wins."""
        path = self._root / name
        with self._named_errors(name), self._written(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _flush_folder(path.parent)
            return True

    def get(self, name: str) -> bytes:
        with self._named_errors(name):
            return (self._root / name).read_bytes()

    def exists(self, name: str) -> bool:
        with self._named_errors(name):
            return (self._root / name).is_file()

    def list(self, prefix: str) -> list[str]:
        """Complete names below `prefix` (a folder name, or '' for all), sorted."""
        with self._named_errors(prefix):
            found = []
            for folder, _, files in os.walk(self._root / prefix, onerror=_refuse_unless_gone):
                found += [Path(folder, f).relative_to(self._root) for f in files if not f.startswith(_TEMPORARY)]
            return sorted(path.as_posix() for path in found)

    def remove(self, name: str) -> None:
        """Remove `name` if it is there, and folders that this leaves empty."""
        with self._named_errors(name):
            path = self._root / name
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == self._root or not parent.is_dir() or any(parent.iterdir()):
                    return
                parent.rmdir()

    def sweep(self) -> None:
        """Remove what dead writers left under temporary names."""
        with self._named_errors(""):
            for leftover in self._root.rglob(f"{_TEMPORARY}*"):
                leftover.unlink(missing_ok=True)

    @contextmanager
    def _written(self, path: Path, data: bytes) -> Iterator[str]:
        """A flushed temporary file beside `path`, gone afterwards."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            Path(temporary).unlink(missing_ok=True)

    @contextmanager
    def _named_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotThere(f"{self.where(name)} does not exist") from error
        except OSError as error:
            said = f"{self.where(name)}: {error.strerror or error}. Nothing is half-written; what was there before is"
            if error.errno in _PASSING:
                raise TryAgain(f"{said} intact. Make room or repair the disk, then start again.") from error
            raise NotAllowed(f"{said} intact. Correct the rights, or choose another folder.") from error


_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE)


def _refuse_unless_gone(error: OSError) -> None:
    """A folder that may not be read is not an empty one."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_store(url: str) -> Store:
    """The store that a folder name means. Raises NotAllowed for a kind of address that this version does not know."""
    if "://" in url:
        raise NotAllowed(f"{url}: this version keeps runs in folders; give a path")
    return Folder(Path(url).expanduser())
