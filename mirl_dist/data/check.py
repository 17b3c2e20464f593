"""Is a folder of shards what its manifest says? Every byte is read, every image decoded."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mirl_dist.data.build import file_digest
from mirl_dist.data.manifest import CLEAN, DEGRADED, MANIFEST, NOTES, Entry, Shard, read_index, read_manifest
from mirl_dist.data.source_image import Refused, decode
from mirl_dist.data.workers import Report
from mirl_dist.faults import Fault


def check(out: Path, report: Report) -> list[str]:
    """Every fault of a folder of shards, by name; empty means that it is whole.

    Raises Fault for a folder without a manifest that can be read, of which nothing can be said.
    """
    path = out / MANIFEST
    try:
        manifest = read_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise Fault(
            f"no manifest can be read at {path} ({error.strerror}): shards without it do not exist. "
            "Give the folder that 'shards build' wrote, or build the shards again."
        ) from None
    faults: list[str] = []
    seen: dict[str, str] = {}
    for done, shard in enumerate(manifest.shards):
        report(done, len(manifest.shards), "checking shards")
        faults += _shard(out, shard, seen)
    report(len(manifest.shards), len(manifest.shards), "checking shards")
    named = {name for shard in manifest.shards for name in (shard.name, shard.index_name)}
    for file in sorted([*out.glob("*.tar"), *out.glob("*.index.json")]):
        if file.name not in named:
            faults.append(f"{file.name}: lies in the folder, but the manifest does not name it")
    return faults


def _shard(out: Path, shard: Shard, seen: dict[str, str]) -> Iterator[str]:
    """The faults of one shard. seen: keys of all samples so far, with the shard that holds them."""
    tar = out / shard.name
    try:
        size = tar.stat().st_size
        if size != shard.bytes:
            yield f"{shard.name}: has {size} bytes, the manifest says {shard.bytes}"
        elif file_digest(tar) != shard.sha256:
            yield f"{shard.name}: its SHA-256 is not the manifest's, although its size is"
        index = read_index((out / shard.index_name).read_bytes(), shard, shard.index_name)
        yield from _headers(tar, shard, index.entries)
        with tar.open("rb") as stream:
            for entry in index.entries:
                if entry.key in seen:
                    yield f"{shard.name}: the key {entry.key} stands in {seen[entry.key]} too"
                seen[entry.key] = shard.name
                yield from _sample(stream, shard, entry)
    except OSError as error:
        yield f"{Path(error.filename or tar).name}: cannot be read ({error.strerror})"
    except Fault as fault:
        yield str(fault)


def _headers(tar: Path, shard: Shard, entries: tuple[Entry, ...]) -> Iterator[str]:
    """Does the tar, read as a tar, hold what the index says, where it says?"""
    wanted = {f"{e.key}.{name}": (p.offset, p.size) for e in entries for name, p in e.parts.items()}
    try:
        with tarfile.open(tar, mode="r:") as opened:
            found = {m.name: (m.offset_data, m.size) for m in opened.getmembers()}
    except tarfile.TarError as error:
        yield f"{shard.name}: cannot be read as a tar ({error})"
        return
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"{shard.name}: the index names {name}, the tar does not hold it"
        elif name not in wanted:
            yield f"{shard.name}: the tar holds {name}, the index does not name it"
        elif found[name] != wanted[name]:
            yield f"{shard.name}: {name} lies at {found[name]}, the index says {wanted[name]} (offset, bytes)"


def _sample(stream: BinaryIO, shard: Shard, entry: Entry) -> Iterator[str]:
    """Parts, digests, images and notes of one sample."""
    expected = {CLEAN, NOTES} if shard.kind == "denoise" else {CLEAN, DEGRADED, NOTES}
    if set(entry.parts) != expected:
        held = ", ".join(sorted(entry.parts))
        yield f"{shard.name}: {entry.key} holds {held}; a {shard.kind} sample {', '.join(sorted(expected))}"
    for name, part in entry.parts.items():
        stream.seek(part.offset)
        data = stream.read(part.size)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            yield f"{shard.name}: {entry.key}.{name} is damaged (its SHA-256 is not the index's)"
        elif name == NOTES:
            notes = json.loads(data)
            if (notes["set"], notes["kind"]) != (shard.set, shard.kind):
                yield f"{shard.name}: {entry.key} says it is of {notes['set']}, {notes['kind']}"
        else:
            yield from _image(data, f"{shard.name}: {entry.key}.{name}", (entry.height, entry.width))


def _image(data: bytes, label: str, wanted: tuple[int, int]) -> Iterator[str]:
    try:
        found = decode(data).shape[:2]
    except Refused as refused:
        yield f"{label} {refused}"
        return
    if found != wanted:
        yield f"{label} is {found[1]}x{found[0]}, the index says {wanted[1]}x{wanted[0]}"
