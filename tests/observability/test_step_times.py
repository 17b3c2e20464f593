"""Laws of the clock of a step's phases."""

from __future__ import annotations

import pytest

from mirl_dist.observability.step_times import Phase, PhaseClock, print_round, report_epoch


class HandClock:
    """A clock that a test sets, and a GPU whose queue takes `queued` seconds to empty."""

    def __init__(self) -> None:
        self.now, self.queued = 0.0, 0.0

    def __call__(self) -> float:
        return self.now

    def synchronise(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0


def test_phases_add_up_and_what_no_phase_covers_is_other() -> None:
    now = HandClock()
    clock = PhaseClock(now)
    for seconds in (1.0, 2.0):
        with clock.phase(Phase.DATA):
            now.now += seconds
    with clock.phase(Phase.FORWARD):
        now.now += 4.0
    now.now += 3.0
    clock.samples += 20
    times = clock.take()
    assert times.phases == {Phase.DATA: 3.0, Phase.FORWARD: 4.0} and times.total == 10.0
    assert times.percent()["data"] == pytest.approx(30) and times.percent()["other"] == pytest.approx(30)
    assert times.line().startswith("2 samples/s; data 30.0 %, forward + backward 40.0 %")
    assert clock.take().total == 0.0


def test_the_rest_of_a_phase_after_a_mark_is_another_phase() -> None:
    now = HandClock()
    clock = PhaseClock(now)
    with clock.phase(Phase.BACKWARD):
        now.now += 5.0
        clock.mark(Phase.REDUCE)
        now.now += 2.0
    with clock.phase(Phase.BACKWARD):
        now.now += 1.0
    assert clock.take().phases == {Phase.BACKWARD: 6.0, Phase.REDUCE: 2.0}


def test_a_phase_includes_queued_work_only_if_the_clock_waits_for_it() -> None:
    now = HandClock()
    clock = PhaseClock(now)
    for waits, seconds in ((False, 1.0), (True, 8.0)):
        clock.synchronise = now.synchronise if waits else None
        clock.take()
        with clock.phase(Phase.FORWARD):
            now.now, now.queued = now.now + 1.0, 7.0
        assert clock.take().phases[Phase.FORWARD] == seconds
        now.queued = 0.0


def test_excluded_time_is_in_no_total() -> None:
    now = HandClock()
    clock = PhaseClock(now)
    now.now += 10.0
    clock.exclude(9.0)
    assert clock.take().total == 1.0


def test_a_round_is_the_sum_of_its_epochs_and_a_new_round_starts_from_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = HandClock()
    clock = PhaseClock(now)
    for samples in (10, 30):
        with clock.phase(Phase.COMMIT):
            now.now += 1.0
        clock.samples += samples
        metrics = report_epoch(clock, 0, 1)
        assert metrics["time/commit"] == pytest.approx(100)
        assert set(metrics) == {
            f"time/{name}"
            for name in ("data", "forward_backward", "reduce_optimiser", "wait", "commit", "tracking", "other")
        }
    print_round(clock, 3)
    assert capsys.readouterr().out.startswith("round 3: 20 samples/s; data 0.0 %")
    clock.begin_round()
    print_round(clock, 0)
    assert capsys.readouterr().out == "", "a round that was trained before says nothing"
