"""A few threads that bring shards in the order of asking."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import Shard

_THREADS = 4


class DownloadThreads:
    """They never keep a process alive that wants to end, as a pool of the standard library would for as long as a
    server is away."""

    def __init__(self, bring: Callable[[Shard], LocalShard]) -> None:
        self._download, self._requests = bring, queue.SimpleQueue[tuple[Future[LocalShard], Shard] | None]()
        self._threads: list[threading.Thread] = []

    def submit(self, shard: Shard) -> Future[LocalShard]:
        """The shard to come, or what kept it from coming."""
        if len(self._threads) < _THREADS:
            self._threads.append(threading.Thread(target=self._work, name="bringer", daemon=True))
            self._threads[-1].start()
        future: Future[LocalShard] = Future()
        self._requests.put((future, shard))
        return future

    def close(self) -> None:
        """End when what was asked for until now is done."""
        for _ in self._threads:
            self._requests.put(None)

    def _work(self) -> None:
        while (asked := self._requests.get()) is not None:
            future, shard = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._download(shard))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the shard raises it
                future.set_exception(error)
