"""A few threads that fetch shards in the order of the requests."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import Shard

_THREADS = 4


class DownloadThreads:
    """Runs `fetch` on shards in daemon threads.

    They never keep alive a process that is ending, as a pool of the standard library would for as long as a server is
    unavailable.
    """

    def __init__(self, fetch: Callable[[Shard], LocalShard]) -> None:
        self._fetch, self._requests = fetch, queue.SimpleQueue[tuple[Future[LocalShard], Shard] | None]()
        self._threads: list[threading.Thread] = []

    def submit(self, shard: Shard) -> Future[LocalShard]:
        """Queue a shard; the future holds it, or the error that fetching it raised."""
        if len(self._threads) < _THREADS:
            self._threads.append(threading.Thread(target=self._work, name="shard-download", daemon=True))
            self._threads[-1].start()
        future: Future[LocalShard] = Future()
        self._requests.put((future, shard))
        return future

    def close(self) -> None:
        """End the threads after the requests made until now."""
        for _ in self._threads:
            self._requests.put(None)

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            future, shard = request
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._fetch(shard))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the shard raises it
                future.set_exception(error)
