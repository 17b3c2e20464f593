"""The interface of every store, and the three errors that a store may raise.

Names are relative paths separated by '/'. Writes are atomic: an object is complete or does not exist. Only NotFound may
be handled as 'start from scratch'; the other two errors never mean that the object is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mirl_dist.errors import UserError


class StorageError(UserError):
    """Base of all store errors. The message states the location, the cause and the remedy."""


class NotFound(StorageError):
    """The name does not exist."""


class Rejected(StorageError):
    """A permanent failure that no retry can fix: missing rights (in S3: AccessDenied), a wrong address, a changed or
    damaged object. It never means that the object is missing."""


class Unavailable(StorageError):
    """A transient failure: the request is valid, but the store is full, unreachable, or on a faulty device."""

    resumable = True


@dataclass(frozen=True)
class Options:
    """Connection options of a store; None means the default of the store or its environment.

    endpoint: http(s)://host:port of an S3 server. encryption: 'AES256', or 'aws:kms' with the key id in `kms_key`.
    patience_seconds: how long to retry a failed request; 0 for a single attempt.
    """

    endpoint: str | None = None
    encryption: str | None = None
    kms_key: str | None = None
    patience_seconds: float = 300.0


DEFAULT_OPTIONS = Options()

DAY = 86400.0
"""Seconds in a day. An upload older than this is considered abandoned."""


class Store(Protocol):
    """Interface of all stores.

    put, put_file: write durably and atomically, replacing an existing object.
    put_if_absent: write unless the name exists; True if this call wrote it. Exactly one of several writers succeeds.
    list: full names of the objects below a prefix (a folder's name, or '' for all), sorted.
    remove: delete; no error if the name does not exist.
    sweep: delete what crashed writers left behind; in buckets, uploads started more than `older_than_seconds` ago
    (0: all, for a caller that knows of no other writer).
    where: the location as text for messages.
    size: in bytes.
    read: yield the bytes from `offset` to the end in blocks. May raise Unavailable midway; the caller then resumes with
    a second call from the offset it has reached.
    """

    def put(self, name: str, data: bytes) -> None: ...
    def put_if_absent(self, name: str, data: bytes) -> bool: ...
    def get(self, name: str) -> bytes: ...
    def exists(self, name: str) -> bool: ...
    def list(self, prefix: str) -> list[str]: ...
    def remove(self, name: str) -> None: ...
    def sweep(self, older_than_seconds: float = DAY) -> None: ...
    def where(self, name: str = "") -> str: ...

    # For objects that need not fit into memory.
    def put_file(self, name: str, path: Path) -> None: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str, offset: int = 0) -> Iterator[bytes]: ...
