"""A pool of local, verified shards, fetched on request or in advance, shared by the readers of one process.

With `data.damage: refuse`, damage raises a UserError. With `skip` it is listed, and readers take the next intact sample
of the shard, or of the next shard if none is left. The replacements do not depend on the number of ranks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from mirl_dist.data import integrity
from mirl_dist.data.cache import ShardCache
from mirl_dist.data.damage import DamagePolicy
from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import Shard
from mirl_dist.data.sample import Pixels
from mirl_dist.data.shard_fetcher import ShardFetcher
from mirl_dist.data.shards import SamplePlace, Shards
from mirl_dist.errors import Stopped
from mirl_dist.storage import Unavailable
from mirl_dist.storage.retry import Patience

_PATIENCE = Patience()
_DOWNLOAD_THREADS = 4
_GRACE_SECONDS = 10.0  # to wait for a shard after a stop was requested, because other ranks may wait for this one
_POLL_SECONDS = 0.5  # interval between checks for a requested stop while waiting for a shard


class _Downloads:
    """Runs `fetch` on shards in daemon threads, in request order.

    A ThreadPoolExecutor would prevent the process from exiting while a server is unavailable.
    """

    def __init__(self, fetch: Callable[[Shard], LocalShard]) -> None:
        self._fetch, self._requests = fetch, queue.SimpleQueue[tuple[Future[LocalShard], Shard] | None]()
        self._threads: list[threading.Thread] = []

    def submit(self, shard: Shard) -> Future[LocalShard]:
        """Queue a shard; return a future of the shard, or of the error that fetching it raises."""
        if len(self._threads) < _DOWNLOAD_THREADS:
            self._threads.append(threading.Thread(target=self._work, name="shard-download", daemon=True))
            self._threads[-1].start()
        future: Future[LocalShard] = Future()
        self._requests.put((future, shard))
        return future

    def close(self) -> None:
        """End the threads once they have processed all queued requests."""
        for _ in self._threads:
            self._requests.put(None)

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            future, shard = request
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._fetch(shard))
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for the shard
                future.set_exception(error)


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
        patience: Patience = _PATIENCE,
    ) -> None:
        """cache: None reads a folder in place. damage: 'refuse' or 'skip'. say: prints one line of text."""
        self.shards, self.cache = shards, cache
        self._damage = DamagePolicy(damage, say)
        self._fetcher = ShardFetcher(shards, cache, self._damage, patience, say)
        self._downloads = _Downloads(self._fetcher.fetch)
        self._stop_asked = stop_asked
        self._lock = threading.Lock()
        self._acquired: dict[str, _Acquired] = {}

    def acquire(self, shard: Shard) -> None:
        """Fetch a shard in the background and keep it until each `acquire` has had its `release`."""
        with self._lock:
            acquired = self._acquired.get(shard.name)
            if acquired is None:
                self._acquired[shard.name] = _Acquired(1, self._downloads.submit(shard))
            else:
                acquired.users += 1

    def get(self, shard: Shard) -> LocalShard:
        """Wait for an acquired shard and return it.

        A fetch that has already failed because the store was unavailable is started again once. Raises UserError for
        refused damage or an unreadable shard, and Stopped if a stop was requested while waiting.
        """
        with self._lock:
            acquired = self._acquired[shard.name]
            if acquired.future.done() and isinstance(acquired.future.exception(), Unavailable):
                acquired.future = self._downloads.submit(shard)
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
                        text = f"stopped as asked while waiting for {shard.name}; the last commit stands"
                        raise Stopped(text) from None

    def refetch(self, shard: Shard) -> None:
        """Fetch an acquired shard again, after reading its file failed."""
        with self._lock:
            acquired = self._acquired[shard.name]
            old, acquired.future = acquired.future, self._downloads.submit(shard)
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
    def holding(self, shards: Iterable[Shard]) -> Iterator[None]:
        """Hold shards for the duration of a `with` block."""
        with ExitStack() as stack:
            for shard in shards:
                self.acquire(shard)
                stack.callback(self.release, shard)
            yield

    def image(self, place: SamplePlace, which: str) -> Pixels:
        """Read one image of an evaluation sample, uint8 (H, W, 3). Raises UserError for damage under any policy."""
        with self.holding([place.shard]):
            return integrity.read_image(self.get(place.shard).path, place, which)

    def verify(self, shard: Shard) -> None:
        """Fetch and verify a shard, then release it. Raises UserError if damage is refused."""
        with self.holding([shard]):
            self.get(shard)

    def mark_damaged(self, local: LocalShard, sample: int, problem: str) -> None:
        """Record a sample that turned out to be damaged on reading. Raises UserError if damage is refused."""
        self._damage.mark_sample(local, sample, problem)

    def close(self) -> None:
        """Stop fetching shards; partial files remain in the cache, where the next process resumes them."""
        self._fetcher.close()
        self._downloads.close()


def _release_result(future: Future[LocalShard]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
