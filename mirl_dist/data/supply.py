"""Shards as local, verified files: brought when asked or ahead of need, damage found before a sample is used.

Every shard is hashed once per process before its first use. One that is not what the manifest says is looked through
member by member, so that damage has a shard and a key. `refuse` raises it; `skip` lists it, and readers take the next
whole sample of the shard instead, or of the next shard where none is left: the same ones on any number of ranks.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from mirl_dist.data.cache import Cache, WrongBytes
from mirl_dist.data.manifest import NOTES, Entry, Part, Shard
from mirl_dist.data.sample import Pixels, decode
from mirl_dist.data.shards import Place, Shards
from mirl_dist.faults import Fault
from mirl_dist.storage import Folder, NotAllowed, NotThere, TryAgain
from mirl_dist.storage.patience import Patience, download

_SHOWN = 5
_PATIENCE = Patience()
_STREAMS = 4  # shards that one process brings at a time


@dataclass
class Local:
    """A shard on this node. bad: number of a sample -> what is wrong with it; let_go: frees its place."""

    shard: Shard
    path: Path
    entries: tuple[Entry, ...]
    bad: dict[int, str] = field(default_factory=dict)
    let_go: Callable[[], None] = lambda: None


@dataclass
class _Wanted:
    users: int
    future: Future[Local]


class _Lost(Fault):
    """Nothing of a shard is to be had. why: in a few words that are the same wherever it lies, for tickets."""

    def __init__(self, text: str, why: str) -> None:
        super().__init__(text)
        self.why = why


class _Bringers:
    """A few threads that bring shards in the order of asking. They never keep a process alive that wants to end, as a
    pool of the standard library would for as long as a server is away."""

    def __init__(self, bring: Callable[[Shard], Local]) -> None:
        self._bring, self._asked = bring, queue.SimpleQueue[tuple[Future[Local], Shard] | None]()
        self._threads: list[threading.Thread] = []

    def submit(self, shard: Shard) -> Future[Local]:
        if len(self._threads) < _STREAMS:
            self._threads.append(threading.Thread(target=self._work, name="supply", daemon=True))
            self._threads[-1].start()
        future: Future[Local] = Future()
        self._asked.put((future, shard))
        return future

    def close(self) -> None:
        for _ in self._threads:
            self._asked.put(None)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            future, shard = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._bring(shard))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the shard raises it
                future.set_exception(error)


class Supply:
    """The shards of an address for one process, from several threads at once."""

    def __init__(
        self,
        shards: Shards,
        cache: Cache | None,
        damage: str,
        say: Callable[[str], None],
        patience: Patience = _PATIENCE,
    ) -> None:
        """cache: None reads a folder in place. damage: 'refuse' or 'skip'. say: takes one line for people."""
        self.shards, self.cache, self._damage = shards, cache, damage
        self._say, self._patience = say, patience
        self._bringers = _Bringers(self._bring)
        self._guard = threading.Lock()
        self._wanted: dict[str, _Wanted] = {}
        self._proved: dict[str, tuple[object, dict[int, str]]] = {}
        self._closed = False
        self._told: set[tuple[str, int]] = set()

    def want(self, shard: Shard) -> None:
        """Bring a shard in the background and keep it until `release`; wants are counted."""
        with self._guard:
            wanted = self._wanted.get(shard.name)
            if wanted is None:
                self._wanted[shard.name] = _Wanted(1, self._bringers.submit(shard))
            else:
                wanted.users += 1

    def get(self, shard: Shard) -> Local:
        """A shard that is wanted, once it is here. Raises Fault where damage is refused, or nothing of it is left."""
        with self._guard:
            future = self._wanted[shard.name].future
        return future.result()

    def release(self, shard: Shard) -> None:
        """One want less; without any the shard's place in the cache may be used for others."""
        with self._guard:
            wanted = self._wanted[shard.name]
            wanted.users -= 1
            if wanted.users:
                return
            del self._wanted[shard.name]
        if not wanted.future.cancel():
            wanted.future.add_done_callback(_let_go)

    def image(self, place: Place, which: str) -> Pixels:
        """One decoded image of an evaluation sample, uint8 (H, W, 3). Raises Fault for damage, whatever the policy."""
        self.want(place.shard)
        try:
            local = self.get(place.shard)
            return _image(local.path, place, which)
        finally:
            self.release(place.shard)

    def note(self, local: Local, sample: int, problem: str) -> None:
        """A sample turned out to be damaged. Raises Fault where that is refused."""
        key = local.entries[sample].key
        if not self._skips(local.shard):
            raise Fault(f"{local.shard.name}, sample '{key}': {problem}. {_REMEDY}")
        with self._guard:
            local.bad.setdefault(sample, problem)
        self._tell_once(local.shard, sample, f"sample '{key}': {problem}")

    def _skips(self, shard: Shard) -> bool:
        """Whether damage of a shard may be skipped: never where scores come from, whose means would be others."""
        return self._damage == "skip" and shard.role == "train"

    def close(self) -> None:
        """Stop bringing shards; what is half here stays in the cache for the next process."""
        self._closed = True
        self._bringers.close()

    def _bring(self, shard: Shard) -> Local:
        try:
            return self._proven(shard)
        except _Lost as lost:  # no other fault: a full disk or a cache without room damages no data
            if not self._skips(shard) or self._closed:
                raise
            self._tell_once(shard, -1, f"all of its {shard.samples} samples: {lost}")
            return Local(shard, Path(), (), dict.fromkeys(range(shard.samples), lost.why))

    def _proven(self, shard: Shard) -> Local:
        """A shard that is here, its bytes compared with the manifest's."""
        try:
            entries = self.shards.index(shard).entries
        except (NotAllowed, TryAgain):
            raise
        except Fault as fault:
            raise _Lost(str(fault), "its index is missing or damaged") from None
        try:
            local = self._placed(shard, entries)
            stat = local.path.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            before = self._proved.get(shard.name)
            if before is None or before[0] != seen:
                found = _damage(local)
                if found is not None:
                    self._tell(local, found)
                self._proved[shard.name] = (seen, found or {})
            local.bad = self._proved[shard.name][1]
            return local
        except OSError as error:
            raise _Lost(f"{shard.name} cannot be read ({error}). Check the disk.", "cannot be read") from None

    def _placed(self, shard: Shard, entries: tuple[Entry, ...]) -> Local:
        """A shard's file on this node; one from a store is whole, or what can be had of a damaged one."""
        store = self.shards.store
        if self.cache is None:
            assert isinstance(store, Folder)
            path = Path(store.where(shard.name))
            if not path.is_file():
                raise _Lost(f"{path} is missing. {_REMEDY}", "is missing")
            return Local(shard, path, entries)

        def fetch(path: Path) -> None:
            download(store, shard.name, path, shard.bytes, patience=self._patience, say=self._say)

        try:
            held = self.cache.hold(shard.sha256, shard.bytes, fetch, lambda: self._closed)
            if not held.fresh and shard.name not in self._proved and file_digest(held.path) != shard.sha256:
                held.release()
                self.cache.discard(shard.sha256)  # damaged on this node's disk: the store has another
                held = self.cache.hold(shard.sha256, shard.bytes, fetch, lambda: self._closed)
            stat = held.path.stat()
            self._proved[shard.name] = ((stat.st_ino, stat.st_size, stat.st_mtime_ns), {})
            return Local(shard, held.path, entries, let_go=held.release)
        except NotThere:
            raise _Lost(f"{store.where(shard.name)} is missing. {_REMEDY}", "is missing") from None
        except NotAllowed:
            if store.size(shard.name) == shard.bytes:
                raise
        except WrongBytes:
            pass
        return self._salvaged(shard, entries, self.cache.folder)

    def _salvaged(self, shard: Shard, entries: tuple[Entry, ...], folder: Path) -> Local:
        """A shard that is damaged in the store itself, in a file of its own for as long as it is used."""
        store = self.shards.store
        handle, name = tempfile.mkstemp(prefix="damaged-", suffix=".tar", dir=folder)
        os.close(handle)
        path = Path(name)
        download(store, shard.name, path, store.size(shard.name), patience=self._patience, say=self._say)
        return Local(shard, path, entries, let_go=partial(path.unlink, missing_ok=True))

    def _tell(self, local: Local, found: dict[int, str]) -> None:
        """Damage by shard and key: raised, or listed and told."""
        entries = local.entries
        where = self.shards.store.where(local.shard.name)
        said = [f"sample '{entries[i].key}' {problem}" for i, problem in list(found.items())[:_SHOWN]]
        if len(found) > _SHOWN:
            said.append(f"and {len(found) - _SHOWN} more")
        found_text = "; ".join(said) or "no image is damaged, only what lies between them"
        text = f"{where}: its bytes are not the manifest's: {found_text}"
        if not self._skips(local.shard):
            local.let_go()
            raise Fault(f"{text}. {_REMEDY}")
        self._tell_once(local.shard, -1, found_text)

    def _tell_once(self, shard: Shard, sample: int, text: str) -> None:
        with self._guard:
            if (shard.name, sample) in self._told:
                return
            self._told.add((shard.name, sample))
        self._say(f"skipped of {shard.name}: {text}")


_REMEDY = "Copy the shard again, build the shards again, or train without such samples by data.damage: skip."


def _let_go(future: Future[Local]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().let_go()


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _damage(local: Local) -> dict[int, str] | None:
    """None for a shard as the manifest says; else its damaged samples by number."""
    if file_digest(local.path) == local.shard.sha256:
        return None
    found = {}
    with local.path.open("rb") as tar:
        for number, entry in enumerate(local.entries):
            wrong = [name for name, part in entry.parts.items() if name != NOTES and not _sound(tar, part)]
            if wrong:
                found[number] = f"is damaged ({', '.join(sorted(wrong))})"
    return found


def _sound(tar: BinaryIO, part: Part) -> bool:
    tar.seek(part.offset)
    return sha256(tar.read(part.size)).hexdigest() == part.sha256


def _image(path: Path, place: Place, which: str) -> Pixels:
    """A member of a shard, its own digest checked once more, decoded."""
    found = place.entry.image(which)
    where = f"{place.shard.name}, sample '{place.entry.key}', {which}"
    if found is None:
        raise Fault(f"{where}: the index names no such image. Build the shards again.")
    try:
        with path.open("rb") as tar:
            tar.seek(found[1].offset)
            data = tar.read(found[1].size)
    except OSError as error:
        raise Fault(f"{where} cannot be read ({error}). Check the disk, or copy the shard again.") from None
    if sha256(data).hexdigest() != found[1].sha256:
        raise Fault(f"{where}: the bytes are not those that were built (SHA-256 differs). Copy the shard again.")
    return decode(data, where)
