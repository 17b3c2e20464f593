"""Shards as local, verified files: brought when asked or ahead of need, damage found before a sample is used.

Every shard is hashed once per process before its first use. One that is not what the manifest says is looked through
member by member, so that damage has a shard and a key. `refuse` raises it; `skip` lists it, and readers take the next
whole sample of the shard instead, or of the next shard where none is left: the same ones on any number of ranks. A disk
that is full or a server that is away damages no data, and is never skipped.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mirl_dist.data import integrity
from mirl_dist.data.cache import ShardCache, WrongBytes
from mirl_dist.data.download_threads import DownloadThreads
from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import SampleEntry, Shard
from mirl_dist.data.sample import Pixels
from mirl_dist.data.shards import SamplePlace, Shards
from mirl_dist.errors import Stopped, UserError
from mirl_dist.storage import Folder, NotFound, Rejected, Unavailable
from mirl_dist.storage.retry import Patience, download

_SHOWN = 5
_PATIENCE = Patience()
_GRACE_SECONDS = 10.0  # for a shard to come after the run was asked to stop: others may be waiting for this rank
_LOOK_SECONDS = 0.5  # between two looks at whether the run was asked to stop, while a shard is awaited
_DISK = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR)  # of these the file itself is the cause
_REMEDY = "Copy the shard again, build the shards again, or go on without such samples by data.damage: skip."


class _ShardLost(UserError):
    """Nothing of a shard is to be had. why: in a few words that are the same wherever it lies, for tickets."""

    def __init__(self, text: str, why: str) -> None:
        super().__init__(text)
        self.why = why


@dataclass
class _Acquired:
    users: int
    future: Future[LocalShard]


class ShardPool:
    """The shards of an address for one process, from several threads at once."""

    def __init__(
        self,
        shards: Shards,
        cache: ShardCache | None,
        damage: str,
        say: Callable[[str], None],
        *,
        stop_asked: Callable[[], bool] = lambda: False,
        patience: Patience = _PATIENCE,
    ) -> None:
        """cache: None reads a folder in place. damage: 'refuse' or 'skip'. say: takes one line for people."""
        self.shards, self.cache, self._damage = shards, cache, damage
        self._say, self._stop_asked, self._patience = say, stop_asked, patience
        self._downloads = DownloadThreads(self._bring)
        self._guard = threading.Lock()
        self._acquired: dict[str, _Acquired] = {}
        self._proved: dict[str, tuple[object, dict[int, str]]] = {}
        self._wrong_in_store: set[str] = set()
        self._closed = False
        self._reported: set[tuple[str, int]] = set()

    def acquire(self, shard: Shard) -> None:
        """Bring a shard in the background and keep it until `release`; wants are counted."""
        with self._guard:
            wanted = self._acquired.get(shard.name)
            if wanted is None:
                self._acquired[shard.name] = _Acquired(1, self._downloads.submit(shard))
            else:
                wanted.users += 1

    def get(self, shard: Shard) -> LocalShard:
        """A shard that is wanted, once it is here.

        Raises UserError where damage is refused, or nothing of it is left; Stopped when the run was asked to stop while it
        waited. A store that was away when nobody waited for the shard is asked once more.
        """
        with self._guard:
            wanted = self._acquired[shard.name]
            if wanted.future.done() and isinstance(wanted.future.exception(), Unavailable):
                wanted.future = self._downloads.submit(shard)
            future = wanted.future
        since = 0.0
        while True:
            try:
                return future.result(timeout=_LOOK_SECONDS)
            except TimeoutError:
                if future.done():
                    return future.result()
                if self._stop_asked():
                    since = since or time.monotonic()
                    if time.monotonic() - since > _GRACE_SECONDS:
                        text = f"stopped as asked while waiting for {shard.name}; the last commit stands"
                        raise Stopped(text) from None

    def refetch(self, shard: Shard) -> None:
        """Bring a shard anew that is wanted already: its file has gone from where it lay."""
        with self._guard:
            wanted = self._acquired[shard.name]
            old, wanted.future = wanted.future, self._downloads.submit(shard)
        old.add_done_callback(_release_result)

    def release(self, shard: Shard) -> None:
        """One want less; without any the shard's place in the cache may be used for others."""
        with self._guard:
            wanted = self._acquired[shard.name]
            wanted.users -= 1
            if wanted.users:
                return
            del self._acquired[shard.name]
        if not wanted.future.cancel():
            wanted.future.add_done_callback(_release_result)

    @contextmanager
    def holding(self, shards: Iterable[Shard]) -> Iterator[None]:
        """Shards that are wanted for a while."""
        with ExitStack() as stack:
            for shard in shards:
                self.acquire(shard)
                stack.callback(self.release, shard)
            yield

    def image(self, place: SamplePlace, which: str) -> Pixels:
        """One decoded image of an evaluation sample, uint8 (H, W, 3). Raises UserError for damage, whatever the policy."""
        with self.holding([place.shard]):
            return integrity.read_image(self.get(place.shard).path, place, which)

    def verify(self, shard: Shard) -> None:
        """Bring and verify a shard, and let it go. Raises UserError for damage where that is refused."""
        with self.holding([shard]):
            self.get(shard)

    def note(self, local: LocalShard, sample: int, problem: str) -> None:
        """A sample turned out to be damaged. Raises UserError where that is refused."""
        key = local.entries[sample].key
        if not self._skips(local.shard):
            raise UserError(f"{local.shard.name}, sample '{key}': {problem}. {_REMEDY}")
        with self._guard:
            local.bad.setdefault(sample, problem)
        self._tell_once(local.shard, sample, f"sample '{key}': {problem}")

    def close(self) -> None:
        """Stop bringing shards; what is half here stays in the cache for the next process."""
        self._closed = True
        self._downloads.close()

    def _skips(self, shard: Shard) -> bool:
        """Whether damage of a shard may be skipped: never where scores come from, whose means would be others."""
        return self._damage == "skip" and shard.role == "train"

    def _bring(self, shard: Shard) -> LocalShard:
        try:
            local = self._placed(shard, self._entries(shard))
            try:
                local.bad = self._proven(local)
            except BaseException:
                local.release()
                raise
            return local
        except _ShardLost as lost:
            if not self._skips(shard) or self._closed:
                raise
            self._tell_once(shard, -1, f"all of its {shard.samples} samples: {lost}")
            return LocalShard(shard, Path(), (), dict.fromkeys(range(shard.samples), lost.why))

    def _entries(self, shard: Shard) -> tuple[SampleEntry, ...]:
        try:
            return self.shards.index(shard).entries
        except (Rejected, Unavailable):
            raise
        except UserError as fault:
            raise _ShardLost(str(fault), "its index is missing or damaged") from None

    def _proven(self, local: LocalShard) -> dict[int, str]:
        """The damaged samples of a shard that is here, its bytes compared with the manifest's if they were not yet."""
        name = local.shard.name
        try:
            seen = local.state or integrity.file_state(local.path)
            if name not in self._proved or self._proved[name][0] != seen:
                found = integrity.find_damage(local.path, local.shard, local.entries)
                if found is not None:
                    self._tell(local, found)
                self._proved[name] = (seen, found or {})
        except OSError as error:
            text = f"{name} cannot be read ({error}). Check the disk."
            if error.errno in _DISK and self.cache is None:
                raise _ShardLost(text, "cannot be read") from None
            raise UserError(text) from None
        return self._proved[name][1]

    def _placed(self, shard: Shard, entries: tuple[SampleEntry, ...]) -> LocalShard:
        """A shard's file on this node; one from a store is whole, or what can be had of a damaged one."""
        store = self.shards.store
        if self.cache is None:
            assert isinstance(store, Folder)
            path = Path(store.where(shard.name))
            if not path.is_file():
                raise _ShardLost(f"{path} is missing. {_REMEDY}", "is missing")
            return LocalShard(shard, path, entries)
        try:
            if shard.name not in self._wrong_in_store:
                return self._cached(self.cache, shard, entries)
            return self._salvaged(self.cache, shard, entries)
        except NotFound:
            raise _ShardLost(f"{store.where(shard.name)} is missing. {_REMEDY}", "is missing") from None

    def _cached(self, cache: ShardCache, shard: Shard, entries: tuple[SampleEntry, ...]) -> LocalShard:
        """A shard through the cache. One that went bad on this node's disk is brought again: the store has another."""

        def fetch(path: Path) -> None:
            download(self.shards.store, shard.name, path, shard.bytes, patience=self._patience, say=self._say)

        try:
            while True:
                held = cache.acquire(shard.sha256, shard.bytes, fetch, lambda: self._closed)
                if held.fresh or shard.name in self._proved or held.holds(shard.sha256):
                    break
                cache.discard(held)
        except WrongBytes:
            return self._salvaged(cache, shard, entries)
        except Rejected:
            if self.shards.store.size(shard.name) == shard.bytes:
                raise
            return self._salvaged(cache, shard, entries)
        if self._proved.get(shard.name, (None,))[0] != held.state:
            self._proved[shard.name] = (held.state, {})
        return LocalShard(shard, held.path, entries, release=held.release, state=held.state)

    def _salvaged(self, cache: ShardCache, shard: Shard, entries: tuple[SampleEntry, ...]) -> LocalShard:
        """What the store has in the place of a shard that is damaged there, through the cache too."""
        self._wrong_in_store.add(shard.name)
        store = self.shards.store
        size = store.size(shard.name)

        def fetch(path: Path) -> None:
            download(store, shard.name, path, size, patience=self._patience, say=self._say)

        held = cache.acquire(shard.sha256, size, fetch, lambda: self._closed, damaged=True)
        return LocalShard(shard, held.path, entries, release=held.release, state=held.state)

    def _tell(self, local: LocalShard, found: dict[int, str]) -> None:
        """Damage by shard and key: raised, or told."""
        entries = local.entries
        said = [f"sample '{entries[i].key}' {problem}" for i, problem in list(found.items())[:_SHOWN]]
        if len(found) > _SHOWN:
            said.append(f"and {len(found) - _SHOWN} more")
        text = "; ".join(said) or "no image is damaged, only what lies between them"
        if not self._skips(local.shard):
            where = self.shards.store.where(local.shard.name)
            raise UserError(f"{where}: its bytes are not the manifest's: {text}. {_REMEDY}")
        self._tell_once(local.shard, -1, text)

    def _tell_once(self, shard: Shard, sample: int, text: str) -> None:
        with self._guard:
            if (shard.name, sample) in self._reported:
                return
            self._reported.add((shard.name, sample))
        self._say(f"skipped of {shard.name}: {text}")


def _release_result(future: Future[LocalShard]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
