"""Canonical JSON: equal values have equal bytes and equal digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """Return indented UTF-8 JSON with sorted keys and a final newline.

    default: converts values that JSON does not know, as for json.dumps; without it they raise TypeError.
    """
    return (json.dumps(value, indent=1, sort_keys=True, default=default) + "\n").encode()


def digest_of_json(value: Any) -> str:
    """Return the hex SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
