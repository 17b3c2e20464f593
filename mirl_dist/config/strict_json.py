"""Parses untrusted JSON: no duplicate keys, no NaN or infinity, bounded depth and size, printable strings only."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MOST_BYTES, MOST_VALUES, DEEPEST = 2 << 20, 50_000, 16
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def parse(text: bytes) -> Any:
    """Parse UTF-8 JSON text; integers may have at most 18 digits. Raise ValueError that describes the fault."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text):,} bytes of text")
    try:
        tree = json.loads(
            text.decode(),
            object_pairs_hook=_unique_keys,
            parse_int=_parse_integer,
            parse_float=_parse_finite,
            parse_constant=_parse_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_bounds(tree)
    return tree


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key appears there twice")
    return tree


def _parse_integer(digits: str) -> int:
    if len(digits.lstrip("-")) > 18:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _parse_finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _check_bounds(tree: Any) -> None:
    """Check depth, number of values and strings level by level; recursion could exceed Python's stack."""
    level, count = [tree], 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        mappings = [value for value in level if isinstance(value, dict)]
        texts = [value for value in level if isinstance(value, str)] + [key for tree in mappings for key in tree]
        if match := _UNPRINTABLE.search("".join(texts)):
            raise ValueError(f"a text with the character U+{ord(match.group()):04X}")
        level = [inner for value in level if isinstance(value, list) for inner in value]
        level += [inner for mapping in mappings for inner in mapping.values()]
        if not level:
            return
    raise ValueError("nested too deeply")
