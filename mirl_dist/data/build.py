"""Folders of images to WebDataset shards and a manifest: the same recipe and images give the same bytes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mirl_dist.data.encode import samples
from mirl_dist.data.manifest import MANIFEST, Entry, Index, Manifest, Part, Shard, read_manifest
from mirl_dist.data.plan import ShardPlan, shards
from mirl_dist.data.recipe import Recipe
from mirl_dist.data.survey import Survey, survey
from mirl_dist.data.workers import Report, each
from mirl_dist.faults import Fault

MARKER = ".building.json"
OURS = re.compile(r"(train|evaluate)-[A-Za-z0-9_-]+-\d{5,}\.(tar|index\.json)")
PARTIAL = ".partial-"


def build(recipe: Recipe, out: Path, workers: int, report: Report) -> Manifest:
    """Write the shards of a recipe into the folder `out`; the manifest comes last and vouches for the rest.

    workers: processes, 1 or more; the bytes do not depend on it. Shards of the same recipe that lie there
    whole are kept, the leftover of a build that died is replaced.
    Raises Fault for images that cannot be used (all listed at once), and for a folder that holds something
    else, that another build is writing into, or that cannot be written.
    """
    found = survey(recipe, workers, report)
    with _claimed(out) as marker:
        existing = _existing(out)
        if existing is not None and existing.recipe != found.fingerprint:
            raise Fault(
                f"{out} holds shards of another recipe or other images ('{existing.name}', "
                f"{existing.recipe[:12]}; this is '{recipe.name}', {found.fingerprint[:12]}). "
                "Choose another --out, or remove that folder."
            )
        if existing is not None and _whole(existing, out, report):
            marker.unlink()
            return existing
        manifest = _write_all(recipe, found, out, workers, report)
        marker.unlink()
        return manifest


def _write_all(recipe: Recipe, found: Survey, out: Path, workers: int, report: Report) -> Manifest:
    with _writing(out):
        (out / MARKER).write_text(json.dumps({"recipe": found.fingerprint}))
        (out / MANIFEST).unlink(missing_ok=True)
        for leftover in [p for p in out.iterdir() if OURS.fullmatch(p.name) or p.name.startswith(PARTIAL)]:
            leftover.unlink()
    plans = shards(recipe, found.pictures, found.seen)
    written = tuple(each(partial(write_shard, out), plans, workers, report, "writing shards"))
    manifest = Manifest(
        name=recipe.name,
        recipe=found.fingerprint,
        tile_pixels=recipe.tile_pixels,
        skipped=found.skipped,
        shards=written,
    )
    _put(out, MANIFEST, manifest.dump())
    return manifest


def _existing(out: Path) -> Manifest | None:
    """The manifest in a folder, if any. Raises Fault where it holds what is not ours to replace."""
    try:
        return read_manifest((out / MANIFEST).read_bytes(), str(out / MANIFEST))
    except FileNotFoundError:
        pass
    except Fault as fault:
        found = str(fault).removesuffix(" Build the shards again.")
        raise Fault(f"{found} Choose another --out, or remove that folder.") from None
    foreign = sorted(p.name for p in out.iterdir() if OURS.fullmatch(p.name))
    if foreign and not (out / MARKER).stat().st_size:
        raise Fault(
            f"{out} holds shards ({foreign[0]}) without a manifest or the mark of a build that died. "
            "Choose another --out, or remove them."
        )
    return None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the file system as a Fault that names the path."""
    try:
        yield
    except OSError as error:
        raise Fault(f"cannot write {path}: {error.strerror}. Make room or allow it, or choose another --out.") from None


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The folder for this build alone. Yields its marker; a build that dies leaves it filled."""
    path = out / MARKER
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        marker = path.open("ab")
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(f"another build is writing into {out}. Wait for it, or choose another --out.") from None
        except OSError:  # a file system without locks: two builds at once are then the user's care
            pass
        try:
            yield path
        finally:
            if path.exists() and not path.stat().st_size:
                path.unlink()


def _whole(manifest: Manifest, out: Path, report: Report) -> bool:
    """True where every shard and index has the size and digest that the manifest says."""
    for done, shard in enumerate(manifest.shards):
        report(done, len(manifest.shards), "comparing shards already built")
        for name, digest in ((shard.name, shard.sha256), (shard.index_name, shard.index_sha256)):
            if not (out / name).is_file() or file_digest(out / name) != digest:
                return False
    report(len(manifest.shards), len(manifest.shards), "already built")
    return True


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _removed(path: Path) -> Iterator[None]:
    """A file that does not outlive the work on it, whether that ends well or not."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _put(out: Path, name: str, data: bytes) -> None:
    """A file under its name, complete or not at all, also after a power cut."""
    partial_path = out / f"{PARTIAL}{os.getpid()}-{name}"
    with _writing(out / name), _removed(partial_path):
        with partial_path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        _rename(partial_path, out / name)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_shard(out: Path, plan: ShardPlan) -> Shard:
    """Encode one shard's samples, write its tar and index. Raises Fault for a changed image, a full disk."""
    import webdataset  # here, because it brings torch along

    partial_path = out / f"{PARTIAL}{os.getpid()}-{plan.name}"
    sizes: dict[str, tuple[int, int]] = {}
    with _writing(out / plan.name), _removed(partial_path):
        with partial_path.open("wb") as stream:
            with webdataset.TarWriter(stream, user="mirl", group="mirl", mode=0o644, mtime=0, encoder=False) as writer:
                for cut in plan.cuts:
                    for key, box, members in samples(cut, plan.seed):
                        sizes[key] = (box.height, box.width)
                        writer.write({"__key__": key, **members})
            stream.flush()
            os.fsync(stream.fileno())
        index = index_of(partial_path, sizes)
        size, digest = partial_path.stat().st_size, file_digest(partial_path)
        _rename(partial_path, out / plan.name)
    picture = plan.cuts[0].picture
    data = (json.dumps(index.model_dump(), sort_keys=True, separators=(",", ":")) + "\n").encode()
    shard = Shard(
        name=plan.name,
        role=picture.role,
        set=picture.set,
        kind=picture.kind,
        samples=len(index.entries),
        bytes=size,
        sha256=digest,
        index_sha256=hashlib.sha256(data).hexdigest(),
    )
    _put(out, shard.index_name, data)
    return shard


def index_of(tar: Path, sizes: dict[str, tuple[int, int]]) -> Index:
    """Where every member lies in a tar. sizes: height and width by key."""
    parts: dict[str, dict[str, Part]] = {key: {} for key in sizes}
    with tar.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
        for member in opened.getmembers():
            key, _, name = member.name.partition(".")
            stream.seek(member.offset_data)
            digest = hashlib.sha256(stream.read(member.size)).hexdigest()
            parts[key][name] = Part(offset=member.offset_data, size=member.size, sha256=digest)
    entries = (Entry(key=k, height=h, width=w, parts=parts[k]) for k, (h, w) in sizes.items())
    return Index(entries=tuple(entries))
