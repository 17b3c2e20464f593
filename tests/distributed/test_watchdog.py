"""Watchdogs of several ranks over one store in memory: they name ranks that hang, and pass on a request to stop."""

from __future__ import annotations

import platform
import re
import threading
from collections.abc import Callable, Iterator

import pytest

from mirl_dist.distributed.flight_recorder import FlightRecorder
from mirl_dist.distributed.watchdog import READS, Watchdog
from tests.services.processes import wait_until

HERE = platform.node()
NAMES = [f"rank {rank} (node{rank}, pid {rank})" for rank in range(4)]


class MemoryStore:
    """A LiveStore in memory. answers: it blocks while this is clear; gone: it is torn down; reads: of ranks."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.answers, self.gone, self.reads = threading.Event(), False, 0
        self.on_read: Callable[[int], None] = lambda count: None
        self.answers.set()

    def _answer(self) -> None:
        self.answers.wait()
        if self.gone:
            raise ConnectionResetError

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = value.encode()

    def get(self, keys: list[str]) -> list[bytes]:
        self._answer()
        wait_until(lambda: all(key in self.values for key in keys))  # as a store does
        if keys[0].isdigit():
            self.reads += 1
            self.on_read(self.reads)
        return [self.values[key] for key in keys]

    def close(self) -> None:
        pass


class Group:
    """Ranks of one process whose watchdogs exchange states twenty times a second. left: exit codes by rank."""

    def __init__(self, world: int) -> None:
        self.store = MemoryStore()
        self.recorders = [FlightRecorder() for _ in range(world)]
        self.left: dict[int, int] = {}
        self.watchdogs: list[Watchdog] = []

    def start(self, *timeouts: float) -> None:
        for rank, timeout in enumerate(timeouts):
            leave = lambda code, rank=rank: self.left.setdefault(rank, code)  # noqa: E731
            made = Watchdog(
                self.recorders[rank], self.store, rank, NAMES[: len(timeouts)], "the keeper", timeout,
                period_seconds=0.05, leave=leave,
            )  # fmt: skip
            self.watchdogs.append(made.start())


@pytest.fixture
def group() -> Iterator[Callable[[int], Group]]:
    made: list[Group] = []

    def make(world: int) -> Group:
        made.append(Group(world))
        return made[-1]

    yield make
    for one in made:
        one.store.answers.set()
        for running in one.watchdogs:
            running.stop()


def test_the_lowest_waiting_rank_names_who_has_not_come_and_all_that_wait_exit(
    group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = group(4)
    ranks.recorders[0].phase = "evaluating"
    for rank in (1, 2, 3):
        ranks.recorders[rank].begin("sum of losses")
    ranks.start(0.1, 0.1, 0.1, 0.1)
    wait_until(lambda: len(ranks.left) == 3)
    assert ranks.left == {1: 1, 2: 1, 3: 1}
    lines = sorted(capsys.readouterr().err.splitlines())
    waited = re.sub(r"waited \d+ s", "waited S s", lines[0])
    assert waited.startswith(
        f"mirl-dist, rank 1 ({HERE}): waited S s in starting for the sum of losses (collective 1); rank 0 ("
    )
    assert "rank 0 (node0, pid 0) has not arrived: it is in evaluating, after collective 0, at " in lines[0]
    assert lines[1:] == [
        f"mirl-dist, rank {r} ({HERE}): waited too; rank 1 has named the missing ranks" for r in (2, 3)
    ]


def test_when_the_lowest_rank_has_not_waited_long_enough_another_one_says_it(
    group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = group(3)
    for rank in (0, 1):
        ranks.recorders[rank].begin("barrier")
    ranks.start(1000, 0.1, 0.1)
    wait_until(lambda: 1 in ranks.left)
    waited = re.sub(r"waited \d+ s", "waited S s", capsys.readouterr().err)
    assert f"mirl-dist, rank 1 ({HERE}): waited S s in starting for the barrier (collective 1); rank 2 (" in waited


def test_a_rank_that_comes_while_its_state_is_read_is_not_named(
    group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    """As when all processes were suspended for longer than ranks wait: all clocks have jumped, and nobody hangs."""
    ranks = group(2)
    ranks.recorders[0].begin("barrier")
    ranks.store.on_read = lambda count: ranks.recorders[0].end() if count == READS - 1 else None
    ranks.start(0.0, 0.0)
    wait_until(lambda: ranks.store.reads >= READS - 1)
    before = ranks.watchdogs[0]._exchange.beat
    wait_until(lambda: ranks.watchdogs[0]._exchange.beat > before + 2 * READS)
    assert (ranks.left, capsys.readouterr().err) == ({}, "")


def test_a_busy_rank_reports_nobody(group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]) -> None:
    ranks = group(2)
    ranks.start(0.0, 0.0)
    wait_until(lambda: ranks.watchdogs[0]._exchange.beat > 4 * READS)
    assert (ranks.left, ranks.store.reads, capsys.readouterr().err) == ({}, 0, "")


@pytest.mark.parametrize("how", ["stuck", "gone"])
def test_a_waiting_rank_names_the_host_of_a_store_that_does_not_answer(
    how: str, group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = group(2)
    ranks.start(0.1, 0.1)
    if how == "stuck":
        ranks.store.answers.clear()
    ranks.store.gone = how == "gone"
    ranks.recorders[1].begin("barrier")
    wait_until(lambda: ranks.left)
    assert ranks.left == {1: 1}
    err = capsys.readouterr().err
    assert "for the barrier (collective 1), and the keeper, through which ranks share their state, no longer" in err


def test_a_stop_reaches_every_watchdog_and_does_not_wait_for_the_store(group: Callable[[int], Group]) -> None:
    ranks = group(3)
    ranks.start(100, 100, 100)
    ranks.store.answers.clear()
    ranks.watchdogs[1].request_stop()
    assert [w.stop_requested for w in ranks.watchdogs] == [False, True, False]
    ranks.store.answers.set()
    wait_until(lambda: all(w.stop_requested for w in ranks.watchdogs))


def test_a_failed_connection_in_which_nobody_is_told_ends_the_rank(
    group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, errors = group(2), [""]
    ranks.start(600.0, 600.0)
    ranks.watchdogs[1].find_connection_error = lambda: errors[0]
    wait_until(lambda: ranks.watchdogs[1]._exchange.beat > 2)
    assert ranks.left == {}
    ranks.store.gone, errors[0] = True, "COMM_ERROR"  # as where rank 0, which served the store, has exited
    wait_until(lambda: ranks.left)
    assert ranks.left == {1: 1}
    assert "another rank has exited, or the network to it has failed (NCCL: COMM_ERROR)" in capsys.readouterr().err
