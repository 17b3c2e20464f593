"""Folders of images to WebDataset shards and a manifest: the same recipe and images give the same bytes.

Any number of ranks and of processes work on one build, into a folder or any other store. A shard is encoded into a
file of this machine's folder for temporary files and then put into the store, so that it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mirl_dist.data.building import contact_sheet, resume
from mirl_dist.data.building.encode import members
from mirl_dist.data.building.inspection import inspect_images
from mirl_dist.data.building.layout import LayoutItem, ShardPlan, shards
from mirl_dist.data.building.recipe import Recipe
from mirl_dist.data.manifest import MANIFEST, Index, Manifest, Part, SampleEntry, Shard
from mirl_dist.data.parallel import SINGLE_PROCESS, ProgressCallback, WorkerGroup, distributed_map
from mirl_dist.errors import UserError
from mirl_dist.storage import NotFound, Store
from mirl_dist.storage.hashing import digest_of_file


@dataclass(frozen=True)
class ShardJob:
    """What a worker needs beside its shard. recorded: shards that an earlier try may have written."""

    store: Store
    name: str
    fingerprint: str
    recorded: frozenset[str]


def build(
    recipe: Recipe, store: Store, workers: int, report: ProgressCallback, crew: WorkerGroup = SINGLE_PROCESS
) -> Manifest:
    """Write the shards of a recipe into a store; the manifest comes last and vouches for the rest.

    workers: processes of each rank, 1 or more; the bytes depend neither on it nor on the number of ranks. Shards of
    the same recipe that lie there whole are kept, also those of a build that was killed.
    Raises UserError, on every rank: before any image is read, for a place that holds something else, that another build is
    writing into, or that some rank cannot write; then for images that cannot be used (all listed at once).
    """
    with ExitStack() as stack:
        crew.on_main(lambda: stack.enter_context(resume.locked(store)))
        _check_writable(store, recipe.name, crew, report)
        found = inspect_images(recipe, workers, report, crew)
        whose = recipe.name, found.fingerprint
        existing = crew.on_main(lambda: resume.standing(store, *whose))
        if existing is not None:
            compare = partial(resume.is_sound, store)
            sound = distributed_map(crew, compare, existing.shards, workers, report, "comparing shards already built")
            if all(sound):
                crew.on_main(lambda: resume.clear(store))
                report(len(sound), len(sound), "already built")
                return existing
            crew.on_main(lambda: resume.reopen(store, existing, sound))
        recorded = crew.on_main(lambda: resume.begin(store, *whose))
        plans = shards(recipe, found.images, found.seen)
        write = partial(write_shard, ShardJob(store, *whose, recorded))
        written = distributed_map(crew, write, plans, workers, report, "writing shards")
        manifest = Manifest(name=recipe.name, recipe=found.fingerprint, skipped=found.skipped, shards=tuple(written))
        crew.on_main(lambda: _finish(store, manifest))
        return manifest


def _check_writable(store: Store, name: str, crew: WorkerGroup, report: ProgressCallback) -> None:
    """Every rank can write and remove there, all see one place, and nothing lies there that a build would refuse."""
    probe = crew.on_main(lambda: resume.put_probe(store))
    try:
        distributed_map(
            crew, partial(resume.check_same_store, store, probe), range(crew.world), 1, report, "trying the place"
        )
        crew.on_main(lambda: resume.check_resumable(store, name))
    finally:
        if crew.rank == 0:
            with suppress(UserError):  # that probes can be removed is proven, or what cannot be is being told
                store.remove(probe)


def _finish(store: Store, manifest: Manifest) -> None:
    """The last steps: is all there, then the sheet for people, then the manifest."""
    for shard in manifest.shards:
        try:
            size = store.size(shard.name)
        except NotFound:
            size = 0
        if size != shard.bytes:
            raise UserError(
                f"{store.where(shard.name)} has {size} bytes after {shard.bytes} were written there. Do all ranks see "
                "the same folder? Choose an --out that all nodes share, and build again."
            )
    store.put(contact_sheet.NAME, contact_sheet.draw(store, manifest))
    store.put(MANIFEST, manifest.dump())
    resume.clear(store)


def write_shard(job: ShardJob, plan: ShardPlan) -> Shard:
    """Encode one shard's samples and store its tar, its index and its record; kept where an earlier try did that.

    Raises UserError for an image that changed since it was checked, and for a full disk.
    """
    if plan.name in job.recorded:
        kept = resume.recorded(job.store, plan.name, job.fingerprint)
        if kept is not None:
            return kept
    with _temporary() as path:
        index, size, digest = _encode(plan, path)
        first = plan.items[0].picture
        data = (json.dumps(index.model_dump(), sort_keys=True, separators=(",", ":")) + "\n").encode()
        shard = Shard(
            name=plan.name,
            role=first.role,
            set=first.set,
            kind=first.kind,
            samples=len(index.entries),
            least_pixels=min(min(entry.height, entry.width) for entry in index.entries),
            bytes=size,
            sha256=digest,
            index_sha256=hashlib.sha256(data).hexdigest(),
        )
        job.store.put_file(shard.name, path)
        job.store.put(shard.index_name, data)
        resume.record(job.store, job.name, job.fingerprint, shard)
        return shard


@contextmanager
def _temporary() -> Iterator[Path]:
    """A new file of this machine that is gone when the work on it ends; on Linux also when its process is killed."""
    with ExitStack() as stack:
        try:
            if Path("/proc/self/fd").is_dir():
                nameless = stack.enter_context(tempfile.TemporaryFile(prefix="mirl-dist-"))
                path = Path(f"/proc/self/fd/{nameless.fileno()}")
            else:
                path = Path(stack.enter_context(tempfile.NamedTemporaryFile(prefix="mirl-dist-")).name)
        except OSError as error:
            raise _no_room(error) from None
        yield path


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"cannot write {tempfile.gettempdir()}: {error.strerror or error}. Every worker keeps a shard there until it "
        "is stored: make room, set TMPDIR to a folder on a larger disk, use fewer --workers, or lower shard_megabytes."
    )


def _encode(plan: ShardPlan, path: Path) -> tuple[Index, int, str]:
    """Write one tar; its index, its size in bytes, and its SHA-256."""
    import webdataset  # here, because it brings torch along

    try:
        with (
            path.open("wb") as stream,
            webdataset.TarWriter(stream, user="mirl", group="mirl", mode=0o644, mtime=0, encoder=False) as writer,
        ):
            for item in plan.items:
                writer.write({"__key__": item.key, **members(item, plan.seed)})
        with path.open("rb") as tar:
            digest = digest_of_file(tar)
        return index_of(path, plan.items), path.stat().st_size, digest
    except OSError as error:
        raise _no_room(error) from None


def index_of(tar: Path, items: tuple[LayoutItem, ...]) -> Index:
    """Where every member of these samples lies in a tar."""
    parts: dict[str, dict[str, Part]] = {item.key: {} for item in items}
    with tar.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
        for member in opened.getmembers():
            key, _, name = member.name.partition(".")
            stream.seek(member.offset_data)
            digest = hashlib.sha256(stream.read(member.size)).hexdigest()
            parts[key][name] = Part(offset=member.offset_data, size=member.size, sha256=digest)
    entries = [
        SampleEntry.model_validate({"key": i.key, "height": i.box.height, "width": i.box.width, "parts": parts[i.key]})
        for i in items
    ]
    return Index(entries=tuple(entries))
