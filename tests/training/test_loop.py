"""Laws of the training loop that one process can show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from mirl_dist.distributed.parallel_network import ParallelNetwork
from mirl_dist.errors import Stopped, UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.training import losses as objective
from mirl_dist.training.schedule import rate
from tests.training.small_round import STEPS, Run, bits, plan


@pytest.fixture(autouse=True, params=[False, True], ids=["waits", "runs ahead"])
def fused(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each law holds where the host knows the outcome of a step before the next, and where it queues one ahead."""
    Run.fused = request.param
    yield
    Run.fused = False


def test_commits_are_made_when_they_are_due_and_at_the_end_of_the_round() -> None:
    assert Run().train(plan(commit_every=5)).commits == [(5, False), (10, False), (12, False)]
    assert Run().train(plan(commit_every=None)).commits == [(12, False)]
    assert Run().train(plan(commit_every=3)).commits == [(3, False), (6, False), (9, False), (12, False)]


def test_a_commit_due_while_one_is_written_is_made_after_it_and_at_the_end_anyway() -> None:
    late = Run(busy_in=lambda step: step in range(2, 7))
    assert late.train(plan()).commits == [(8, False), (9, False), (12, False)]
    assert Run(busy_in=lambda step: True).train(plan()).commits == [(12, False)]


def test_a_run_that_is_asked_to_stop_commits_after_the_step_and_waits_for_it() -> None:
    for busy, steps in ((False, 5), (True, 5), (False, STEPS)):
        run = Run(stop_in=lambda step, s=steps: step == s - 1, busy_in=lambda step, busy=busy: busy)  # type: ignore[misc]
        with pytest.raises(Stopped, match=rf"^stopped on request in round 0 after {steps} steps; committed$"):
            run.train(plan())
        assert run.commits[-1] == (steps, True) and run.state.progress.updates == steps
    assert (run.kept[STEPS].epoch, run.kept[STEPS].step) == (3, 0), "the whole round"


def test_a_commit_that_cannot_be_written_stops_training_and_none_follows_it() -> None:
    run = Run(fail_in=lambda step: step == 5)
    with pytest.raises(UserError, match="^a commit failed$"):
        run.train(plan())
    assert run.commits == [(3, False)]


@pytest.mark.parametrize("stopped_after", [1, 4, 6, 11])
def test_a_run_that_goes_on_after_a_stop_tells_and_ends_as_one_that_did_not_stop(stopped_after: int) -> None:
    whole = Run().train(plan())
    first = Run(stop_in=lambda step: step == stopped_after - 1)
    with pytest.raises(Stopped):
        first.train(plan())
    second = Run().train(plan(), first)
    assert bits(second) == bits(whole)

    def losses(run: Run) -> dict[int, dict[str, float]]:
        return {s: {n: v for n, v in told.items() if n != "samples_per_second"} for s, told in run.told.items()}

    assert sorted(losses(whole)) == [4, 8, 12]
    both = losses(first) | losses(second)
    assert both.keys() == losses(whole).keys()
    for step, values in losses(whole).items():
        assert both[step] == pytest.approx(values, rel=1e-12), f"what step {step} tells lacks the steps before the stop"
    seconds = {"seconds"}
    assert second.state.progress.model_dump(exclude=seconds) == whole.state.progress.model_dump(exclude=seconds)


def bad_in(*places: tuple[int, int]) -> Callable[..., torch.Tensor]:
    """Losses, not finite in some (pass of the run, sample of the pass)."""
    told, count = objective.per_sample_l1, iter(range(10_000))

    def losing(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        losses, mine = told(restored, clean), next(count)
        return torch.stack([x * float("inf") if (mine, i) in places else x for i, x in enumerate(losses)])

    return losing


def test_a_step_that_is_left_out_moves_no_weight_and_no_moment_and_is_in_no_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objective, "per_sample_l1", bad_in((5, 2)))
    run = Run().train(plan(commit_every=1, skip_bad=1))
    assert masking.digest_tensors(run.weights[5][0]) == masking.digest_tensors(run.weights[6][0])
    assert masking.digest_tensors(run.weights[5][1]) == masking.digest_tensors(run.weights[6][1])
    assert masking.digest_tensors(run.weights[6][0]) != masking.digest_tensors(run.weights[7][0])
    assert (run.kept[12].bad, run.kept[12].updates, run.kept[12].samples) == (1, 12, 48)
    (adam,) = {float(moment["step"]) for moment in run.state.engine.optimiser.state.values()}
    assert adam == 11.0
    assert all(torch.isfinite(torch.tensor(list(values.values()))).all() for values in run.told.values())


def test_a_run_resumed_after_a_skipped_step_moves_as_one_that_did_not_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = []
    for stops in (False, True):
        monkeypatch.setattr(objective, "per_sample_l1", bad_in((2, 0)))
        run = Run(stop_in=lambda step, stops=stops: stops and step == 4)  # type: ignore[misc]
        with contextlib.suppress(Stopped):
            run.train(plan(skip_bad=1))
        monkeypatch.undo()
        ends.append(bits(Run().train(plan(), run)) if stops else bits(run))
    assert ends[0] == ends[1]


def test_a_report_after_nothing_but_steps_that_were_left_out_tells_no_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(objective, "per_sample_l1", bad_in(*[(step, 0) for step in range(4, 8)]))
    run = Run().train(plan(skip_bad=4))
    assert "loss/mean" in run.told[4] and "loss/mean" in run.told[12]
    assert not [name for name in run.told[8] if name.startswith("loss/")]
    assert capsys.readouterr().out.count("The step is skipped") == 4


@pytest.mark.parametrize("bad", [(), ((10, 0),), ((11, 1),)])
def test_two_passes_make_the_step_of_one(monkeypatch: pytest.MonkeyPatch, bad: tuple[tuple[int, int], ...]) -> None:
    monkeypatch.setattr(objective, "per_sample_l1", bad_in(*bad))
    twice = Run().train(plan(passes=2, skip_bad=1))
    monkeypatch.undo()
    monkeypatch.setattr(objective, "per_sample_l1", bad_in(*[(pass_ // 2, i) for pass_, i in bad]))
    once = Run().train(plan(skip_bad=1))
    for name, weight in once.state.weights.items():
        assert torch.allclose(weight, twice.state.weights[name], atol=1e-5)
    assert twice.state.progress.bad == once.state.progress.bad == len(bad)
    assert twice.told[12]["loss/mean"] == pytest.approx(once.told[12]["loss/mean"], rel=1e-4)


def test_the_rate_of_a_position_is_the_rate_of_its_step() -> None:
    run = Run().train(plan(report_every=1))
    rates = [
        rate(0.1, by="step", epoch=epoch, step=step, steps_per_epoch=4, warmup_epochs=0, horizon_epochs=3)
        for epoch in range(3)
        for step in range(4)
    ]
    assert [run.told[step]["lr"] for step in range(1, 13)] == rates


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_without_a_batch_ends_training_before_its_step(number: int) -> None:
    lacking = Run(starved_in=lambda step, pass_: (step, pass_) == (6, number))
    with pytest.raises(Stopped, match=r"^stopped on request in round 0 after 6 steps; committed$"):
        lacking.train(plan(commit_every=None, passes=2))
    asked = Run(stop_in=lambda step: step == 5)
    with pytest.raises(Stopped):
        asked.train(plan(commit_every=None, passes=2))
    assert lacking.commits == [(6, True)] and bits(lacking) == bits(asked)
    assert bits(Run().train(plan(passes=2), lacking)) == bits(Run().train(plan(passes=2)))


def test_a_rank_without_a_batch_asks_for_no_shape_that_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, forward = list[tuple[int, ...]](), ParallelNetwork.forward

    def recorded(network: ParallelNetwork, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(images.shape))
        return forward(network, model, images)

    monkeypatch.setattr(ParallelNetwork, "forward", recorded)
    given = plan()
    train = given.config.train.model_copy(update={"compile": True})
    given.config = given.config.model_copy(update={"train": train})
    with pytest.raises(Stopped):
        Run(starved_in=lambda step, _: step == 5).train(given)
    assert shapes[-1] == (4, 3, *2 * [given.config.data.patch_pixels])


def test_a_round_that_skipped_more_than_is_allowed_now_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Run(nan_in=lambda step, _: step in (1, 2), stop_in=lambda step: step == 4)
    with pytest.raises(Stopped):
        first.train(plan(skip_bad=2))
    assert Run().train(plan(skip_bad=0), first).state.progress.bad == 2


def test_the_shares_of_each_epochs_time_are_told_and_make_it_whole() -> None:
    run = Run().train(plan())
    assert sorted(run.percent) == [4, 8, 12]
    for percent in run.percent.values():
        assert sum(percent.values()) == pytest.approx(100)
        assert percent["time/forward_backward"] > 0 and percent["time/reduce_optimiser"] > 0
    assert run.percent[8]["time/commit"] > 0 and run.percent[4]["time/tracking"] > 0
