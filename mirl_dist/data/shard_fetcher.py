"""Makes a shard available as a local, verified file: in place in a folder, or downloaded into the node's cache.

Every shard is hashed once per process before its first use. If its digest differs from the manifest, every member is
checked, so that damage is reported by shard and key: as a UserError (refuse), or once, to go on without it (skip). A
full disk or an unavailable server is not damage and is never skipped.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from mirl_dist.data.cache import CachedShard, ShardCache, WrongBytes
from mirl_dist.data.manifest import CLEAN, DEGRADED, NOTES, SampleEntry, Shard
from mirl_dist.data.sample import SampleLocation
from mirl_dist.data.sampler import Slot
from mirl_dist.data.shards import Shards
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, NotFound, Rejected, Unavailable
from mirl_dist.storage.hashing import digest_of_file
from mirl_dist.storage.retry import Patience, download

_REMEDY = "Copy the shard again, build the shards again, or go on without such samples by data.damage: skip."
_WHOLE_SHARD = -1
_SHOWN = 5
_FILE_ERRORS = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR)  # errors of the file, not the system


@dataclass
class LocalShard:
    """A shard on this node.

    damaged: sample number -> problem (text for a ticket). release: allows the cache to evict the file. state: a value
    that changes when the file changes; None if it must be read from the file system.
    """

    shard: Shard
    path: Path
    entries: tuple[SampleEntry, ...]
    damaged: dict[int, str] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None
    state: object = None

    def find_intact(self, sample: int, skipped: dict[str, str]) -> int | None:
        """Return the number of the first intact sample from `sample` on, cyclically; None without any.

        skipped: receives 'shard' or 'shard key' -> problem for the damaged ones before it.
        """
        for step in range(self.shard.samples):
            number = (sample + step) % self.shard.samples
            if number not in self.damaged:
                return number
            key = f" {self.entries[number].key}" if self.entries else ""
            skipped[self.shard.name + key] = self.damaged[number]
        return None

    def locate(self, sample: int, slot: Slot) -> SampleLocation:
        """Return the location of a sample, with the task, round and pass of a slot."""
        entry = self.entries[sample]
        clean = entry.image(CLEAN)
        assert clean is not None, "manifest.read_index lets no sample through without a clean image"
        images = clean, entry.image(DEGRADED)
        size, draws = (entry.height, entry.width), (slot.task, slot.round_, slot.pass_index)
        return SampleLocation(str(self.path), self.shard.name, entry.key, *size, *images, *draws)

    def find_damage(self) -> dict[int, str] | None:
        """Hash the file; return its damaged samples as number -> problem, or None if the file is intact."""
        with self.path.open("rb") as tar:
            if digest_of_file(tar) == self.shard.sha256:
                return None
            damaged = {}
            for number, entry in enumerate(self.entries):
                wrong = []
                for name, part in entry.parts.items():
                    tar.seek(part.offset)
                    if name != NOTES and sha256(tar.read(part.size)).hexdigest() != part.sha256:
                        wrong.append(name)
                if wrong:
                    damaged[number] = f"is damaged ({', '.join(sorted(wrong))})"
            return damaged


def _is_intact(cached: CachedShard, shard: Shard) -> bool:
    try:
        return cached.digest() == shard.sha256
    except OSError:  # the node's disk cannot read the copy
        return False


def _file_state(path: Path) -> tuple[int, int, int]:
    """Return inode, size in bytes and modification time in nanoseconds, which change when the file does."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class DamagePolicy:
    """Raises or reports damage according to `data.damage`. Thread-safe."""

    def __init__(self, policy: str, say: Callable[[str], None]) -> None:
        """policy: 'refuse' or 'skip'. say: prints one line of text."""
        self._policy, self._say = policy, say
        self._lock = threading.Lock()
        self._reported: set[tuple[str, int]] = set()

    def skips(self, shard: Shard) -> bool:
        """Return whether damage in this shard is skipped: never in evaluation shards, where it would change scores."""
        return self._policy == "skip" and shard.role == "train"

    def handle_shard(self, local: LocalShard, damaged: dict[int, str], address: str) -> None:
        """Report the damaged samples of a shard by key. Raises UserError if damage is refused.

        damaged: sample number -> problem. address: the shard's address in its store, for the message.
        """
        lines = [f"sample '{local.entries[i].key}' {problem}" for i, problem in list(damaged.items())[:_SHOWN]]
        if len(damaged) > _SHOWN:
            lines.append(f"and {len(damaged) - _SHOWN} more")
        text = "; ".join(lines) or "no image is damaged, only bytes between images"
        if not self.skips(local.shard):
            raise UserError(f"{address}: its bytes are not the manifest's: {text}. {_REMEDY}")
        self.report_once(local.shard, text)

    def handle_sample(self, local: LocalShard, sample: int, problem: str) -> None:
        """Mark a sample of a shard as damaged and report it. Raises UserError if damage is refused."""
        text = f"sample '{local.entries[sample].key}': {problem}"
        if not self.skips(local.shard):
            raise UserError(f"{local.shard.name}, {text}. {_REMEDY}")
        local.damaged.setdefault(sample, problem)
        self.report_once(local.shard, text, sample)

    def report_once(self, shard: Shard, text: str, sample: int = _WHOLE_SHARD) -> None:
        """Report that a sample is skipped, unless that was reported before."""
        with self._lock:
            if (shard.name, sample) in self._reported:
                return
            self._reported.add((shard.name, sample))
        self._say(f"skipped of {shard.name}: {text}")


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
            local = self._locate(shard)
            try:
                local.damaged = self._verify(local)
            except BaseException:
                local.release()
                raise
            return local
        except _ShardLost as lost:
            if not self._damage.skips(shard) or self._closed:
                raise
            self._damage.report_once(shard, f"all of its {shard.samples} samples: {lost}")
            return LocalShard(shard, Path(), (), dict.fromkeys(range(shard.samples), lost.reason))

    def close(self) -> None:
        """Start no further download; partial files remain in the cache, where the next process resumes them."""
        self._closed = True

    def _verify(self, local: LocalShard) -> dict[int, str]:
        """Return the damaged samples of a local shard, hashing the file if it is new or has changed."""
        name = local.shard.name
        try:
            state = local.state or _file_state(local.path)
            if name not in self._verified or self._verified[name][0] != state:
                damaged = local.find_damage()
                if damaged is not None:
                    self._damage.handle_shard(local, damaged, self._shards.store.where(name))
                self._verified[name] = (state, damaged or {})
        except OSError as error:
            text = f"{name} cannot be read ({error}). Check the disk."
            if error.errno in _FILE_ERRORS and self._cache is None:
                raise _ShardLost(text, "cannot be read") from None
            raise UserError(text) from None
        return self._verified[name][1]

    def _locate(self, shard: Shard) -> LocalShard:
        """Return the local file of a shard; from a store: the intact file, or else the store's damaged version."""
        store = self._shards.store
        try:
            entries = self._shards.index(shard).entries
        except (Rejected, Unavailable):
            raise
        except UserError as fault:
            raise _ShardLost(str(fault), "its index is missing or damaged") from None
        if self._cache is None:
            assert isinstance(store, Folder)
            path = Path(store.where(shard.name))
            if not path.is_file():
                raise _ShardLost(f"{path} is missing. {_REMEDY}", "is missing")
            return LocalShard(shard, path, entries)
        try:
            cached = self._fetch_whole(self._cache, shard) or self._fetch_damaged(self._cache, shard)
        except NotFound:
            raise _ShardLost(f"{store.where(shard.name)} is missing. {_REMEDY}", "is missing") from None
        return LocalShard(shard, cached.path, entries, release=cached.release, state=cached.state)

    def _fetch_whole(self, cache: ShardCache, shard: Shard) -> CachedShard | None:
        """Fetch a shard through the cache, replacing a copy that this node's disk damaged; None if the store's is."""
        if shard.name in self._wrong_in_store:
            return None
        try:
            while True:
                cached = self._acquire(cache, shard, shard.bytes)
                if cached.fresh or shard.name in self._verified or _is_intact(cached, shard):
                    break
                cache.discard(cached)
        except WrongBytes:
            return None
        except Rejected:
            if self._shards.store.size(shard.name) == shard.bytes:
                raise
            return None
        if self._verified.get(shard.name, (None,))[0] != cached.state:
            self._verified[shard.name] = (cached.state, {})
        return cached

    def _fetch_damaged(self, cache: ShardCache, shard: Shard) -> CachedShard:
        """Fetch the store's version of a shard that is damaged in the store, also through the cache."""
        self._wrong_in_store.add(shard.name)
        return self._acquire(cache, shard, self._shards.store.size(shard.name), damaged=True)

    def _acquire(self, cache: ShardCache, shard: Shard, size: int, damaged: bool = False) -> CachedShard:
        def fetch(path: Path) -> None:
            download(self._shards.store, shard.name, path, size, patience=self._patience, say=self._say)

        return cache.acquire(shard.sha256, size, fetch, lambda: self._closed, damaged=damaged)
