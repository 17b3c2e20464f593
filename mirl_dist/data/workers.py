"""The same work on many things by several processes, results in order, nobody left behind."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from mirl_dist.errors import Fault

Item = TypeVar("Item")
Result = TypeVar("Result")


class Report(Protocol):
    """Hears how far the work is: `done` of `total` things named by `what`."""

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


def each(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    report: Report,
    what: str,
    chunk: int = 1,
) -> Iterator[Result]:
    """function(item) of every item, in order. function and items must be picklable; one worker works here.

    Raises what function raises, and Fault where a process was killed from outside.
    """
    report(0, len(items), what)
    if workers <= 1 or len(items) <= chunk:
        for done, item in enumerate(items, 1):
            yield function(item)
            report(done, len(items), what)
        return
    # Spawned, not forked: the caller may hold threads (MLflow, CUDA), which a fork would copy half.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(workers, len(items)), context, end_with_parent) as pool:
            for done, result in enumerate(pool.map(function, items, chunksize=chunk), 1):
                yield result
                report(done, len(items), what)
    except BrokenProcessPool:
        raise Fault(
            f"a worker process died while {what}, killed from outside: most often for want of memory. "
            f"Use fewer than {workers} workers."
        ) from None
