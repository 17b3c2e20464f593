"""Marks and records of an unfinished build, so that a killed build can be resumed and two builds never mix.

    <shards>/.building/build.json           the fingerprint of the build
    <shards>/.building/train-x-00000.json   written after a shard and its index: the shard is complete
    <shards>/.building/lock                 folders only: held by the running build
    <shards>/.building/probe-<letters>      temporary, before any work: tests whether the store is writable

All of these are removed once the manifest is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from mirl_dist.data.manifest import MANIFEST, Manifest, Shard, read_manifest
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, NotFound, Store

AREA = ".building"
MARKER, LOCK = f"{AREA}/build.json", f"{AREA}/lock"
_SHARD_FILE = re.compile(r"(train|evaluate)-[A-Za-z0-9_-]+-\d{5,}\.(tar|index\.json)|contact_sheet\.png")
_ADVICE = "Choose another --out, or remove what is there."


class _BuildMark(BaseModel):
    """The identity of a build: the recipe's name and fingerprint, and, in a shard's record, the shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    recipe: str
    shard: Shard | None = None


def _read_mark(store: Store, name: str) -> _BuildMark | None:
    """Read a mark; None if it is missing or invalid."""
    try:
        return _BuildMark.model_validate_json(store.get(name))
    except (NotFound, ValidationError):
        return None


@contextlib.contextmanager
def lock_folder(store: Store) -> Iterator[None]:
    """Lock a folder for this build; other stores rely on the marker. Raises UserError if another build holds it."""
    if not isinstance(store, Folder):
        yield
        return
    path, out = Path(store.where(LOCK)), Path(store.where())
    created = not os.path.exists(out)
    with _open_lock(path, store.where()):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: the records of an unfinished build are still needed
                path.parent.rmdir()
                if created:
                    out.rmdir()


def _open_lock(path: Path, out: str) -> BinaryIO:
    """Open the lock file and lock it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("ab")
        except FileNotFoundError:
            continue  # another build just ended and removed the folder
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {out}: {reason}. Make room or allow it, or choose another --out.") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise UserError(f"another build is writing into {out}. Wait for it, or choose another --out.") from None
        except OSError:  # the file system has no locks; the user must then avoid concurrent builds
            return handle
        if path.exists() and path.stat().st_ino == os.fstat(handle.fileno()).st_ino:
            return handle
        handle.close()  # another build just ended and removed this file


def put_probe(store: Store) -> str:
    """Write a small file and return its name. Raises UserError if the store is not writable."""
    name = f"{AREA}/probe-{uuid.uuid4().hex}"
    store.put_if_absent(name, b"mirl-dist tries whether it may write here\n")
    return name


def check_same_store(store: Store, probe: str, rank: int) -> None:
    """Write and remove a probe, and look for rank 0's probe. Raises UserError if any of these fails."""
    own_probe = put_probe(store)
    shared = store.exists(probe)
    store.remove(own_probe)
    if not shared:
        raise UserError(
            f"{store.where()} is another place for rank {rank} than for rank 0. Do all ranks see the same folder? "
            "Choose an --out that all nodes share."
        )


def check_resumable(store: Store, name: str) -> Manifest | _BuildMark | None:
    """Return the manifest of a finished build, the mark of an unfinished one, or None for an empty store.

    Raises UserError if no build of the recipe `name` could use the store, regardless of its images.
    """
    existing: Manifest | _BuildMark | None
    try:
        existing = read_manifest(store.get(MANIFEST), store.where(MANIFEST))
    except NotFound:
        existing = _read_mark(store, MARKER)
        foreign = [n for n in store.list("") if _SHARD_FILE.fullmatch(n)] if existing is None else []
        if foreign:
            raise UserError(
                f"{store.where()} holds files of shards ({foreign[0]}) without a manifest or the mark of a build that "
                f"died. {_ADVICE}"
            ) from None
    except UserError as fault:
        raise UserError(f"{fault} Or choose another --out.") from None
    if existing is not None and existing.name != name:
        raise _foreign_build_error(store, existing, f"'{name}'")
    return existing


def _foreign_build_error(store: Store, existing: Manifest | _BuildMark, this: str) -> UserError:
    what = "shards" if isinstance(existing, Manifest) else "an unfinished build"
    return UserError(
        f"{store.where()} holds {what} of another recipe or other images ('{existing.name}', {existing.recipe[:12]}; "
        f"this is {this}). {_ADVICE}"
    )


@dataclass(frozen=True)
class BuildRecords:
    """The marks of one build in its store. name, recipe: the recipe's name and fingerprint."""

    store: Store
    name: str
    recipe: str

    def read_finished(self) -> Manifest | None:
        """Return the manifest of a finished build of the same recipe and images; None if there is none.

        Raises UserError if the store holds a finished or unfinished build of another recipe or other images.
        """
        existing = check_resumable(self.store, self.name)
        if existing is not None and existing.recipe != self.recipe:
            raise _foreign_build_error(self.store, existing, f"'{self.name}', {self.recipe[:12]}")
        return existing if isinstance(existing, Manifest) else None

    def mark_started(self) -> None:
        """Mark the store as used by this build. Raises UserError if a different build has marked it first."""
        self.store.sweep()
        if not self.store.put_if_absent(MARKER, self._mark()):
            self.read_finished()

    def record_shard(self, shard: Shard) -> None:
        """Record that a shard and its index are in the store."""
        self.store.put(self._name_of(shard.name), self._mark(shard))

    def read_shard(self, name: str) -> Shard | None:
        """Return a shard that an interrupted run of this build recorded; None without a record or if it is damaged."""
        mark = _read_mark(self.store, self._name_of(name))
        if mark is None or mark.shard is None or (mark.recipe, mark.shard.name) != (self.recipe, name):
            return None
        return mark.shard if is_intact(self.store, mark.shard) else None

    def reopen(self, manifest: Manifest, intact: Sequence[bool]) -> None:
        """Turn a finished build with damaged or lost shards into an unfinished one that keeps the intact shards."""
        for shard, is_good in zip(manifest.shards, intact, strict=True):
            if is_good:
                self.record_shard(shard)
        self.store.put(MARKER, self._mark())
        self.store.remove(MANIFEST)

    def remove(self) -> None:
        """Remove all records, and the marker last."""
        for name in sorted(self.store.list(AREA), key=MARKER.__eq__):
            if name != LOCK:
                self.store.remove(name)

    def _mark(self, shard: Shard | None = None) -> bytes:
        mark = _BuildMark(name=self.name, recipe=self.recipe, shard=shard)
        return (mark.model_dump_json(exclude_none=True) + "\n").encode()

    def _name_of(self, shard: str) -> str:
        return f"{AREA}/{shard.removesuffix('.tar')}.json"


def is_intact(store: Store, shard: Shard) -> bool:
    """Return whether a shard and its index match their record. The tar is hashed in folders; elsewhere by size only."""
    try:
        if store.size(shard.name) != shard.bytes:
            return False
        if hashlib.sha256(store.get(shard.index_name)).hexdigest() != shard.index_sha256:
            return False
        if not isinstance(store, Folder):
            return True
        digest = hashlib.sha256()
        for block in store.read(shard.name):
            digest.update(block)
        return digest.hexdigest() == shard.sha256
    except NotFound:
        return False
