"""Maps a function over items in several processes: of this machine, or of all ranks of a launch."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, Protocol, TypeVar

from mirl_dist.errors import MirlError, UserError
from mirl_dist.observability.console import rank_label

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
SYNC_SECONDS = 0.5
_FINISH_SECONDS = 5.0
"""How long an item that is being worked on may take to end, once a fault has ended the work."""


class ProgressCallback(Protocol):
    """Takes how far the work is: `done` of `total` things named by `what`."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def end_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and leave at once when the parent dies.

    Otherwise a build that was killed would go on writing into a folder which its successor fills, and loaders of a
    rank that was killed would stay for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    progress: ProgressCallback,
    what: str,
    chunk: int = 1,
) -> Iterator[Result]:
    """function(item) of every item, in order. function and items must be picklable; one worker works here.

    Raises what function raises, and UserError where a process was killed from outside.
    """
    progress(0, len(items), what)
    if workers <= 1 or len(items) <= chunk:
        for done, item in enumerate(items, 1):
            yield function(item)
            progress(done, len(items), what)
        return
    # Spawned, not forked: the caller may hold threads (MLflow, CUDA), which a fork would copy half.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(workers, len(items)), context, end_with_parent) as pool:
            for done, result in enumerate(pool.map(function, items, chunksize=chunk), 1):
                yield result
                progress(done, len(items), what)
    except BrokenProcessPool:
        raise UserError(
            f"a worker process died while {what}, killed from outside: most often for want of memory. "
            f"Use fewer than {workers} workers."
        ) from None


class WorkerGroup(Protocol):
    """The processes that share a job; all of them call the same methods in the same order.

    gather_objects: a picklable object of every rank, in rank order, on every rank. on_main: the result of a function
    that rank 0 alone calls, or its UserError, on every rank.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...

    def gather_objects(self, item: T) -> list[T]: ...
    def on_main(self, work: Callable[[], T]) -> T: ...


class SingleProcess:
    """A worker group of one process."""

    rank = 0
    world = 1

    def gather_objects(self, item: T) -> list[T]:
        return [item]

    def on_main(self, work: Callable[[], T]) -> T:
        return work()


SINGLE_PROCESS = SingleProcess()


class _RankWork(Generic[Result]):
    """Runs one rank's share of the items in a thread, while the main thread reports to the other ranks."""

    def __init__(self, work: Callable[[], Iterable[Result]]) -> None:
        self.results: list[Result] = []
        self._stop_requested = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="share")
        self._future = self._thread.submit(self._run, work)

    def _run(self, work: Callable[[], Iterable[Result]]) -> None:
        for result in work():
            self.results.append(result)
            if self._stop_requested.is_set():
                return

    def state(self) -> tuple[int, bool, str | None]:
        """Count of results, whether that is all, and the text of a UserError. Raises any other error of the work."""
        ended = self._future.done()
        error = self._future.exception() if ended else None
        if error is not None and not isinstance(error, MirlError):
            raise error
        return len(self.results), ended, None if error is None else str(error)

    def wait(self, seconds: float) -> None:
        """Wait until the work ends, at most for some seconds."""
        wait([self._future], seconds)

    def stop(self) -> None:
        """Begin no further item, and let the present one end, so that it removes what is its own.

        The wait is short: a fault is reported before a transfer that is retried for minutes has ended.
        """
        self._stop_requested.set()
        self.wait(_FINISH_SECONDS)
        self._thread.shutdown(wait=False)


def distributed_map(
    group: WorkerGroup,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    progress: ProgressCallback,
    what: str,
    chunk: int = 1,
) -> list[Result]:
    """function(item) of every item, in order, on every rank; each rank works on its share with so many processes.

    The ranks exchange their states every half second, however long one item takes: no collective waits for a slow rank,
    all see how far all are, and a rank that is lost or meets a UserError ends the others soon. Raises the UserError of
    any rank on every rank.
    """
    if group.world == 1:
        return list(parallel_map(function, items, workers, progress, what, chunk))
    share = items[group.rank :: group.world]
    work = _RankWork(lambda: parallel_map(function, share, workers, lambda done, total, what: None, what, chunk))
    progress(0, len(items), what)
    reported = 0
    try:
        while True:
            statuses = group.gather_objects((work.state(), rank_label(group.rank)))
            states = [state for state, _ in statuses]
            faults = {text: who for (_, _, text), who in reversed(statuses) if text is not None}
            if faults:
                raise UserError("\n".join(f"{who}: {text}" for text, who in faults.items()), everywhere=True)
            done = sum(count for count, _, _ in states)
            if done != reported:
                progress(done, len(items), what)
            reported = done
            if all(ended for _, ended, _ in states):
                break
            work.wait(SYNC_SECONDS)
    finally:
        work.stop()
    results = group.gather_objects(work.results)
    return [results[number % group.world][number // group.world] for number in range(len(items))]
