"""SHA-256 of data that need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from hashlib import sha256
from typing import BinaryIO

_BLOCK = 1 << 20


def digest_of_file(stream: BinaryIO) -> str:
    """Return the hex SHA-256 of a stream from its current position to its end."""
    return digest_of_blocks(iter(partial(stream.read, _BLOCK), b""))


def digest_of_blocks(blocks: Iterable[bytes]) -> str:
    """Return the hex SHA-256 of the concatenated blocks, such as those of `Store.read`."""
    digest = sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
