"""The interface of every store, and the three errors that it may raise.

Names are relative, with '/' between parts. A name exists complete or not at all. Three kinds of error only; of these,
NotFound alone may mean 'begin afresh'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mirl_dist.errors import UserError


class StorageError(UserError):
    """What a store may raise; the text names the place, the cause, and what to do."""


class NotFound(StorageError):
    """The name does not exist."""


class Rejected(StorageError):
    """The store will not do this, however often it is asked: missing rights (in S3: AccessDenied), a wrong address, a
    changed or damaged object. Never read as 'not there'."""


class Unavailable(StorageError):
    """Nothing is wrong with the request; the store cannot take it now (full, unreachable, or a faulty device)."""

    resumable = True


@dataclass(frozen=True)
class Options:
    """How a store is talked to; None: as its own settings say. endpoint: http(s)://host:port of an S3 server;
    encryption: 'AES256' or 'aws:kms', with the key's id; patience_seconds: of trying again, 0 for one try."""

    endpoint: str | None = None
    encryption: str | None = None
    kms_key: str | None = None
    patience_seconds: float = 300.0


DEFAULT_OPTIONS = Options()

DAY = 86400.0
"""Seconds: no upload that is alive takes so long."""


class Store(Protocol):
    """What every store can do.

    put, put_file: durably, complete or not at all, replacing what was there. put_if_absent: whether this call wrote it;
    of several writers exactly one wins. list: complete names below a prefix (a folder's name, or '' for all), sorted.
    remove: no error where nothing is. sweep: removes what dead writers left; in buckets, what began more than
    `older_than_seconds` ago (0: all, for a caller who knows that nobody else writes here). where: the place, for people
    and messages. size: bytes. read: the bytes from `offset` to the end in blocks; Unavailable may come after some of
    them, and a second call from where it broke goes on.
    """

    def put(self, name: str, data: bytes) -> None: ...
    def put_if_absent(self, name: str, data: bytes) -> bool: ...
    def get(self, name: str) -> bytes: ...
    def exists(self, name: str) -> bool: ...
    def list(self, prefix: str) -> list[str]: ...
    def remove(self, name: str) -> None: ...
    def sweep(self, older_than_seconds: float = DAY) -> None: ...
    def where(self, name: str = "") -> str: ...

    # Large things, which need not fit into memory.
    def put_file(self, name: str, path: Path) -> None: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str, offset: int = 0) -> Iterator[bytes]: ...
