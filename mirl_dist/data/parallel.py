"""Maps a function over items in several processes, on this machine or on all ranks of a launch."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from mirl_dist.errors import MirlError, UserError
from mirl_dist.observability.console import rank_label

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
SYNC_SECONDS = 0.5
_FINISH_SECONDS = 5.0
"""Seconds granted to the current item to finish after a fault."""

_LOADER_DIED = re.compile("DataLoader worker .* (is killed by signal|exited unexpectedly)|Unexpected bus error")


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

    def exit_after(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=exit_after, args=(parent.sentinel,), daemon=True).start()


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    progress: ProgressCallback,
    what: str,
) -> Iterator[Result]:
    """Yield function(item) for every item, in order. With one worker, the calls run in this process.

    function and items must be picklable. Raises what `function` raises, and UserError if a worker process was killed.
    """
    progress(0, len(items), what)
    if workers <= 1 or len(items) <= 1:
        for done, item in enumerate(items, 1):
            yield function(item)
            progress(done, len(items), what)
        return
    # Spawn, because the caller may have threads (MLflow, CUDA), whose locks a fork would copy without the threads.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(workers, len(items)), context, end_with_parent) as pool:
            for done, result in enumerate(pool.map(function, items), 1):
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


def distributed_map(
    group: WorkerGroup,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    progress: ProgressCallback,
    what: str,
) -> list[Result]:
    """Return function(item) for every item, in order, on every rank. Each rank maps its share with `workers` processes.

    The ranks exchange their states every half second, however long an item takes: a thread does the work. So no
    collective waits for a slow rank, progress covers all ranks, and a lost or failed rank soon ends the others. Raises
    a UserError of any rank on every rank.
    """
    if group.world == 1:
        return list(parallel_map(function, items, workers, progress, what))
    share = items[group.rank :: group.world]
    results: list[Result] = []
    stop_requested = threading.Event()

    def work_on_share() -> None:
        for result in parallel_map(function, share, workers, lambda done, total, what: None, what):
            results.append(result)
            if stop_requested.is_set():
                return

    thread = ThreadPoolExecutor(1, thread_name_prefix="share")
    work = thread.submit(work_on_share)
    progress(0, len(items), what)
    reported, ended = 0, False
    try:
        while not ended:
            done, ended = _exchange_states(group, work, results)
            if done != reported:
                progress(done, len(items), what)
            reported = done
            wait([work], SYNC_SECONDS)
    finally:
        # Let the current item clean up, but briefly: faults must be reported even while a transfer is being retried.
        stop_requested.set()
        wait([work], _FINISH_SECONDS)
        thread.shutdown(wait=False)
    all_results = group.gather_objects(results)
    return [all_results[number % group.world][number // group.world] for number in range(len(items))]


def _exchange_states(group: WorkerGroup, work: Future[None], results: Sequence[object]) -> tuple[int, bool]:
    """Return the number of results on all ranks, and whether all ranks have ended. Raises UserError if any failed.

    Errors other than MirlError are raised on their own rank.
    """
    ended = work.done()  # before the results are counted, so that an ended rank has counted all of them
    error = work.exception() if ended else None
    if error is not None and not isinstance(error, MirlError):
        raise error
    state = len(results), ended, None if error is None else str(error), rank_label(group.rank)
    states = group.gather_objects(state)
    faults = {text: who for _, _, text, who in reversed(states) if text is not None}
    if faults:
        raise UserError("\n".join(f"{who}: {text}" for text, who in faults.items()), everywhere=True)
    return sum(count for count, *_ in states), all(ended for _, ended, *_ in states)


def next_item(items: Iterator[Any]) -> Any:
    """Return the next item of a DataLoader, or None at its end. Raise UserError if a loader process was killed."""
    try:
        return next(items, None)
    except RuntimeError as error:
        if (fault := loader_fault(error)) is None:
            raise
        raise fault from None


def loader_fault(error: RuntimeError) -> UserError | None:
    """Return the fault that torch reports for a dead loader process, at any place of the main thread; else None."""
    if not _LOADER_DIED.search(str(error)):
        return None
    pid = re.search(r"pid\(?s?\)? ([\d, ]+)", str(error))
    how = re.search(r"killed by signal: (\w+)|(bus error)", str(error))
    fate = f"was {how[0]}" if how and how[1] else "died of a bus error" if how else "has died"
    return UserError(
        f"data.workers: the loader process {pid[1] if pid else 'of this rank'} {fate}, as happens when the system "
        f"runs out of memory (see dmesg), or when /dev/shm is full ({_free_shared_memory()}). Lower data.workers, or "
        "enlarge /dev/shm (docker: --shm-size)."
    )


def _free_shared_memory() -> str:
    try:
        return f"{shutil.disk_usage('/dev/shm').free / 1e6:,.0f} MB are free now"
    except OSError:
        return "this machine has none"
