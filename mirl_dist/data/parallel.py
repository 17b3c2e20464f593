"""Maps a function over items in several processes, on this machine or on all ranks of a launch."""

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
"""Seconds granted to the current item to finish after a fault."""


class ProgressCallback(Protocol):
    """Receives the progress: `done` of `total` items; `what` describes the work."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def end_with_parent() -> None:
    """In a worker process: ignore SIGINT, which the parent handles, and exit as soon as the parent dies.

    Otherwise workers of a killed build would write into a folder that its successor fills, and loader processes of a
    killed rank would never exit.
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
    """Yield function(item) for every item, in order. With one worker, the calls run in this process.

    function and items must be picklable. Raises what `function` raises, and UserError if a worker process was killed.
    """
    progress(0, len(items), what)
    if workers <= 1 or len(items) <= chunk:
        for done, item in enumerate(items, 1):
            yield function(item)
            progress(done, len(items), what)
        return
    # Spawn, because the caller may have threads (MLflow, CUDA), whose locks a fork would copy without the threads.
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
    """The processes that share a job. Its methods are collectives: all ranks call them in the same order.

    gather_objects: return the picklable objects of all ranks, in rank order, on every rank. on_main: call a function on
    rank 0 only, and return its result, or raise its UserError, on every rank.
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
    """Processes a rank's share of the items in a thread, while the main thread exchanges states with other ranks."""

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
        """Return the number of results, whether the work ended, and its error text, or None.

        Raises errors of the work other than MirlError.
        """
        ended = self._future.done()
        error = self._future.exception() if ended else None
        if error is not None and not isinstance(error, MirlError):
            raise error
        return len(self.results), ended, None if error is None else str(error)

    def wait(self, seconds: float) -> None:
        """Wait until the work ends, for at most `seconds`."""
        wait([self._future], seconds)

    def stop(self) -> None:
        """Start no further item, and wait briefly for the current one, so that it can clean up.

        The wait is short because a fault must be reported even while a transfer is being retried for minutes.
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
    """Return function(item) for every item, in order, on every rank. Each rank maps its share with `workers` processes.

    The ranks exchange their states every half second, however long an item takes. So no collective waits for a slow
    rank, progress covers all ranks, and a lost or failed rank soon ends the others. Raises a UserError of any rank on
    every rank.
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
