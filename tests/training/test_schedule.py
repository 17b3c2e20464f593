"""Laws of the learning rate: the published values, and a smooth way beside them."""

from __future__ import annotations

import itertools

import pytest

from mirl_dist.training.schedule import rate

STEPS = 859  # a published epoch: 6,877 samples in batches of 8


def published(epoch: int, step: int = 0) -> float:
    return rate(2e-4, by="epoch", epoch=epoch, step=step, steps_per_epoch=STEPS, warmup_epochs=15, horizon_epochs=120)


def smooth(epoch: int, step: int, warmup: float = 2, horizon: float = 10) -> float:
    return rate(
        1e-3, by="step", epoch=epoch, step=step, steps_per_epoch=5, warmup_epochs=warmup, horizon_epochs=horizon
    )


def test_the_published_warm_up_begins_at_zero_and_rises_in_steps_of_a_fourteenth() -> None:
    assert published(0) == 0.0
    for epoch in range(15):
        assert published(epoch) == pytest.approx(epoch * 2e-4 / 14, rel=1e-12)


def test_the_published_peak_lasts_two_epochs() -> None:
    assert published(14) == published(15) == 2e-4
    assert published(13) < 2e-4
    assert published(16) < 2e-4


def test_the_published_last_epoch_has_its_published_rate() -> None:
    assert published(119) == pytest.approx(4.5e-8, rel=0.01)
    assert published(67) == pytest.approx(2e-4 * 0.5, rel=0.02), "half-way down the cosine"


def test_the_published_rate_only_changes_between_epochs() -> None:
    for epoch in (0, 7, 60, 119):
        assert len({published(epoch, step) for step in range(STEPS)}) == 1
    falling = [published(epoch) for epoch in range(15, 120)]
    assert all(a > b for a, b in itertools.pairwise(falling))


def test_without_warm_up_the_published_rate_begins_at_its_peak() -> None:
    assert rate(1.0, by="epoch", epoch=0, step=0, steps_per_epoch=5, warmup_epochs=0, horizon_epochs=4) == 1.0
    assert rate(1.0, by="epoch", epoch=2, step=0, steps_per_epoch=5, warmup_epochs=0, horizon_epochs=4) == (
        pytest.approx(0.5)
    )


def test_a_longer_horizon_leaves_the_cosine_unfinished() -> None:
    late = rate(2e-4, by="epoch", epoch=118, step=0, steps_per_epoch=5, warmup_epochs=15, horizon_epochs=150)
    assert late == pytest.approx(2.6e-5, rel=0.02), "PromptIR ends there: its last epoch repeats the rate before"


def test_by_step_the_rate_rises_from_the_first_step_and_falls_smoothly() -> None:
    rates = [smooth(epoch, step) for epoch in range(10) for step in range(5)]
    assert rates[0] == pytest.approx(1e-3 / 10)
    assert rates[9] == rates[10] == 1e-3
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-5
    biggest = max(abs(a - b) for a, b in itertools.pairwise(rates))
    assert biggest <= 1.001e-4, "no jump is larger than a step of the warm-up"


def test_by_step_a_fraction_of_an_epoch_may_be_warm_up_or_none_of_it() -> None:
    assert [smooth(0, step, warmup=0.4) for step in range(3)] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert smooth(0, 0, warmup=0) == 1e-3
    assert all(0 <= smooth(e, s, warmup=0.5) <= 1e-3 for e in range(10) for s in range(5))
