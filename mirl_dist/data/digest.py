"""SHA-256 of what need not fit into memory."""

from __future__ import annotations

from hashlib import sha256
from typing import BinaryIO

_BLOCK = 1 << 20


def digest_of(stream: BinaryIO) -> str:
    """Hex SHA-256 of a stream from where it stands to its end."""
    digest = sha256()
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
