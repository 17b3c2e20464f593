"""Checks built shards against their manifest by reading every byte and decoding every image."""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
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


def check(store: Store, workers: int, progress: ProgressCallback) -> list[str]:
    """Return every fault of built shards, by name; an empty list means that they are intact. workers: processes.

    Raises UserError if the manifest is missing or invalid, in which case nothing can be checked.
    """
    try:
        manifest = read_manifest(store.get(MANIFEST), store.where(MANIFEST))
    except NotFound:
        raise UserError(
            f"no manifest at {store.where(MANIFEST)}: shards without it do not exist. "
            "Give the place that 'shards build' wrote, or build the shards again."
        ) from None
    faults: list[str] = []
    shard_of: dict[str, str] = {}
    results = parallel_map(partial(_check_shard, store), manifest.shards, workers, progress, "checking shards")
    for shard, (shard_faults, keys) in zip(manifest.shards, results, strict=True):
        faults += shard_faults
        faults += [f"{shard.name}: the key {key} stands in {shard_of[key]} too" for key in keys if key in shard_of]
        shard_of |= dict.fromkeys(keys, shard.name)
    return [*faults, *_find_unlisted_files(store, manifest)]


def _find_unlisted_files(store: Store, manifest: Manifest) -> Iterator[str]:
    """Yield shard and index files in the store that the manifest does not list; none if the store cannot be listed."""
    named = {name for shard in manifest.shards for name in (shard.name, shard.index_name)}
    try:
        names = store.list("")
    except Rejected:
        return
    for name in names:
        if "/" not in name and name.endswith((".tar", ".index.json")) and name not in named:
            yield f"{name}: exists, but the manifest does not list it"


@contextmanager
def _local_copy(store: Store, shard: Shard) -> Iterator[Path]:
    """Yield a local file of a shard: the original in a folder store, otherwise a temporary download."""
    size = store.size(shard.name)
    if isinstance(store, Folder):
        yield Path(store.where(shard.name))
        return
    with tempfile.NamedTemporaryFile(prefix="mirl-dist-", suffix=".tar") as copy:
        try:
            download(store, shard.name, Path(copy.name), size, patience=DEFAULT_PATIENCE, say=to_stderr)
        except OSError as error:
            raise UserError(
                f"{shard.name}: cannot be stored in {tempfile.gettempdir()} ({error.strerror or error}). Make room, "
                "set TMPDIR to a folder on a larger disk, or use fewer --workers."
            ) from None
        yield Path(copy.name)


def _check_shard(store: Store, shard: Shard) -> tuple[list[str], list[str]]:
    """Return the faults and the sample keys of one shard."""
    faults: list[str] = []
    entries: tuple[SampleEntry, ...] = ()
    try:
        with _local_copy(store, shard) as tar, tar.open("rb") as stream:
            size = tar.stat().st_size
            if size != shard.bytes:
                faults.append(f"{shard.name}: has {size} bytes, the manifest says {shard.bytes}")
            elif digest_of_file(stream) != shard.sha256:
                faults.append(f"{shard.name}: its SHA-256 is not the manifest's, although its size is")
            index_fault = []
            try:
                entries = read_index(store.get(shard.index_name), shard, shard.index_name).entries
            except UserError as fault:
                index_fault.append(str(fault))
            faults += [*_check_tar(tar, shard, entries), *index_fault]
            for entry in entries:
                faults += _check_sample(stream, shard, entry)
    except UserError as fault:
        faults.append(str(fault))
    except OSError as error:
        faults.append(f"{shard.name}: cannot be read ({error.strerror or error})")
    return faults, [entry.key for entry in entries]


def _check_tar(tar: Path, shard: Shard, entries: Sequence[SampleEntry]) -> Iterator[str]:
    """Check that a tar has exactly the members of the index at their offsets, all plain files with safe names.

    entries: the samples that the index lists; empty if the index cannot be read.
    """
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(tar, mode="r:") as opened:
            for member in opened:
                problem = _explain_unsafe(member)
                if problem is not None:
                    yield f"{shard.name}: the tar holds {member.name!r}, {problem}"
                elif member.name in members:
                    yield f"{shard.name}: the tar holds {member.name} twice"
                members[member.name] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, EOFError) as error:
        yield f"{shard.name}: cannot be read as a tar ({error})"
        return
    listed = {f"{e.key}.{name}": (part.offset, part.size) for e in entries for name, part in e.parts.items()}
    for name in sorted(listed.keys() | members.keys()) if listed else ():
        if name not in members:
            yield f"{shard.name}: the index names {name}, the tar does not hold it"
        elif name not in listed:
            yield f"{shard.name}: the tar holds {name!r}, the index does not name it"
        elif members[name] != listed[name]:
            yield f"{shard.name}: {name} lies at {members[name]}, the index says {listed[name]} (offset, bytes)"


def _explain_unsafe(member: tarfile.TarInfo) -> str | None:
    """Return why a member is unsafe to unpack; None if it is safe."""
    if not member.isreg():
        return "which is a link, a folder or a device: only plain files belong there"
    key, _, name = member.name.partition(".")
    if name not in MEMBERS or SAFE_KEY.fullmatch(key) is None:
        return f"which is no name of a member: a key of letters, digits, '-' and '_', then {', '.join(MEMBERS)}"
    return None


def _check_sample(stream: BinaryIO, shard: Shard, entry: SampleEntry) -> Iterator[str]:
    """Check the digests, images and notes of one sample."""
    for name, part in entry.parts.items():
        label = f"{shard.name}: {entry.key}.{name}"
        stream.seek(part.offset)
        data = stream.read(part.size)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            yield f"{label} is damaged (its SHA-256 is not the index's)"
        elif name == NOTES:
            yield from _check_notes(data, label, shard)
        else:
            yield from _check_image(data, label, name, entry)


def _check_notes(data: bytes, label: str, shard: Shard) -> Iterator[str]:
    try:
        notes = json.loads(data)
        labels = (notes["set"], notes["kind"])
    except (ValueError, RecursionError, TypeError, KeyError):
        yield f"{label} is not what 'shards build' writes"
        return
    if labels != (shard.set, shard.kind):
        yield f"{label} names the set and kind {labels[0]}, {labels[1]}"


def _check_image(data: bytes, label: str, name: str, entry: SampleEntry) -> Iterator[str]:
    if name.endswith("ppm") and not data.startswith(ppm_header(entry.height, entry.width)):
        yield f"{label} does not begin as a PPM file of {entry.width}x{entry.height} pixels does"
        return
    try:
        height, width = decode(data).pixels.shape[:2]
    except ImageRefused as refused:
        yield f"{label} {refused}"
        return
    if (height, width) != (entry.height, entry.width):
        yield f"{label} is {width}x{height}, the index says {entry.width}x{entry.height}"
