"""Ranks that hang or drift are named, and a stop asked of one rank reaches all."""

from __future__ import annotations

import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mirl_dist.distributed import watchdog
from mirl_dist.distributed.flight_recorder import FlightRecorder, RankState, diagnose
from mirl_dist.distributed.process_group import is_peer_loss
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.rendezvous import rendezvous
from mirl_dist.distributed.stragglers import StragglerDetector
from mirl_dist.distributed.watchdog import Watchdog
from tests.services.lab import PROGRAMS

HERE = platform.node()
SCRIPT = str(PROGRAMS / "hang.py")


def wait_for(found: Callable[[], Any], seconds: float = 120) -> None:
    last = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < last, "what was waited for never came"
        time.sleep(0.005)


# -- real ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How ranks ended that met each mishap of hang.py; all at once, for they mostly wait."""
    folders = {how: tmp_path_factory.mktemp(how) for how in ("stopped", "frozen-main", "asleep", "slow", "stop")}
    worlds = {"asleep": 3}
    started = {
        how: lab.start(how, str(folder), cwd=folder, world=worlds.get(how, 2), script=SCRIPT)
        for how, folder in folders.items()
    }
    folder = tmp_path_factory.mktemp("restarted")
    torchrun = ("torchrun", "--nproc-per-node", "2", "--max-restarts", "1", SCRIPT, "restarted", str(folder))
    launch = lab.cold(*torchrun, cwd=folder)
    try:
        # What was stopped wakes up when the others have gone; what sleeps has nobody to wake it.
        wait_for(lambda: started["stopped"]._codes()[0] is not None)
        os.kill(started["stopped"].pids[1], signal.SIGCONT)
        wait_for(lambda: started["frozen-main"]._codes()[1] is not None)
        os.kill(started["frozen-main"].pids[0], signal.SIGCONT)
        wait_for(lambda: None not in started["asleep"]._codes()[:2])
        os.kill(started["asleep"].pids[2], signal.SIGKILL)
        found = {how: run.wait() for how, run in started.items()} | {"restarted": launch.wait()}
    finally:
        for run in (*started.values(), launch):
            run.kill()
    return found | {f"{how} folder": f for how, f in (folders | {"restarted": folder}).items()}


def test_a_stopped_process_is_named_with_the_meeting_that_waits_for_it(ended: dict[str, Any]) -> None:
    run = ended["stopped"]
    assert run.codes == (1, 1), run.said()
    assert f"mirl-dist, rank 0 ({HERE}): waited " in run.err
    assert " s in training for the gather of loss flags (meeting 5); rank 1 (" in run.err
    assert "has not come: its process does not answer any more: it is stopped, swapped out, or its node is" in run.err
    assert "frame #" not in run.err, "pages of C++"


def test_a_rank_that_wakes_up_finds_that_the_others_have_gone(ended: dict[str, Any]) -> None:
    assert ended["stopped"].err.count("another rank has gone\n") == 1


def test_a_stopped_rank_that_keeps_the_store_is_named_although_the_store_is_silent(ended: dict[str, Any]) -> None:
    run = ended["frozen-main"]
    assert run.codes[1] == 1, run.said()
    assert f"mirl-dist, rank 1 ({HERE}): waited " in run.err
    assert " s in training for the gather of loss flags (meeting 5), and rank 0 (" in run.err
    assert "), through which ranks tell where they are, does not answer any more: it has ended or is stop" in run.err


def test_a_rank_that_hangs_is_named_with_phase_and_place_by_one_that_waits(
    ended: dict[str, Any],
) -> None:
    run = ended["asleep"]
    assert run.codes == (1, 1, -9), run.said()
    first, *rest = run.err.splitlines()
    assert first.startswith(f"mirl-dist, rank 0 ({HERE}): waited ")
    assert " s in training for the gather of loss flags (meeting 5); rank 2 (" in first
    assert "has not come: it is in evaluating, after meeting 4, at hang.py:" in first
    assert " work, for " in first
    assert "rank 1 (" not in first
    assert not any("has not come" in line for line in rest), "one says it"


def test_a_rank_that_is_late_for_every_meeting_is_waited_for(ended: dict[str, Any]) -> None:
    run = ended["slow"]
    assert (run.codes, run.err) == ((0, 0), ""), run.said()


def test_a_stop_that_one_rank_was_asked_reaches_a_rank_that_waits_in_a_collective(ended: dict[str, Any]) -> None:
    run = ended["stop"]
    assert (run.codes, run.err) == ((0, 0), ""), run.said()
    assert len(list(ended["stop folder"].glob("heard-*"))) == 2


def test_restarted_ranks_meet_and_hear_no_stop_of_the_start_before(ended: dict[str, Any]) -> None:
    run, folder = ended["restarted"], ended["restarted folder"]
    assert run.rc == 0, run.said()
    assert {f"first-{r}" for r in (0, 1)} < {p.name for p in folder.iterdir()}, "the first start was asked and died"
    assert {(folder / f"{when}-{rank}").read_text() for when in ("again", "later") for rank in (0, 1)} == {"False"}


# -- phases and meetings --------------------------------------------------------------------------------------------


def test_phases_nest_and_return_after_an_error() -> None:
    ranks = Ranks(device="cpu")
    assert ranks.phase == "starting"
    with ranks.in_phase("training"):
        with pytest.raises(ZeroDivisionError), ranks.in_phase("committing"):
            assert ranks.phase == "committing"
            raise ZeroDivisionError
        assert ranks.phase == "training"
    assert ranks.phase == "starting"


def test_one_rank_alone_tells_itself_to_stop() -> None:
    ranks = Ranks(device="cpu")
    assert not ranks.stop_requested()
    ranks.request_stop()
    assert ranks.stop_requested()


def test_meetings_are_numbered_and_tell_the_place_in_this_package() -> None:
    meetings = FlightRecorder()
    assert meetings.state()[:4] == (0, "", False, "starting")
    with pytest.raises(ZeroDivisionError), meetings.collective("gather of x"):
        assert meetings.state()[:3] == (1, "gather of x", True)
        raise ZeroDivisionError
    assert meetings.state()[:3] == (1, "gather of x", False)
    assert meetings.state().location.startswith("meetings.py:")


def test_a_meeting_that_a_gpu_is_still_in_lasts_when_the_main_thread_goes_on() -> None:
    meetings, over = FlightRecorder(), [False]
    meetings.begin("gradient all-reduce")
    meetings.end(lambda: over[0])
    assert meetings.state().waiting
    over[0] = True
    assert not meetings.state().waiting


NAMES = [f"rank {rank} (node{rank}, pid {rank})" for rank in range(9)]


def at(number: int, *, waiting: bool = False, what: str = "gather", phase: str = "training") -> RankState:
    return RankState(number, what, waiting, phase, 40.0, "file.py:1 f", 7)


def test_those_who_wait_for_a_rank_that_hangs_are_not_accused_with_it() -> None:
    said = diagnose(at(5, waiting=True), {1: at(4, waiting=True), 2: at(3, phase="evaluating")}, (), NAMES)
    assert said == (
        "waited 40 s in training for the gather (meeting 5); rank 2 (node2, pid 2) has not come: it is in evaluating, "
        "after meeting 3, at file.py:1 f, for 40 s"
    )
    waits = diagnose(at(5, waiting=True), {1: at(4, waiting=True), 2: at(5, waiting=True)}, (), NAMES)
    assert waits.endswith(
        "; rank 1 (node1, pid 1) has not come: it waits in training, in meeting 4, at file.py:1 f, for 40 s"
    )


def test_a_meeting_that_all_have_come_to_accuses_the_network_and_no_rank() -> None:
    said = diagnose(at(5, waiting=True), {1: at(5, waiting=True), 2: at(6)}, (), NAMES)
    assert said.endswith("; all have come to it: the network between them, or a GPU, is stuck")


def test_a_meeting_that_ranks_call_by_two_names_is_a_fault_of_this_program() -> None:
    said = diagnose(at(5, waiting=True), {1: at(5, waiting=True, what="barrier")}, (), NAMES)
    assert said.endswith(
        "; rank 1 (node1, pid 1) calls this meeting barrier: a fault of this program, please report it"
    )


def test_many_missing_ranks_are_named_in_one_short_text() -> None:
    said = diagnose(at(5, waiting=True), {r: at(4) for r in range(1, 9)}, (), NAMES)
    assert "rank 4 (" in said and "rank 5 (" not in said and said.endswith("; and 4 more ranks have not come")


# -- watches on one board -------------------------------------------------------------------------------------------


class Wall:
    """A board in memory. stuck: it answers when set; gone: it is torn down; looked: how often ranks were read."""

    def __init__(self) -> None:
        self.notes: dict[str, bytes] = {}
        self.stuck, self.gone, self.looked = threading.Event(), False, 0
        self.on_look: Callable[[int], None] = lambda count: None
        self.stuck.set()

    def _answer(self) -> None:
        self.stuck.wait()
        if self.gone:
            raise ConnectionResetError

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.notes[key] = value.encode()

    def get(self, keys: list[str]) -> list[bytes]:
        self._answer()
        wait_for(lambda: all(key in self.notes for key in keys))  # as a store does
        if keys[0].isdigit():
            self.looked += 1
            self.on_look(self.looked)
        return [self.notes[key] for key in keys]

    def close(self) -> None:
        pass


class Group:
    """Ranks of one process whose watches look twenty times a second. left: who has ended, and with which code."""

    def __init__(self, world: int) -> None:
        self.wall = Wall()
        self.meetings = [FlightRecorder() for _ in range(world)]
        self.left: dict[int, int] = {}
        self.watches: list[Watchdog] = []

    def start(self, *timeouts: float) -> None:
        for rank, timeout in enumerate(timeouts):
            leave = lambda code, rank=rank: self.left.setdefault(rank, code)  # noqa: E731
            made = Watchdog(
                self.meetings[rank], self.wall, rank, NAMES[: len(timeouts)], "the keeper", timeout,
                period_seconds=0.05, leave=leave,
            )  # fmt: skip
            self.watches.append(made.start())


@pytest.fixture
def group() -> Iterator[Callable[[int], Group]]:
    made: list[Group] = []

    def make(world: int) -> Group:
        made.append(Group(world))
        return made[-1]

    yield make
    for one in made:
        one.wall.stuck.set()
        for running in one.watches:
            running.stop()


def test_the_lowest_rank_that_waits_says_who_has_not_come_and_all_that_wait_end(
    group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = group(4)
    ranks.meetings[0].phase = "evaluating"
    for rank in (1, 2, 3):
        ranks.meetings[rank].begin("sum of losses")
    ranks.start(0.1, 0.1, 0.1, 0.1)
    wait_for(lambda: len(ranks.left) == 3)
    assert ranks.left == {1: 1, 2: 1, 3: 1}
    lines = sorted(capsys.readouterr().err.splitlines())
    assert re.match(
        rf"mirl-dist, rank 1 \({HERE}\): waited \d+ s in starting for the sum of losses \(meeting 1\); rank 0 \(",
        lines[0],
    )
    assert "rank 0 (node0, pid 0) has not come: it is in evaluating, after meeting 0, at " in lines[0]
    assert lines[1:] == [f"mirl-dist, rank {r} ({HERE}): waited too; rank 1 has said for whom" for r in (2, 3)]


def test_when_the_lowest_rank_has_not_waited_long_enough_another_one_says_it(
    group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = group(3)
    for rank in (0, 1):
        ranks.meetings[rank].begin("barrier")
    ranks.start(1000, 0.1, 0.1)
    wait_for(lambda: 1 in ranks.left)
    assert re.search(
        rf"mirl-dist, rank 1 \({HERE}\): waited \d+ s in starting for the barrier \(meeting 1\); rank 2 \(",
        capsys.readouterr().err,
    )


def test_a_rank_that_comes_while_it_is_looked_at_is_not_named(
    group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    """As when all processes were suspended for longer than ranks wait: all clocks have jumped, and nobody hangs."""
    ranks = group(2)
    ranks.meetings[0].begin("barrier")
    ranks.wall.on_look = lambda count: ranks.meetings[0].end() if count == watchdog._LOOKS - 1 else None
    ranks.start(0.0, 0.0)
    wait_for(lambda: ranks.wall.looked >= watchdog._LOOKS - 1)
    before = ranks.watches[0]._beat
    wait_for(lambda: ranks.watches[0]._beat > before + 2 * watchdog._LOOKS)
    assert (ranks.left, capsys.readouterr().err) == ({}, "")


def test_a_rank_that_is_busy_does_not_judge(group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]) -> None:
    ranks = group(2)
    ranks.start(0.0, 0.0)
    wait_for(lambda: ranks.watches[0]._beat > 4 * watchdog._LOOKS)
    assert (ranks.left, ranks.wall.looked, capsys.readouterr().err) == ({}, 0, "")


@pytest.mark.parametrize("how", ["stuck", "gone"])
def test_who_waits_names_the_keeper_of_a_board_that_does_not_answer(
    how: str, group: Callable[[int], Group], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = group(2)
    ranks.start(0.1, 0.1)
    if how == "stuck":
        ranks.wall.stuck.clear()
    ranks.wall.gone = how == "gone"
    ranks.meetings[1].begin("barrier")
    wait_for(lambda: ranks.left)
    assert ranks.left == {1: 1}
    said = capsys.readouterr().err
    assert "for the barrier (meeting 1), and the keeper, through which ranks tell where they are, does not" in said


def test_a_stop_reaches_every_watch_and_does_not_wait_for_the_board(group: Callable[[int], Group]) -> None:
    ranks = group(3)
    ranks.start(100, 100, 100)
    ranks.wall.stuck.clear()
    ranks.watches[1].request_stop()
    assert [w.stop_requested for w in ranks.watches] == [False, True, False]
    ranks.wall.stuck.set()
    wait_for(lambda: all(w.stop_requested for w in ranks.watches))


# -- how ranks find each other --------------------------------------------------------------------------------------


def test_ranks_of_one_start_agree_on_an_id_in_a_store_full_of_an_earlier_start() -> None:
    store = torch.distributed.HashStore()

    def start() -> set[str]:
        found: dict[int, str] = {}

        def come(rank: int) -> None:
            found[rank] = rendezvous(store, rank, 3, 20)

        ranks = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1, 0)]
        for rank in ranks:
            rank.start()
            time.sleep(0.02)  # rank 0 last: the others find an old call first
        for rank in ranks:
            rank.join()
        assert len(found) == 3
        return set(found.values())

    words = [start() for _ in range(3)]
    assert [len(word) for word in words] == [1, 1, 1]
    assert len(set.union(*words)) == 3


def test_ranks_that_never_come_are_named() -> None:
    with pytest.raises(RuntimeError, match="waited 0 s at the start for rank 1, 2$") as told:
        rendezvous(torch.distributed.HashStore(), 0, 3, 0.05)
    assert is_peer_loss(told.value)
    with pytest.raises(RuntimeError, match="waited 0 s at the start for rank 0$"):
        rendezvous(torch.distributed.HashStore(), 2, 3, 0.05)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "[pair.cc:553] Connection closed by peer [127.0.0.1]:60051. This is typically caused by a remote worker",
            True,
        ),
        ("[pair.cc:537] Read error [127.0.0.1]:30088: Connection reset by peer. This is typically caused by", True),
        ("[unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete", True),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("The client socket has timed out after 2000ms while trying to connect to (127.0.0.1, 1).", True),
        (
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            True,
        ),
        ("NCCL error: remote process exited or there was a network error", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
        ("CUDA out of memory. Tried to allocate 20.00 MiB", False),
    ],
)
def test_errors_of_collectives_that_lost_a_rank_are_told_from_others(text: str, lost: bool) -> None:
    assert is_peer_loss(RuntimeError(text)) is lost


# -- pace -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paced(batch: float, work: float, waits: float, passes: int = 4) -> tuple[float, float]:
    """What a rank reports whose passes take so long before the meeting, and which then waits in it."""
    clock = Clock()
    pace = StragglerDetector(clock=clock)
    for _ in range(passes):
        pace.begin()
        clock.now += batch
        pace.batch_ready()
        clock.now += work
        pace.reached_collective()
        clock.now += waits
    return pace.mean_seconds()


def test_pace_counts_what_precedes_the_meeting_and_begins_anew_after_reports() -> None:
    assert paced(0.5, 0.25, waits=9) == pytest.approx((0.5, 0.25))
    clock = Clock()
    pace = StragglerDetector(clock=clock)
    pace.begin()
    clock.now += 5
    pace.batch_ready()
    pace.reached_collective()
    assert pace.mean_seconds() == (5, 0)
    assert pace.mean_seconds() == (0, 0)


def test_a_slow_rank_is_named_after_three_reports_and_those_who_wait_for_it_are_not() -> None:
    slow, quick = paced(0.756, 0.084, waits=0), paced(0.1, 0.3, waits=0.44)
    pace = StragglerDetector(["a", "b", "c", "d"])
    reports = [pace.find_slow([quick, quick, quick, slow], 1.5) for _ in range(120)]
    assert [at for at, lines in enumerate(reports, 1) if lines] == [3, 103]
    assert reports[2] == [
        "rank 3 (d) reaches the all-reduce 2.1 times later than the others (0.84 s against 0.4 s a pass; 90% of it "
        "waiting for batches): look at that node's disk, network and data.workers"
    ]
    busy = StragglerDetector()
    lines = [busy.find_slow([paced(0.1, 0.7, waits=0), quick], 1.5) for _ in range(3)][-1]
    assert lines[0].startswith("rank 0 reaches") and lines[0].endswith("look at that node's GPU and processors")


def test_a_rank_that_recovered_is_named_again_and_one_that_was_slow_twice_is_not() -> None:
    pace, slow, level = StragglerDetector(), [(0.1, 0.9), (0.1, 0.3)], [(0.1, 0.3), (0.1, 0.3)]
    told = [bool(pace.find_slow(r, 1.5)) for r in (slow, slow, level, slow, slow, slow, slow, level, slow, slow, slow)]
    assert told == [False] * 5 + [True] + [False] * 4 + [True]


@pytest.mark.parametrize(
    "seconds",
    [
        [(0.001, 0.003), (0.0, 0.001)],  # four times, but three milliseconds
        [(0.1, 0.49), (0.1, 0.3)],  # less than the factor
        [(0.0, 9.0)],  # alone
    ],
)
def test_small_differences_and_a_rank_alone_are_not_named(seconds: list[tuple[float, float]]) -> None:
    pace = StragglerDetector()
    assert [pace.find_slow(seconds, 1.5) for _ in range(5)] == [[]] * 5
