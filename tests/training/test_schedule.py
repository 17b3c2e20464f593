"""Laws of the learning rate: the published values, and a smooth way beside them."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from mirl_dist.training.schedule import rate

# A published epoch has 859 steps: 6,877 samples in batches of 8.
published = partial(rate, 2e-4, by="epoch", step=0, steps_per_epoch=859, warmup_epochs=15, horizon_epochs=120)
smooth = partial(rate, 1e-3, by="step", steps_per_epoch=5, warmup_epochs=2, horizon_epochs=10)


def test_the_published_rate_rises_from_zero_peaks_for_two_epochs_and_falls() -> None:
    for epoch in range(15):
        assert published(epoch=epoch) == pytest.approx(epoch * 2e-4 / 14, rel=1e-12)
    assert published(epoch=0) == 0.0
    assert published(epoch=14) == published(epoch=15) == 2e-4
    falling = [published(epoch=epoch) for epoch in range(15, 120)]
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert published(epoch=67) == pytest.approx(2e-4 * 0.5, rel=0.02), "half-way down the cosine"
    assert published(epoch=119) == pytest.approx(4.5e-8, rel=0.01)


def test_the_published_rate_only_changes_between_epochs() -> None:
    for epoch in (0, 7, 60, 119):
        assert len({published(epoch=epoch, step=step) for step in range(859)}) == 1


def test_without_warm_up_the_published_rate_begins_at_its_peak() -> None:
    short = partial(published, warmup_epochs=0, horizon_epochs=4)
    assert short(epoch=0) == 2e-4
    assert short(epoch=2) == pytest.approx(1e-4)


def test_a_longer_horizon_leaves_the_cosine_unfinished() -> None:
    late = published(epoch=118, horizon_epochs=150)
    assert late == pytest.approx(2.6e-5, rel=0.02), "PromptIR ends there: its last epoch repeats the rate before"


def test_by_step_the_rate_rises_from_the_first_step_and_falls_smoothly() -> None:
    rates = [smooth(epoch=epoch, step=step) for epoch in range(10) for step in range(5)]
    assert rates[0] == pytest.approx(1e-3 / 10)
    assert rates[9] == rates[10] == 1e-3
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-5
    biggest = max(abs(a - b) for a, b in itertools.pairwise(rates))
    assert biggest <= 1.001e-4, "no jump is larger than a step of the warm-up"


def test_by_step_a_fraction_of_an_epoch_may_be_warm_up_or_none_of_it() -> None:
    rates = [smooth(epoch=0, step=step, warmup_epochs=0.4) for step in range(3)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])
    assert smooth(epoch=0, step=0, warmup_epochs=0) == 1e-3
    assert all(0 <= smooth(epoch=e, step=s, warmup_epochs=0.5) <= 1e-3 for e in range(10) for s in range(5))
