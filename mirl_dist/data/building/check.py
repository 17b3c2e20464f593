"""Are shards what their manifest says? Every byte is read, every image decoded."""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mirl_dist.data.image_files import ImageRefused, decode
from mirl_dist.data.manifest import (
    MANIFEST,
    MEMBERS,
    NOTES,
    SAFE_KEY,
    Manifest,
    Part,
    SampleEntry,
    Shard,
    ppm_header,
    read_index,
    read_manifest,
)
from mirl_dist.data.parallel import ProgressCallback, parallel_map
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, NotFound, Rejected, Store
from mirl_dist.storage.hashing import digest_of_file
from mirl_dist.storage.retry import DEFAULT_PATIENCE, download, to_stderr


def check(store: Store, workers: int, report: ProgressCallback) -> list[str]:
    """Every fault of built shards, by name; empty means that they are whole. workers: processes.

    Raises UserError for a place without a manifest that can be read, of which nothing can be said.
    """
    try:
        manifest = read_manifest(store.get(MANIFEST), store.where(MANIFEST))
    except NotFound:
        raise UserError(
            f"no manifest at {store.where(MANIFEST)}: shards without it do not exist. "
            "Give the place that 'shards build' wrote, or build the shards again."
        ) from None
    faults: list[str] = []
    seen: dict[str, str] = {}
    every = parallel_map(partial(_shard, store), manifest.shards, workers, report, "checking shards")
    for shard, (found, keys) in zip(manifest.shards, every, strict=True):
        faults += found
        faults += [f"{shard.name}: the key {key} stands in {seen[key]} too" for key in keys if key in seen]
        seen |= dict.fromkeys(keys, shard.name)
    return [*faults, *_strangers(store, manifest)]


def _strangers(store: Store, manifest: Manifest) -> Iterator[str]:
    """Shards that lie there and that the manifest does not name. The web has no listing: nothing is said there."""
    named = {name for shard in manifest.shards for name in (shard.name, shard.index_name)}
    try:
        there = store.list("")
    except Rejected:
        return
    for name in there:
        if "/" not in name and name.endswith((".tar", ".index.json")) and name not in named:
            yield f"{name}: lies there, but the manifest does not name it"


@contextmanager
def _brought(store: Store, shard: Shard) -> Iterator[Path]:
    """A shard as a file of this machine: the one in a folder itself, else a copy for as long as it is needed."""
    size = store.size(shard.name)
    if isinstance(store, Folder):
        yield Path(store.where(shard.name))
        return
    with tempfile.NamedTemporaryFile(prefix="mirl-dist-", suffix=".tar") as copy:
        try:
            download(store, shard.name, Path(copy.name), size, patience=DEFAULT_PATIENCE, say=to_stderr)
        except OSError as error:
            raise UserError(
                f"{shard.name}: cannot be kept in {tempfile.gettempdir()} ({error.strerror or error}). Make room, "
                "set TMPDIR to a folder on a larger disk, or use fewer --workers."
            ) from None
        yield Path(copy.name)


def _shard(store: Store, shard: Shard) -> tuple[list[str], list[str]]:
    """The faults of one shard, and its keys."""
    faults: list[str] = []
    keys: list[str] = []
    try:
        with _brought(store, shard) as tar:
            faults += _bytes(tar, shard)
            try:
                index = read_index(store.get(shard.index_name), shard, shard.index_name)
            except UserError as fault:
                return [*faults, *_headers(tar, shard, {}), str(fault)], keys
            keys = [entry.key for entry in index.entries]
            parts = {f"{e.key}.{name}": part for e in index.entries for name, part in e.parts.items()}
            faults += _headers(tar, shard, parts)
            with tar.open("rb") as stream:
                for entry in index.entries:
                    faults += _sample(stream, shard, entry)
    except UserError as fault:
        faults.append(str(fault))
    except OSError as error:
        faults.append(f"{shard.name}: cannot be read ({error.strerror or error})")
    return faults, keys


def _bytes(tar: Path, shard: Shard) -> Iterator[str]:
    size = tar.stat().st_size
    if size != shard.bytes:
        yield f"{shard.name}: has {size} bytes, the manifest says {shard.bytes}"
        return
    with tar.open("rb") as stream:
        if digest_of_file(stream) != shard.sha256:
            yield f"{shard.name}: its SHA-256 is not the manifest's, although its size is"


def _headers(tar: Path, shard: Shard, parts: dict[str, Part]) -> Iterator[str]:
    """Does the tar, read as a tar, hold what the index says, where it says, and plain files under safe names alone?

    parts: the members that the index names; none for an index that cannot be read.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(tar, mode="r:") as opened:
            for member in opened:
                problem = _unsafe(member)
                if problem is not None:
                    yield f"{shard.name}: the tar holds {member.name!r}, {problem}"
                elif member.name in found:
                    yield f"{shard.name}: the tar holds {member.name} twice"
                found[member.name] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, EOFError) as error:
        yield f"{shard.name}: cannot be read as a tar ({error})"
        return
    wanted = {name: (part.offset, part.size) for name, part in parts.items()}
    for name in sorted(wanted.keys() | found.keys()) if wanted else ():
        if name not in found:
            yield f"{shard.name}: the index names {name}, the tar does not hold it"
        elif name not in wanted:
            yield f"{shard.name}: the tar holds {name!r}, the index does not name it"
        elif found[name] != wanted[name]:
            yield f"{shard.name}: {name} lies at {found[name]}, the index says {wanted[name]} (offset, bytes)"


def _unsafe(member: tarfile.TarInfo) -> str | None:
    """Why a member must not be unpacked, or None."""
    if not member.isreg():
        return "which is a link, a folder or a device: only plain files belong there"
    key, _, name = member.name.partition(".")
    if name not in MEMBERS or SAFE_KEY.fullmatch(key) is None:
        return f"which is no name of a member: a key of letters, digits, '-' and '_', then {', '.join(MEMBERS)}"
    return None


def _sample(stream: BinaryIO, shard: Shard, entry: SampleEntry) -> Iterator[str]:
    """Digests, images and notes of one sample."""
    for name, part in entry.parts.items():
        label = f"{shard.name}: {entry.key}.{name}"
        stream.seek(part.offset)
        data = stream.read(part.size)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            yield f"{label} is damaged (its SHA-256 is not the index's)"
        elif name == NOTES:
            yield from _notes(data, label, shard)
        else:
            yield from _image(data, label, name, entry)


def _notes(data: bytes, label: str, shard: Shard) -> Iterator[str]:
    try:
        notes = json.loads(data)
        found = (notes["set"], notes["kind"])
    except (ValueError, RecursionError, TypeError, KeyError):
        yield f"{label} is not what 'shards build' writes"
        return
    if found != (shard.set, shard.kind):
        yield f"{label} says it is of {found[0]}, {found[1]}"


def _image(data: bytes, label: str, name: str, entry: SampleEntry) -> Iterator[str]:
    if name.endswith("ppm") and not data.startswith(ppm_header(entry.height, entry.width)):
        yield f"{label} does not begin as a PPM file of {entry.width}x{entry.height} pixels does"
        return
    try:
        found = decode(data).shape[:2]
    except ImageRefused as refused:
        yield f"{label} {refused}"
        return
    if found != (entry.height, entry.width):
        yield f"{label} is {found[1]}x{found[0]}, the index says {entry.width}x{entry.height}"
