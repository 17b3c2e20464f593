"""Writes JSON in one form, so that equal values have equal bytes and equal digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """The text of a file of plain values. default: makes plain values of others, which are errors without it."""
    return (json.dumps(value, indent=1, sort_keys=True, default=default) + "\n").encode()


def digest_of_json(value: Any) -> str:
    """Hex SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
