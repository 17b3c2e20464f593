"""Makes a shard available as a local, verified file: in place in a folder, or downloaded into the node's cache.

Every shard is hashed once per process before its first use. If its digest differs from the manifest, every member is
checked, so that damage is reported by shard and key. A full disk or an unavailable server is not damage and is never
skipped.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from mirl_dist.data import integrity
from mirl_dist.data.cache import ShardCache, WrongBytes
from mirl_dist.data.damage import REMEDY, WHOLE_SHARD, DamagePolicy
from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import SampleEntry, Shard
from mirl_dist.data.shards import Shards
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, NotFound, Rejected, Unavailable
from mirl_dist.storage.retry import Patience, download

_FILE_ERRORS = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR)  # errors of the file, not the system


class _ShardLost(UserError):
    """No sample of a shard can be read. reason: a short text without local paths, for tickets."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class ShardFetcher:
    """Fetches the shards of an address, and remembers which files it has verified. Thread-safe."""

    def __init__(
        self,
        shards: Shards,
        cache: ShardCache | None,
        damage: DamagePolicy,
        patience: Patience,
        say: Callable[[str], None],
    ) -> None:
        self._shards, self._cache, self._damage = shards, cache, damage
        self._patience, self._say = patience, say
        self._verified: dict[str, tuple[object, dict[int, str]]] = {}
        self._wrong_in_store: set[str] = set()
        self._closed = False

    def fetch(self, shard: Shard) -> LocalShard:
        """Fetch a shard to this node and verify it. Raises UserError for refused damage or a full disk."""
        try:
            local = self._locate(shard, self._read_entries(shard))
            try:
                local.damaged = self._find_damage(local)
            except BaseException:
                local.release()
                raise
            return local
        except _ShardLost as lost:
            if not self._damage.skips(shard) or self._closed:
                raise
            self._damage.report_once(shard, WHOLE_SHARD, f"all of its {shard.samples} samples: {lost}")
            return LocalShard(shard, Path(), (), dict.fromkeys(range(shard.samples), lost.reason))

    def close(self) -> None:
        """Start no further download; partial files remain in the cache, where the next process resumes them."""
        self._closed = True

    def _read_entries(self, shard: Shard) -> tuple[SampleEntry, ...]:
        try:
            return self._shards.index(shard).entries
        except (Rejected, Unavailable):
            raise
        except UserError as fault:
            raise _ShardLost(str(fault), "its index is missing or damaged") from None

    def _find_damage(self, local: LocalShard) -> dict[int, str]:
        """Return the damaged samples of a local shard, verifying the file if it is new or has changed."""
        name = local.shard.name
        try:
            state = local.state or integrity.file_state(local.path)
            if name not in self._verified or self._verified[name][0] != state:
                damaged = integrity.find_damage(local.path, local.shard, local.entries)
                if damaged is not None:
                    self._damage.report_shard(local, damaged, self._shards.store.where(name))
                self._verified[name] = (state, damaged or {})
        except OSError as error:
            text = f"{name} cannot be read ({error}). Check the disk."
            if error.errno in _FILE_ERRORS and self._cache is None:
                raise _ShardLost(text, "cannot be read") from None
            raise UserError(text) from None
        return self._verified[name][1]

    def _locate(self, shard: Shard, entries: tuple[SampleEntry, ...]) -> LocalShard:
        """Return the local file of a shard; from a store: the intact file, or else the store's damaged version."""
        store = self._shards.store
        if self._cache is None:
            assert isinstance(store, Folder)
            path = Path(store.where(shard.name))
            if not path.is_file():
                raise _ShardLost(f"{path} is missing. {REMEDY}", "is missing")
            return LocalShard(shard, path, entries)
        try:
            if shard.name not in self._wrong_in_store:
                return self._fetch_whole(self._cache, shard, entries)
            return self._fetch_damaged(self._cache, shard, entries)
        except NotFound:
            raise _ShardLost(f"{store.where(shard.name)} is missing. {REMEDY}", "is missing") from None

    def _fetch_whole(self, cache: ShardCache, shard: Shard, entries: tuple[SampleEntry, ...]) -> LocalShard:
        """Fetch a shard through the cache. A copy that was damaged on this node's disk is replaced."""

        def fetch(path: Path) -> None:
            download(self._shards.store, shard.name, path, shard.bytes, patience=self._patience, say=self._say)

        try:
            while True:
                cached = cache.acquire(shard.sha256, shard.bytes, fetch, lambda: self._closed)
                if cached.fresh or shard.name in self._verified or cached.matches(shard.sha256):
                    break
                cache.discard(cached)
        except WrongBytes:
            return self._fetch_damaged(cache, shard, entries)
        except Rejected:
            if self._shards.store.size(shard.name) == shard.bytes:
                raise
            return self._fetch_damaged(cache, shard, entries)
        if self._verified.get(shard.name, (None,))[0] != cached.state:
            self._verified[shard.name] = (cached.state, {})
        return LocalShard(shard, cached.path, entries, release=cached.release, state=cached.state)

    def _fetch_damaged(self, cache: ShardCache, shard: Shard, entries: tuple[SampleEntry, ...]) -> LocalShard:
        """Fetch the store's version of a shard that is damaged in the store, also through the cache."""
        self._wrong_in_store.add(shard.name)
        store = self._shards.store
        size = store.size(shard.name)

        def fetch(path: Path) -> None:
            download(store, shard.name, path, size, patience=self._patience, say=self._say)

        cached = cache.acquire(shard.sha256, size, fetch, lambda: self._closed, damaged=True)
        return LocalShard(shard, cached.path, entries, release=cached.release, state=cached.state)
