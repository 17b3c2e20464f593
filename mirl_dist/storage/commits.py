"""The commit protocol: all parts are written first, COMPLETE.json last. Readers trust only complete commits.

COMPLETE.json lists the name, size and SHA-256 of every part. The name of a commit's folder ends in the lease generation
that wrote it. A launch that takes over a run records once which commits it found (accepted/GENERATION.json). Commits
that an older generation completes afterwards are ignored, so a stalled writer cannot interfere, however late it wakes
up. The protocol depends on no clock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from mirl_dist.config.canonical_json import to_json
from mirl_dist.errors import UserError
from mirl_dist.storage import NotFound, Store, Unavailable

COMPLETE, ACCEPTED = "COMPLETE.json", "accepted"
PartInfo = dict[str, Any]


class Writer(Protocol):
    """Interface of a lease holder. `check` raises UserError once a newer generation exists; `lost` asks no store."""

    @property
    def generation(self) -> int: ...
    def check(self) -> None: ...
    def lost(self) -> bool: ...


class Reader:
    """A `Writer` without a lease: for read-only commands, and for stores that only one process uses."""

    generation = 0

    def check(self) -> None: ...
    def lost(self) -> bool:
        return False


class _Accepted(NamedTuple):
    generation: int
    folders: frozenset[str]


def part_info(data: bytes) -> PartInfo:
    """Return the size and SHA-256 of a part, as COMPLETE.json lists them."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def add_digest(value: Mapping[str, Any]) -> bytes:
    """Serialize an object as canonical JSON that contains its own SHA-256 as `digest`."""
    return to_json({**value, "digest": hashlib.sha256(to_json(value)).hexdigest()})


def check_digest(data: bytes) -> dict[str, Any] | None:
    """Return the object that `add_digest` serialized, or None if the bytes differ from its output in any way."""
    try:
        tree = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(tree, dict):
        return None
    value = {key: tree[key] for key in tree if key != "digest"}
    return value if add_digest(value) == data else None


class Commits:
    """The commits of one run: the folders that contain a COMPLETE.json."""

    def __init__(self, store: Store, writer: Writer) -> None:
        self.store, self.writer = store, writer
        self._known: _Accepted | None = None

    def fence_older_writers(self) -> None:
        """Record the accepted commits and delete what crashed writers left. Call right after claiming the lease."""
        self._known = None
        folders = self.complete("")
        self.writer.check()
        own_list = f"{ACCEPTED}/{self.writer.generation:08d}.json"
        self.store.put_if_absent(own_list, add_digest({"commits": folders}))
        self._known = None
        lists = self.store.list(ACCEPTED)
        self.writer.check()
        for name in lists:  # higher ones too: generations restart at 1 if the lease was deleted by hand
            if name != own_list:
                self.store.remove(name)
        self.store.sweep(0)

    def complete(self, below: str) -> list[str]:
        """Return the folders of all accepted commits below a folder, sorted."""
        ending = f"/{COMPLETE}"
        folders = [name.removesuffix(ending) for name in self.store.list(below) if name.endswith(ending)]
        accepted = self._read_accepted()  # read last, so that a late commit in the listing is rejected
        return [f for f in folders if f in accepted.folders or _generation_of(f) >= accepted.generation]

    def commit(self, folder: str, parts: Mapping[str, bytes]) -> None:
        """Write a commit atomically. The folder's name must end in the writer's generation. Idempotent.

        Raises UserError if another launch has taken over the run; the commit is then ignored.
        """
        self.writer.check()
        complete = add_digest({"parts": {name: part_info(data) for name, data in parts.items()}})
        try:
            for name, data in parts.items():
                self.store.put(f"{folder}/{name}", data)
            self.store.put(f"{folder}/{COMPLETE}", complete)
        except NotFound as error:  # a stalled launch swept a temporary file that was being written
            self.writer.check()
            raise Unavailable(str(error)) from error
        self.writer.check()  # still the newest generation: a later takeover will find and accept this commit

    def read_complete(self, folder: str) -> dict[str, PartInfo]:
        """Return the size and SHA-256 of each part from COMPLETE.json. Raise UserError if that file is damaged."""
        name = f"{folder}/{COMPLETE}"
        content = check_digest(self.store.get(name))
        if content is None or not isinstance(content.get("parts"), dict):
            raise UserError(f"{self.store.where(name)} is damaged: its bytes are not those that were committed")
        parts: dict[str, PartInfo] = content["parts"]
        return parts

    def parts(self, folder: str) -> dict[str, bytes]:
        """Return all parts of a commit, verified. Raise UserError naming a part that is missing or damaged."""
        return {
            name: self._read_verified(folder, name, expected) for name, expected in self.read_complete(folder).items()
        }

    def part(self, folder: str, name: str) -> bytes:
        """Return one part of a commit, verified. Raise UserError if it is missing or damaged."""
        parts = self.read_complete(folder)
        if name not in parts:
            raise UserError(f"{self.store.where(folder)} has no {name}")
        return self._read_verified(folder, name, parts[name])

    def _read_verified(self, folder: str, name: str, expected: PartInfo) -> bytes:
        location = self.store.where(f"{folder}/{name}")
        try:
            data = self.store.get(f"{folder}/{name}")
        except NotFound:
            raise UserError(f"{location} is missing from its commit") from None
        if expected != part_info(data):
            raise UserError(f"{location} is damaged: its bytes are not those that were committed")
        return data

    def drop(self, folder: str, part: str) -> None:
        """Remove one part from a commit. Idempotent."""
        parts = self.read_complete(folder)
        self.writer.check()
        if parts.pop(part, None) is not None:
            self.store.put(f"{folder}/{COMPLETE}", add_digest({"parts": parts}))
        self.store.remove(f"{folder}/{part}")

    def remove(self, folder: str) -> None:
        """Delete a commit, COMPLETE.json first, so that a partly deleted commit is not a commit."""
        self.store.remove(f"{folder}/{COMPLETE}")
        for name in self.store.list(folder):
            self.store.remove(name)

    def _read_accepted(self) -> _Accepted:
        """Return the newest accepted list. A damaged list accepts all commits, even late ones of a stalled writer."""
        if self._known is not None and self.writer.generation:
            return self._known  # only this writer may change it while it holds the lease
        known = _Accepted(0, frozenset())
        if newest := max(self.store.list(ACCEPTED), default=None):
            try:
                content = check_digest(self.store.get(newest))
            except NotFound:  # a takeover is replacing it
                return self._read_accepted()
            if content is not None:
                generation = int(newest[len(ACCEPTED) + 1 :].partition(".")[0])
                known = _Accepted(generation, frozenset(content["commits"]))
        self._known = known
        return known


def _generation_of(folder: str) -> int:
    """Return the lease generation that wrote a commit; 0 if the folder's name contains none."""
    match = re.search(r"-(\d+)$", folder)
    return int(match.group(1)) if match else 0
