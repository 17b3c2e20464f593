"""The processes that work on one job together: one alone, or the ranks of a launch, which meet while they work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from mirl_dist.data.workers import Report, each
from mirl_dist.faults import Fault

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
MEET_SECONDS = 0.5


class Crew(Protocol):
    """What a job needs to know of the processes that share it; all of them call the same methods in the same order.

    gather_objects: a picklable thing of every rank, in rank order, on every rank. from_main: the result of a work that
    rank 0 alone does, and its Fault, on every rank.
    """

    rank: int
    world: int

    def gather_objects(self, item: T) -> list[T]: ...
    def from_main(self, work: Callable[[], T]) -> T: ...


class Alone:
    """A crew of one process."""

    rank = 0
    world = 1

    def gather_objects(self, item: T) -> list[T]:
        return [item]

    def from_main(self, work: Callable[[], T]) -> T:
        return work()


class _Share(threading.Thread, Generic[Item, Result]):
    """One rank's part of a work, done beside the thread that meets the other ranks."""

    def __init__(
        self, function: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str, chunk: int
    ) -> None:
        super().__init__(daemon=True)
        self._work = function, items, workers
        self._what, self._chunk = what, chunk
        self._asked_to_stop = threading.Event()
        self.results: list[Result] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for result in each(*self._work, lambda done, total, what: None, self._what, self._chunk):
                self.results.append(result)
                if self._asked_to_stop.is_set():
                    return
        except BaseException as error:  # raised again by the thread that meets the others
            self.error = error

    def state(self) -> tuple[int, bool, str | None]:
        """Things done, whether that is all, and the text of a Fault. Raises whatever else went wrong."""
        ended = not self.is_alive()
        if self.error is not None and not isinstance(self.error, Fault):
            raise self.error
        return len(self.results), ended, None if self.error is None else str(self.error)

    def stop(self) -> None:
        """End after what is in work now."""
        self._asked_to_stop.set()
        self.join()


def shared(
    crew: Crew,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    report: Report,
    what: str,
    chunk: int = 1,
) -> list[Result]:
    """function(item) of every item, in order, on every rank; each rank works on its share with so many processes.

    The ranks meet every half second, however long one item takes: no collective waits for a slow rank, all see how far
    all are, and a rank that is lost or meets a Fault ends the others soon. Raises the Fault of any rank on every rank.
    """
    if crew.world == 1:
        return list(each(function, items, workers, report, what, chunk))
    share = _Share(function, items[crew.rank :: crew.world], workers, what, chunk)
    share.start()
    try:
        while True:
            states = crew.gather_objects(share.state())
            faults = {text: rank for rank, (_, _, text) in reversed(list(enumerate(states))) if text is not None}
            if faults:
                raise Fault("\n".join(f"rank {rank}: {text}" for text, rank in faults.items()), everywhere=True)
            report(sum(done for done, _, _ in states), len(items), what)
            if all(ended for _, ended, _ in states):
                break
            share.join(MEET_SECONDS)
    finally:
        share.stop()
    found = crew.gather_objects(share.results)
    return [found[number % crew.world][number // crew.world] for number in range(len(items))]
