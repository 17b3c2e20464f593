"""The container of a ticket file: a safetensors file of four flat tensors, each with its SHA-256, in canonical form.

The JSON text is deflated, since it would be larger than the values of a small network. Its inflated size is bounded.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

from mirl_dist.config import strict_json
from mirl_dist.errors import UserError

FORMAT = "mirl-dist-ticket-file-1"
PARTS = {"initial": ("F32", 4), "trained": ("F32", 4), "about": ("U8", 1), "mask": ("U8", 1)}
"""The parts in file order: name -> (dtype, bytes per value). Floats come first, so that they are aligned."""
GET_AGAIN = "Get the file again from where it was packed."
_FIRST_BYTES = b'{"__metadata__":{"format":"mirl-dist-ticket-file-'
_MAX_HEADER = 2_048


def pack(parts: Mapping[str, bytes]) -> bytes:
    """Return a ticket file of these parts."""
    sums = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    return b"".join(
        [_header({name: len(part) for name, part in parts.items()}, sums), *(parts[name] for name in PARTS)]
    )


def _header(sizes: Mapping[str, int], sums: Mapping[str, str]) -> bytes:
    """Return the safetensors header, preceded by its length. sizes: bytes of each part; sums: SHA-256 of each."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT} | {name: sums[name] for name in sorted(PARTS)}}
    begin = 0
    for name, (dtype, width) in PARTS.items():
        end = begin + sizes[name]
        header[name] = {"dtype": dtype, "shape": [sizes[name] // width], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def unpack(data: bytes, source: str) -> dict[str, memoryview]:
    """Return the parts of a file by name. Raise UserError unless it is a ticket file with correct checksums."""
    if not data.startswith(_FIRST_BYTES, 8):  # of any version
        raise UserError(f"{source} is no ticket file. `mirl-dist tickets pack` writes them.")
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin > min(len(data), 8 + _MAX_HEADER):
        raise UserError(f"{source}: its header of {begin - 8:,} bytes is cut short, or too long. {GET_AGAIN}")
    header = _parse_json(data[8:begin], source)
    if header["__metadata__"].get("format") != FORMAT:
        raise UserError(f"{source} is of another version than {FORMAT}. Read it with the mirl-dist that wrote it.")
    try:
        sizes = {name: int(header[name]["shape"][0]) * width for name, (_, width) in PARTS.items()}
        sums = {name: str(header["__metadata__"][name]) for name in PARTS}
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"{source}: its header does not name the parts of a ticket file. {GET_AGAIN}") from None
    if min(sizes.values()) < 0 or _header(sizes, sums) != data[:begin]:
        raise UserError(f"{source}: its header is not the one of its parts. {GET_AGAIN}")
    if begin + sum(sizes.values()) != len(data):
        raise UserError(
            f"{source} has {len(data):,} bytes, its header wants {begin + sum(sizes.values()):,}. {GET_AGAIN}"
        )
    parts: dict[str, memoryview] = {}
    for name in PARTS:
        parts[name] = memoryview(data)[begin : begin + sizes[name]]
        begin += sizes[name]
        if hashlib.sha256(parts[name]).hexdigest() != sums[name]:
            raise UserError(f"{source}: its part '{name}' is damaged: its SHA-256 is not the one stated. {GET_AGAIN}")
    return parts


def decompress(part: memoryview, source: str) -> Any:
    """Parse the part `about`. Raise UserError for anything but one zlib stream of at most MOST_BYTES of strict JSON."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(part, strict_json.MOST_BYTES + 1)
    except zlib.error as error:
        raise UserError(f"{source}: its text cannot be unfolded ({error}). {GET_AGAIN}") from None
    if len(text) <= strict_json.MOST_BYTES and (not stream.eof or stream.unused_data):
        raise UserError(f"{source}: its text ends too early or too late. {GET_AGAIN}")
    return _parse_json(text, source)


def _parse_json(text: bytes, source: str) -> Any:
    try:
        return strict_json.parse(text)
    except ValueError as error:
        raise UserError(f"{source}: its text cannot be read ({str(error)[:80]}). {GET_AGAIN}") from None
