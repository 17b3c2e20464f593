"""A pool of local, verified shards, fetched on request or in advance, shared by the readers of one process.

With `data.damage: refuse`, damage raises a UserError. With `skip` it is listed, and readers take the next intact sample
of the shard, or of the next shard if none is left. The replacements do not depend on the number of ranks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from mirl_dist.data.cache import ShardCache
from mirl_dist.data.manifest import CLEAN, DEGRADED, Shard
from mirl_dist.data.sample import Pixels, decode
from mirl_dist.data.shard_fetcher import DamagePolicy, LocalShard, ShardFetcher
from mirl_dist.data.shards import SamplePlace, Shards
from mirl_dist.errors import Stopped, UserError
from mirl_dist.storage import Unavailable
from mirl_dist.storage.retry import DEFAULT_PATIENCE, Patience

_DOWNLOAD_THREADS = 4
_GRACE_SECONDS = 10.0  # to wait for a shard after a stop was requested, because other ranks may wait for this one
_POLL_SECONDS = 0.5  # interval between checks for a requested stop while waiting for a shard


@dataclass
class _Acquired:
    users: int
    future: Future[LocalShard]


class ShardPool:
    """Provides the shards of an address to one process, with reference counts. Thread-safe."""

    def __init__(
        self,
        shards: Shards,
        cache: ShardCache | None,
        damage: str,
        say: Callable[[str], None],
        *,
        stop_asked: Callable[[], bool] = lambda: False,
        patience: Patience = DEFAULT_PATIENCE,
    ) -> None:
        """cache: None reads a folder in place. damage: 'refuse' or 'skip'. say: prints one line of text."""
        self.shards, self.cache = shards, cache
        self._damage = DamagePolicy(damage, say)
        self._fetcher = ShardFetcher(shards, cache, self._damage, patience, say)
        self._stop_asked = stop_asked
        self._lock = threading.Lock()
        self._acquired: dict[str, _Acquired] = {}
        self._requests = queue.SimpleQueue[tuple[Future[LocalShard], Shard] | None]()
        self._threads = 0

    def acquire(self, shard: Shard) -> None:
        """Fetch a shard in the background and keep it until each `acquire` has had its `release`."""
        with self._lock:
            if shard.name not in self._acquired:
                self._acquired[shard.name] = _Acquired(0, self._submit(shard))
            self._acquired[shard.name].users += 1

    def get(self, shard: Shard) -> LocalShard:
        """Wait for an acquired shard and return it.

        A fetch that has already failed because the store was unavailable is started again once. Raises UserError for
        refused damage or an unreadable shard, and Stopped if a stop was requested while waiting.
        """
        with self._lock:
            acquired = self._acquired[shard.name]
            if acquired.future.done() and isinstance(acquired.future.exception(), Unavailable):
                acquired.future = self._submit(shard)
            future = acquired.future
        since = 0.0
        while True:
            try:
                return future.result(timeout=_POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    return future.result()
                if self._stop_asked():
                    since = since or time.monotonic()
                    if time.monotonic() - since > _GRACE_SECONDS:
                        text = f"stopped on request while waiting for {shard.name}; the last commit is intact"
                        raise Stopped(text) from None

    def refetch(self, shard: Shard) -> None:
        """Fetch an acquired shard again, after reading its file failed."""
        with self._lock:
            acquired = self._acquired[shard.name]
            old, acquired.future = acquired.future, self._submit(shard)
        old.add_done_callback(_release_result)

    def release(self, shard: Shard) -> None:
        """Undo one `acquire`; after the last, the cache may evict the shard."""
        with self._lock:
            acquired = self._acquired[shard.name]
            acquired.users -= 1
            if acquired.users:
                return
            del self._acquired[shard.name]
        if not acquired.future.cancel():
            acquired.future.add_done_callback(_release_result)

    @contextmanager
    def holding(self, shard: Shard) -> Iterator[LocalShard]:
        """Hold a shard for the duration of a `with` block. Raises what `get` raises."""
        self.acquire(shard)
        try:
            yield self.get(shard)
        finally:
            self.release(shard)

    def image(self, place: SamplePlace, which: str) -> Pixels:
        """Read one image of an evaluation sample, uint8 (H, W, 3), verifying its digest again.

        Raises UserError if it is absent, unreadable or damaged, under any policy.
        """
        stored = place.entry.image(which)
        source = f"{place.shard.name}, sample '{place.entry.key}', {which}"
        if stored is None:
            raise UserError(f"{source}: the index names no such image. Build the shards again.")
        with self.holding(place.shard) as local:
            try:
                with local.path.open("rb") as tar:
                    tar.seek(stored.offset)
                    data = tar.read(stored.size)
            except OSError as error:
                raise UserError(
                    f"{source} cannot be read ({error}). Check the disk, or copy the shard again."
                ) from None
        if sha256(data).hexdigest() != stored.sha256:
            raise UserError(
                f"{source}: the bytes are not those that were built (SHA-256 differs). Copy the shard again."
            )
        return decode(data, source)

    def verify(self, shard: Shard) -> None:
        """Fetch and verify a shard, then release it. Raises UserError if damage is refused."""
        with self.holding(shard):
            pass

    def mark_damaged(self, shard: Shard, sample: int, problem: str) -> None:
        """Record a sample that turned out to be damaged on reading. Raises UserError if damage is refused."""
        with self.holding(shard) as local:
            self._damage.handle_sample(local, sample, problem)

    def close(self) -> None:
        """Stop fetching shards; partial files remain in the cache, where the next process resumes them."""
        self._fetcher.close()
        for _ in range(self._threads):
            self._requests.put(None)

    def _submit(self, shard: Shard) -> Future[LocalShard]:
        """Queue a shard; return a future of the shard, or of the error that fetching it raises.

        Daemon threads, because a ThreadPoolExecutor would keep the process from exiting while a server is unavailable.
        """
        if self._threads < _DOWNLOAD_THREADS:
            self._threads += 1
            threading.Thread(target=self._fetch_requested, name="shard-download", daemon=True).start()
        future: Future[LocalShard] = Future()
        self._requests.put((future, shard))
        return future

    def _fetch_requested(self) -> None:
        while (request := self._requests.get()) is not None:
            future, shard = request
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._fetcher.fetch(shard))
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for the shard
                future.set_exception(error)


def _release_result(future: Future[LocalShard]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()


class ImageSource(Protocol):
    """A source of images of evaluation samples: ShardPool or ResidentImages."""

    def acquire(self, shard: Shard) -> None: ...
    def release(self, shard: Shard) -> None: ...
    def image(self, place: SamplePlace, which: str) -> Pixels: ...


class ResidentImages:
    """Evaluation images that were read once from a shard pool, for validation while training shards fill the cache."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, str, str], Pixels] = {}

    def read(self, pool: ShardPool, places: Sequence[SamplePlace]) -> None:
        """Read the images of some samples into memory. Raises UserError for damage."""
        for place in sorted(places, key=lambda place: place.shard.name):
            for which in (CLEAN, DEGRADED):
                key = (place.shard.name, place.entry.key, which)
                if place.entry.image(which) is not None and key not in self._images:
                    self._images[key] = pool.image(place, which)

    def acquire(self, shard: Shard) -> None:
        """Do nothing; all images are in memory."""

    def release(self, shard: Shard) -> None:
        """Do nothing; all images remain in memory."""

    def image(self, place: SamplePlace, which: str) -> Pixels:
        """Return one of the images, uint8 (H, W, 3)."""
        return self._images[place.shard.name, place.entry.key, which]
