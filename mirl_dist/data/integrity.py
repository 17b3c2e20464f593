"""Verifies a local shard against the manifest and its index, and finds damaged samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from mirl_dist.data.manifest import NOTES, Part, SampleEntry, Shard
from mirl_dist.data.sample import Pixels, decode
from mirl_dist.data.shards import SamplePlace
from mirl_dist.errors import UserError


@dataclass
class LocalShard:
    """A shard on this node.

    damaged: sample number -> problem. release: allows the cache to evict the file. state: a value that changes when
    the file changes; None if it must be read from the file system (`file_state`).
    """

    shard: Shard
    path: Path
    entries: tuple[SampleEntry, ...]
    damaged: dict[int, str] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None
    state: object = None


def file_state(path: Path) -> tuple[int, int, int]:
    """Return inode, size in bytes and modification time in nanoseconds, which change when the file does."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def find_damage(path: Path, shard: Shard, entries: Sequence[SampleEntry]) -> dict[int, str] | None:
    """Return the damaged samples of a shard as number -> problem (text for a ticket); None if the file is intact."""
    with path.open("rb") as tar:
        if hashlib.file_digest(tar, "sha256").hexdigest() == shard.sha256:
            return None
        damaged = {}
        for number, entry in enumerate(entries):
            wrong = [name for name, part in entry.parts.items() if name != NOTES and not _is_intact(tar, part)]
            if wrong:
                damaged[number] = f"is damaged ({', '.join(sorted(wrong))})"
        return damaged


def _is_intact(tar: BinaryIO, part: Part) -> bool:
    tar.seek(part.offset)
    return sha256(tar.read(part.size)).hexdigest() == part.sha256


def read_image(path: Path, place: SamplePlace, which: str) -> Pixels:
    """Read one image of a sample, uint8 (H, W, 3), verifying its digest again.

    Raises UserError if it is absent, unreadable or damaged.
    """
    member = place.entry.image(which)
    source = f"{place.shard.name}, sample '{place.entry.key}', {which}"
    if member is None:
        raise UserError(f"{source}: the index names no such image. Build the shards again.")
    try:
        with path.open("rb") as tar:
            tar.seek(member[1].offset)
            data = tar.read(member[1].size)
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error}). Check the disk, or copy the shard again.") from None
    if sha256(data).hexdigest() != member[1].sha256:
        raise UserError(f"{source}: the bytes are not those that were built (SHA-256 differs). Copy the shard again.")
    return decode(data, source)
