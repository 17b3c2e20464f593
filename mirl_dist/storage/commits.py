"""The protocol of commits: parts first, COMPLETE.json last; one writer at a time, and readers trust nothing else.

COMPLETE.json says names, sizes and SHA-256 of every part; the folder's name ends in the generation of the run's lease
that wrote it. A launch that takes a run over writes down once which commits it found (accepted/GENERATION.json): one
that an older generation completes after that does not count, however late it wakes up. No clock has a say in it.
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
    """Who may write: `check` raises UserError as soon as a newer generation exists."""

    generation: int

    def check(self) -> None: ...
    def lost(self) -> bool: ...


class Reader:
    """Nobody: for commands that only read, and for stores that one process alone knows."""

    generation = 0

    def check(self) -> None: ...
    def lost(self) -> bool:
        return False


class _Accepted(NamedTuple):
    generation: int
    folders: frozenset[str]


def part_info(data: bytes) -> PartInfo:
    """What COMPLETE.json says of some bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def add_digest(value: Mapping[str, Any]) -> bytes:
    """A JSON object with its own digest inside."""
    return to_json({**value, "digest": hashlib.sha256(to_json(value)).hexdigest()})


def check_digest(data: bytes) -> dict[str, Any] | None:
    """What `add_digest` was given; None for anything else, down to a single flipped bit."""
    try:
        tree = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(tree, dict):
        return None
    value = {key: tree[key] for key in tree if key != "digest"}
    return value if add_digest(value) == data else None


class Commits:
    """The commits of one run: folders with a COMPLETE.json."""

    def __init__(self, store: Store, writer: Writer) -> None:
        self.store, self.writer = store, writer
        self._known: _Accepted | None = None

    def fence_older_writers(self) -> None:
        """Write down which commits count, and remove what dead writers left. The caller has just claimed the lease."""
        self._known = None
        folders = self.complete("")
        self.writer.check()
        own_list = _accepted_name(self.writer.generation)
        self.store.put_if_absent(own_list, add_digest({"commits": folders}))
        self._known = None
        lists = self.store.list(ACCEPTED)
        self.writer.check()
        for name in lists:  # higher ones too: where the lease was removed by hand, generations begin anew
            if name != own_list:
                self.store.remove(name)
        self.store.sweep(0)

    def complete(self, below: str) -> list[str]:
        """The folders of all commits that count, below a folder, sorted."""
        ending = f"/{COMPLETE}"
        folders = [name.removesuffix(ending) for name in self.store.list(below) if name.endswith(ending)]
        accepted = self._read_accepted()  # afterwards: what a take-over accepts is older than what comes too late
        return [f for f in folders if f in accepted.folders or _generation_of(f) >= accepted.generation]

    def commit(self, folder: str, parts: Mapping[str, bytes]) -> None:
        """Write a commit, complete or not at all; the folder's name ends in the writer's generation. Twice is once.

        Raises UserError when another launch has taken the run over: the commit then does not count.
        """
        self.writer.check()
        complete = add_digest({"parts": {name: part_info(data) for name, data in parts.items()}})
        try:
            for name, data in parts.items():
                self.store.put(f"{folder}/{name}", data)
            self.store.put(f"{folder}/{COMPLETE}", complete)
        except NotFound as error:  # a launch that slept has swept a file away that was being written
            self.writer.check()
            raise Unavailable(str(error)) from error
        self.writer.check()  # nobody newer even now: whoever takes over later finds this commit

    def read_complete(self, folder: str) -> dict[str, PartInfo]:
        """What COMPLETE.json says of each part. Raises UserError for one that is damaged."""
        name = f"{folder}/{COMPLETE}"
        content = check_digest(self.store.get(name))
        if content is None or not isinstance(content.get("parts"), dict):
            raise UserError(f"{self.store.where(name)} is damaged: its bytes are not those that were committed")
        parts: dict[str, PartInfo] = content["parts"]
        return parts

    def parts(self, folder: str) -> dict[str, bytes]:
        """All parts of a commit, verified. Raises UserError naming a part that is missing or damaged."""
        return {
            name: self._read_verified(folder, name, expected) for name, expected in self.read_complete(folder).items()
        }

    def part(self, folder: str, name: str) -> bytes:
        """One part of a commit, verified; as `parts`."""
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
        """Take one part out of a commit. Twice is once."""
        parts = self.read_complete(folder)
        self.writer.check()
        if parts.pop(part, None) is not None:
            self.store.put(f"{folder}/{COMPLETE}", add_digest({"parts": parts}))
        self.store.remove(f"{folder}/{part}")

    def remove(self, folder: str) -> None:
        """COMPLETE.json goes first: a half-removed commit is none."""
        self.store.remove(f"{folder}/{COMPLETE}")
        for name in self.store.list(folder):
            self.store.remove(name)

    def _read_accepted(self) -> _Accepted:
        """What the newest take-over found; a damaged list accepts all, which only a launch that slept could abuse."""
        if self._known is not None and self.writer.generation:
            return self._known  # nobody but this writer may change it now
        known = _Accepted(0, frozenset())
        if newest := max(self.store.list(ACCEPTED), default=None):
            try:
                content = check_digest(self.store.get(newest))
            except NotFound:  # a take-over is under way, and replaces it
                return self._read_accepted()
            if content is not None:
                generation = int(newest[len(ACCEPTED) + 1 :].partition(".")[0])
                known = _Accepted(generation, frozenset(content["commits"]))
        self._known = known
        return known


def _generation_of(folder: str) -> int:
    """Which generation wrote a commit; 0 for a folder that no writer of a lease named."""
    match = re.search(r"-(\d+)$", folder)
    return int(match.group(1)) if match else 0


def _accepted_name(generation: int) -> str:
    return f"{ACCEPTED}/{generation:08d}.json"
