"""The protocol of commits: parts first, COMPLETE.json last; one writer at a time, and readers trust nothing else.

COMPLETE.json says names, sizes and SHA-256 of every part, and which generation of the run's lease wrote it. A launch
that takes a run over writes down once which commits it found (accepted/GENERATION.json): a commit that an older
generation completes after that does not count, however late it wakes up. No clock has a say in it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Set
from typing import Any, NamedTuple, Protocol

from mirl_dist.faults import Fault
from mirl_dist.storage import NotThere, Store

COMPLETE, ACCEPTED = "COMPLETE.json", "accepted"
Facts = dict[str, Any]


class Writer(Protocol):
    """Who may write: `check` raises Fault as soon as a newer generation exists."""

    generation: int

    def check(self) -> None: ...


class Reader:
    """Nobody: for commands that only read, and for stores that one process alone knows."""

    generation = 0

    def check(self) -> None: ...


class _Accepted(NamedTuple):
    generation: int
    folders: frozenset[str]


def facts(data: bytes) -> Facts:
    """What COMPLETE.json says of some bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def dump(value: Any) -> bytes:
    """Plain values as the JSON that this project writes: the same values give the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def sealed(value: Mapping[str, Any]) -> bytes:
    """A JSON object with its own digest inside."""
    return dump({**value, "digest": hashlib.sha256(dump(value)).hexdigest()})


def unsealed(data: bytes) -> dict[str, Any] | None:
    """What `sealed` was given; None for anything else, down to a single flipped bit."""
    try:
        found = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(found, dict):
        return None
    value = {key: found[key] for key in found if key != "digest"}
    return value if sealed(value) == data else None


class Commits:
    """The commits of one run: folders with a COMPLETE.json."""

    def __init__(self, store: Store, writer: Writer) -> None:
        self.store, self.writer = store, writer
        self._known: _Accepted | None = None
        self._generations: dict[str, int] = {}

    def take_over(self) -> None:
        """Write down which commits count, and remove what dead writers left. The caller has just claimed the lease."""
        self._known = None
        folders = self.whole("")
        self.writer.check()
        mine = _accepted_name(self.writer.generation)
        self.store.put_if_absent(mine, sealed({"commits": folders}))
        self._known = None
        for name in self.store.list(ACCEPTED):
            if name < mine:
                self.store.remove(name)
        self.store.sweep(0)

    def whole(self, below: str) -> list[str]:
        """The folders of all commits that count, below a folder, sorted."""
        accepted = self._accepted()
        found = [name.removesuffix(f"/{COMPLETE}") for name in self.store.list(below) if name.endswith(f"/{COMPLETE}")]
        return [f for f in found if f in accepted.folders or self._generation(f) >= accepted.generation]

    def commit(self, folder: str, parts: Mapping[str, bytes], beside: Mapping[str, Facts] = {}) -> None:
        """Write a commit, complete or not at all.

        beside: facts of files elsewhere in the run that the commit needs. Raises Fault when another launch has taken
        the run over: the commit then does not count.
        """
        self.writer.check()
        for name, data in parts.items():
            self.store.put(f"{folder}/{name}", data)
        self._complete(folder, {name: facts(data) for name, data in parts.items()}, beside)
        self._generations.pop(folder, None)
        self.writer.check()  # nobody newer even now: whoever takes over later finds this commit

    def _complete(self, folder: str, parts: Mapping[str, Facts], beside: Mapping[str, Facts]) -> None:
        """Conditionally, since a dead writer's may lie there; that one does not count, or is damaged."""
        name = f"{folder}/{COMPLETE}"
        said = sealed({"parts": dict(parts), "beside": dict(beside), "generation": self.writer.generation})
        while not self.store.put_if_absent(name, said):
            self.writer.check()
            self.store.remove(name)

    def said(self, folder: str) -> dict[str, dict[str, Facts]]:
        """What COMPLETE.json says: {'parts': ..., 'beside': ...}. Raises Fault for one that is damaged."""
        name = f"{folder}/{COMPLETE}"
        data = self.store.get(name)
        found = _said(data)
        if found is None:
            raise Fault(f"{self.store.where(name)} is damaged: its bytes are not those that were committed")
        return found

    def parts(self, folder: str) -> dict[str, bytes]:
        """All parts of a commit, verified. Raises Fault naming a part that is missing or damaged."""
        said = self.said(folder)
        for name, expected in said["beside"].items():
            self._verified(name, expected)
        return {name: self._verified(f"{folder}/{name}", expected) for name, expected in said["parts"].items()}

    def _verified(self, name: str, expected: Facts) -> bytes:
        where = self.store.where(name)
        try:
            data = self.store.get(name)
        except NotThere:
            raise Fault(f"{where} is missing from its commit") from None
        if expected != facts(data):
            raise Fault(f"{where} is damaged: its bytes are not those that were committed")
        return data

    def drop(self, folder: str, part: str) -> None:
        """Take one part out of a commit."""
        said = self.said(folder)
        if said["parts"].pop(part, None) is not None:
            self.writer.check()
            value = {"parts": said["parts"], "beside": said["beside"], "generation": self.writer.generation}
            self.store.put(f"{folder}/{COMPLETE}", sealed(value))
            self.store.remove(f"{folder}/{part}")

    def remove(self, folder: str) -> None:
        """COMPLETE.json goes first: a half-removed commit is none."""
        self.store.remove(f"{folder}/{COMPLETE}")
        for name in self.store.list(folder):
            self.store.remove(name)

    def _accepted(self) -> _Accepted:
        """What the newest take-over found; a damaged list accepts everything, which a dead writer alone could abuse."""
        if self._known is not None and self.writer.generation:
            return self._known  # nobody but this writer may change it now
        newest = max(self.store.list(ACCEPTED), default=None)
        found = None if newest is None else unsealed(self.store.get(newest))
        self._known = _Accepted(0, frozenset())
        if newest is not None and found is not None:
            self._known = _Accepted(int(newest[len(ACCEPTED) + 1 :].partition(".")[0]), frozenset(found["commits"]))
        return self._known

    def _generation(self, folder: str) -> int:
        """Which generation wrote a commit: its folder's name tells for steps, COMPLETE.json for rounds."""
        if match := re.search(r"-(\d+)$", folder):
            return int(match.group(1))
        if folder not in self._generations:
            try:
                data = self.store.get(f"{folder}/{COMPLETE}")
            except NotThere:
                return -1
            found = _said(data)
            # One that is damaged counts, so that whoever reads it notices.
            self._generations[folder] = sys.maxsize if found is None else int(found.get("generation", 0))
        return self._generations[folder]


def _accepted_name(generation: int) -> str:
    return f"{ACCEPTED}/{generation:08d}.json"


def unsigned(data: bytes, keys: Set[str]) -> dict[str, Any] | None:
    """What versions before the lease wrote without a digest: a JSON object with exactly these keys."""
    try:
        found = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) and found.keys() == keys else None


def _said(data: bytes) -> dict[str, Any] | None:
    """What COMPLETE.json says, of this version or an older one."""
    old = unsigned(data, {"parts"})
    return unsealed(data) if old is None or not isinstance(old["parts"], dict) else old | {"beside": {}}
