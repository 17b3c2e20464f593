"""Is a shard on this node what its manifest says? If not, which samples are damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from mirl_dist.data.manifest import NOTES, Part, SampleEntry, Shard
from mirl_dist.data.sample import Pixels, decode
from mirl_dist.data.shards import SamplePlace
from mirl_dist.errors import UserError
from mirl_dist.storage.hashing import digest_of_file


@dataclass
class LocalShard:
    """A shard on this node. bad: number of a sample -> what is wrong with it; let_go: frees its place; state: what
    changes when its file does, where that is known without looking."""

    shard: Shard
    path: Path
    entries: tuple[SampleEntry, ...]
    bad: dict[int, str] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None
    state: object = None


def file_state(path: Path) -> tuple[int, int, int]:
    """What changes when a file does: inode, size in bytes, time of change in nanoseconds."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def find_damage(path: Path, shard: Shard, entries: Sequence[SampleEntry]) -> dict[int, str] | None:
    """None for a file that is the shard; else its damaged samples by number, and why in words for a ticket."""
    with path.open("rb") as tar:
        if digest_of_file(tar) == shard.sha256:
            return None
        found = {}
        for number, entry in enumerate(entries):
            wrong = [name for name, part in entry.parts.items() if name != NOTES and not _sound(tar, part)]
            if wrong:
                found[number] = f"is damaged ({', '.join(sorted(wrong))})"
        return found


def _sound(tar: BinaryIO, part: Part) -> bool:
    tar.seek(part.offset)
    return sha256(tar.read(part.size)).hexdigest() == part.sha256


def read_image(path: Path, place: SamplePlace, which: str) -> Pixels:
    """One member of a shard, uint8 (H, W, 3), its own digest checked once more. Raises UserError for anything else."""
    found = place.entry.image(which)
    where = f"{place.shard.name}, sample '{place.entry.key}', {which}"
    if found is None:
        raise UserError(f"{where}: the index names no such image. Build the shards again.")
    try:
        with path.open("rb") as tar:
            tar.seek(found[1].offset)
            data = tar.read(found[1].size)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error}). Check the disk, or copy the shard again.") from None
    if sha256(data).hexdigest() != found[1].sha256:
        raise UserError(f"{where}: the bytes are not those that were built (SHA-256 differs). Copy the shard again.")
    return decode(data, where)
