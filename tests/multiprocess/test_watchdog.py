"""Ranks that hang are named, and a stop asked of one rank reaches all: in real processes."""

from __future__ import annotations

import os
import platform
import signal
from typing import Any

import pytest

from tests.services.lab import PROGRAMS
from tests.services.outcomes import expect
from tests.services.processes import wait_until

pytestmark = pytest.mark.long

HERE = platform.node()
SCRIPT = str(PROGRAMS / "hang.py")


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
        wait_until(lambda: started["stopped"].codes()[0] is not None)
        os.kill(started["stopped"].pids[1], signal.SIGCONT)
        wait_until(lambda: started["frozen-main"].codes()[1] is not None)
        os.kill(started["frozen-main"].pids[0], signal.SIGCONT)
        wait_until(lambda: None not in started["asleep"].codes()[:2])
        os.kill(started["asleep"].pids[2], signal.SIGKILL)
        found = {how: run.wait() for how, run in started.items()} | {"restarted": launch.wait()}
    finally:
        for run in (*started.values(), launch):
            run.kill()
    return found | {f"{how} folder": f for how, f in (folders | {"restarted": folder}).items()}


def test_a_rank_whose_process_is_stopped_is_named_with_the_collective_it_delays(ended: dict[str, Any]) -> None:
    run = expect((1, 1), ended["stopped"])
    assert f"mirl-dist, rank 0 ({HERE}): waited " in run.err
    assert " s in training for the gather of loss flags (collective 5); rank 1 (" in run.err
    assert "has not arrived: its process no longer responds: it is stopped, swapped out, or its node is" in run.err
    assert "frame #" not in run.err, "pages of C++"
    assert run.err.count("another rank has exited\n") == 1, "as it finds when it wakes up"


def test_a_stopped_rank_that_serves_the_store_is_named_although_the_store_is_silent(ended: dict[str, Any]) -> None:
    run = ended["frozen-main"]
    assert run.codes[1] == 1, run.said()
    assert f"mirl-dist, rank 1 ({HERE}): waited " in run.err
    assert " s in training for the gather of loss flags (collective 5), and rank 0 (" in run.err
    assert "), through which ranks share their state, no longer responds: it has exited or is stop" in run.err


def test_a_rank_that_hangs_is_named_with_phase_and_location_by_one_that_waits(ended: dict[str, Any]) -> None:
    run = expect((1, 1, -9), ended["asleep"])
    first, *rest = run.err.splitlines()
    assert first.startswith(f"mirl-dist, rank 0 ({HERE}): waited ")
    assert " s in training for the gather of loss flags (collective 5); rank 2 (" in first
    assert "has not arrived: it is in evaluating, after collective 4, at hang.py:" in first
    assert " work, for " in first
    assert "rank 1 (" not in first
    assert not any("has not come" in line for line in rest), "one says it"


def test_a_rank_that_is_late_for_every_collective_is_waited_for(ended: dict[str, Any]) -> None:
    run = ended["slow"]
    assert (run.codes, run.err) == ((0, 0), ""), run.said()


def test_a_stop_that_one_rank_was_asked_reaches_a_rank_that_waits_in_a_collective(ended: dict[str, Any]) -> None:
    run = ended["stop"]
    assert (run.codes, run.err) == ((0, 0), ""), run.said()
    assert len(list(ended["stop folder"].glob("heard-*"))) == 2


def test_restarted_ranks_rendezvous_and_see_no_stop_request_of_the_start_before(ended: dict[str, Any]) -> None:
    expect(0, ended["restarted"])
    folder = ended["restarted folder"]
    assert {f"first-{r}" for r in (0, 1)} < {p.name for p in folder.iterdir()}, "the first start was asked and died"
    assert {(folder / f"{when}-{rank}").read_text() for when in ("again", "later") for rank in (0, 1)} == {"False"}
