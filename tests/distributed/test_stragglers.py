"""Slow ranks are named, and ranks that only wait for them are not."""

from __future__ import annotations

import pytest

from mirl_dist.distributed.stragglers import StragglerDetector


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


def test_seconds_before_the_collective_are_counted_anew_after_each_report() -> None:
    assert paced(0.5, 0.25, waits=9) == pytest.approx((0.5, 0.25))
    clock = Clock()
    pace = StragglerDetector(clock=clock)
    pace.begin()
    clock.now += 5
    pace.batch_ready()
    pace.reached_collective()
    assert pace.mean_seconds() == (5, 0)
    assert pace.mean_seconds() == (0, 0)


def test_a_slow_rank_is_named_after_three_reports_and_those_that_wait_are_not() -> None:
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


def test_a_rank_that_recovered_is_named_again_and_one_slow_twice_is_not() -> None:
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
