"""Laws of a worker group: work is shared, ranks meet while they work, and one rank's trouble is everyone's at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from mirl_dist.data import parallel
from mirl_dist.data.parallel import SINGLE_PROCESS, distributed_map
from mirl_dist.distributed.hardware import processes
from mirl_dist.errors import UserError
from mirl_dist.observability.console import rank_label
from tests.data.loaders import quiet

T = TypeVar("T")


class Threads:
    """A rank that is a thread; `meetings` counts how often the ranks have met."""

    def __init__(self, rank: int, world: int, room: dict[str, Any]) -> None:
        self.rank, self.world, self._room = rank, world, room
        self.meetings = 0

    def gather_objects(self, item: T) -> list[T]:
        self.meetings += 1
        self._room["seats"][self.rank] = item
        self._room["barrier"].wait(20)
        found = list(self._room["seats"])
        self._room["barrier"].wait(20)
        return found

    def on_main(self, work: Callable[[], T]) -> T:
        raise NotImplementedError


def together(world: int, work: Callable[[Threads], T]) -> tuple[list[T | BaseException], list[Threads]]:
    """What `work` returns or raises on every rank."""
    room = {"seats": [None] * world, "barrier": threading.Barrier(world)}
    ranks = [Threads(rank, world, room) for rank in range(world)]
    ended: list[Any] = [None] * world

    def one(rank: Threads) -> None:
        try:
            ended[rank.rank] = work(rank)
        except (UserError, ZeroDivisionError, threading.BrokenBarrierError) as error:
            ended[rank.rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ended, ranks


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_holds_all_results_in_the_order_of_the_items(count: int, world: int) -> None:
    items = list(range(count))
    ended, _ = together(world, lambda rank: distributed_map(rank, lambda n: n * n, items, 1, quiet, "squaring"))
    assert ended == [[n * n for n in items]] * world
    assert distributed_map(SINGLE_PROCESS, lambda n: n * n, items, 1, quiet, "squaring") == [n * n for n in items]


def test_ranks_meet_while_one_is_slow_so_that_no_collective_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SYNC_SECONDS", 0.01)
    met: list[int] = []

    def work(rank: Threads) -> list[int]:
        def slow(item: int) -> int:
            while item == 1 and rank.meetings < 10:
                time.sleep(0.01)
            return item

        report = quiet if rank.rank else lambda done, total, what: met.append(done)
        return distributed_map(rank, slow, [0, 1, 2, 3], 1, report, "working")

    ended, ranks = together(2, work)
    assert ended == [[0, 1, 2, 3]] * 2 and ranks[0].meetings == ranks[1].meetings > 10
    assert met[0] == 0 and met[-1] == 4 and met == sorted(met) and 2 in met, "all ranks' work is counted"


def test_a_fault_of_one_rank_is_raised_on_all_and_ends_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SYNC_SECONDS", 0.01)
    done: list[int] = []

    def work(rank: Threads) -> list[int]:
        def one(item: int) -> int:
            if item == 1:
                raise UserError("found this, here, do that.")
            time.sleep(0.01)
            done.append(item)
            return item

        return distributed_map(rank, one, list(range(2000)), 1, quiet, "working")

    ended, _ = together(2, work)
    faults = [(str(error), error.everywhere) for error in ended if isinstance(error, UserError)]
    assert faults == [(f"{rank_label(1)}: found this, here, do that.", True)] * 2
    assert len(done) < 500, "the other rank stopped soon"


def test_the_same_fault_of_several_ranks_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: Threads) -> list[int]:
        def one(item: int) -> int:
            raise UserError("the disk is full, here, make room.")

        return distributed_map(rank, one, [0, 1, 2], 1, quiet, "working")

    ended, _ = together(3, work)
    assert [str(error).count("the disk is full") for error in ended] == [1, 1, 1]


def test_an_error_that_nobody_foresaw_is_raised_where_it_happened() -> None:
    def work(rank: Threads) -> list[float]:
        try:
            return distributed_map(rank, lambda n: 1 / n, [1, 0], 1, quiet, "dividing")
        except ZeroDivisionError:
            rank._room["barrier"].abort()  # as a process that ends breaks its connections
            raise

    ended, _ = together(2, work)
    assert isinstance(ended[0], threading.BrokenBarrierError) and isinstance(ended[1], ZeroDivisionError)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system gives a process all processors")
def test_a_process_that_may_use_one_processor_uses_one() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from mirl_dist.distributed.hardware import processes; print(processes())"
    env = {name: value for name, value in os.environ.items() if name != "LOCAL_WORLD_SIZE"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert ran.stdout.strip() == "1"


@pytest.mark.parametrize(("ranks", "each"), [(None, 12), ("1", 12), ("5", 2), ("12", 1), ("16", 1)])
def test_the_ranks_of_a_node_share_its_processors(ranks: str | None, each: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert processes() == each


def test_where_a_system_does_not_say_what_a_process_may_use_all_processors_count(monkeypatch: Any) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes() == os.cpu_count()
