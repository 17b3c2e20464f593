"""SHA-256 of data that need not fit into memory."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from typing import BinaryIO

_BLOCK = 1 << 20


def digest_of_file(stream: BinaryIO) -> str:
    """Return the hex SHA-256 of a stream from its current position to its end (hashlib.file_digest, for 3.10 too)."""
    digest = sha256()
    for block in iter(partial(stream.read, _BLOCK), b""):
        digest.update(block)
    return digest.hexdigest()
