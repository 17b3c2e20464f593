"""Collectives are numbered, and ranks that have not reached one are named."""

from __future__ import annotations

import pytest

from mirl_dist.distributed.flight_recorder import FlightRecorder, RankState, diagnose


def test_collectives_are_numbered_and_located_in_this_package() -> None:
    recorder = FlightRecorder()
    assert recorder.state()[:4] == (0, "", False, "starting")
    with pytest.raises(ZeroDivisionError), recorder.collective("gather of x"):
        assert recorder.state()[:3] == (1, "gather of x", True)
        raise ZeroDivisionError
    assert recorder.state()[:3] == (1, "gather of x", False)
    assert recorder.state().location.startswith("flight_recorder.py:")


def test_a_collective_that_a_gpu_is_still_in_lasts_when_the_main_thread_goes_on() -> None:
    recorder, over = FlightRecorder(), [False]
    recorder.begin("gradient all-reduce")
    recorder.end(lambda: over[0])
    assert recorder.state().waiting
    over[0] = True
    assert not recorder.state().waiting


NAMES = [f"rank {rank} (node{rank}, pid {rank})" for rank in range(9)]


def at(number: int, *, waiting: bool = False, what: str = "gather", phase: str = "training") -> RankState:
    return RankState(number, what, waiting, phase, 40.0, "file.py:1 f", 7)


def test_those_who_wait_for_a_rank_that_hangs_are_not_accused_with_it() -> None:
    said = diagnose(at(5, waiting=True), {1: at(4, waiting=True), 2: at(3, phase="evaluating")}, (), NAMES)
    assert said == (
        "waited 40 s in training for the gather (collective 5); rank 2 (node2, pid 2) has not arrived: it is in "
        "evaluating, after collective 3, at file.py:1 f, for 40 s"
    )
    waits = diagnose(at(5, waiting=True), {1: at(4, waiting=True), 2: at(5, waiting=True)}, (), NAMES)
    assert waits.endswith(
        "; rank 1 (node1, pid 1) has not arrived: it waits in training, in collective 4, at file.py:1 f, for 40 s"
    )


def test_a_collective_that_all_have_reached_accuses_the_network_and_no_rank() -> None:
    said = diagnose(at(5, waiting=True), {1: at(5, waiting=True), 2: at(6)}, (), NAMES)
    assert said.endswith("; all have reached it: the network between them, or a GPU, is stuck")


def test_two_names_for_one_collective_are_reported_as_a_fault_of_this_program() -> None:
    said = diagnose(at(5, waiting=True), {1: at(5, waiting=True, what="barrier")}, (), NAMES)
    assert said.endswith(
        "; rank 1 (node1, pid 1) calls this collective barrier: a fault of this program, please report it"
    )


def test_many_missing_ranks_are_named_in_one_short_text() -> None:
    said = diagnose(at(5, waiting=True), {r: at(4) for r in range(1, 9)}, (), NAMES)
    assert "rank 4 (" in said and "rank 5 (" not in said and said.endswith("; and 4 more ranks have not arrived")
