"""JSON from a stranger: no key twice, no NaN, bounded in depth and size, nothing that would upset a terminal."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MOST_BYTES, MOST_VALUES, DEEPEST = 2 << 20, 50_000, 16
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def parse(text: bytes) -> Any:
    """The tree of a JSON text in UTF-8; integers have at most 18 digits. Raises ValueError, saying what is wrong."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text):,} bytes of text")
    try:
        tree = json.loads(
            text.decode(), object_pairs_hook=_once, parse_int=_integer, parse_float=_real, parse_constant=_real
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _bound(tree)
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > 18:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _bound(tree: Any) -> None:
    """Level by level, since a tree may be deeper than Python's stack."""
    level, count = [tree], 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                _check_printable(value)
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                _check_printable([value])
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")


def _check_printable(texts: dict[str, Any] | list[str]) -> None:
    for text in texts:
        found = _UNPRINTABLE.search(text)
        if found:
            raise ValueError(f"a text with the character U+{ord(found.group()):04X}")
