"""Laws of the training loop that one process can show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from mirl_dist.config.config import from_dump
from mirl_dist.config.tasks import Task
from mirl_dist.data.sample import Batch
from mirl_dist.data.sampler import BatchSplit
from mirl_dist.distributed.engines.ddp import DdpEngine
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import Stopped, UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.training import loop as train
from mirl_dist.training import losses as objective
from mirl_dist.training.schedule import rate
from mirl_dist.training.state import Progress, TrainState
from mirl_dist.training.step_times import PhaseClock

# -- the loop and the run around it -----------------------------------------------------------------------------

TASKS = (Task.of("derain"), Task.of("dehaze"))
STEPS = 12


def plan(*, commit_every: int | None = 3, report_every: int = 4, skip_bad: int = 0, passes: int = 1) -> Any:
    """What the loop reads of a run's plan: one round of three epochs of four steps."""
    tree = {
        "train": {"epochs": 3},
        "batch": {"global": 4},
        "optimiser": {"lr": 0.1, "clip_norm": 1.0},
        "schedule": {"by": "step", "warmup_epochs": 0},
        "checkpoint": {"every_steps": commit_every},
        "tracking": {"every_steps": report_every},
        "guard": {"skip_bad_batches": skip_bad},
    }
    sampler = SimpleNamespace(tasks=TASKS, steps_per_epoch=4)
    return SimpleNamespace(config=from_dump(tree, "test"), sampler=sampler, batch_split=BatchSplit(4, passes, 4))


def batches(passes: int, begin: int = 0) -> Iterator[Batch]:
    """What the steps of a round read, from one on; a step's samples are the same in one pass and in two."""
    for step in range(begin, STEPS):
        chance = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (2, 4, 3, 8, 8), generator=chance, dtype=torch.uint8)
        task, keys = torch.tensor([0, 1, 1, 0]), tuple(f"{step}-{i}" for i in range(4))
        for part in torch.arange(4).chunk(passes):
            mine = slice(int(part[0]), int(part[-1]) + 1)
            yield Batch(images[0, mine], images[1, mine], task[mine], keys[mine])


@pytest.fixture(autouse=True, params=[False, True], ids=["waits", "runs ahead"])
def fused(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each law holds where the host knows the outcome of a step before the next, and where it queues one ahead."""
    Run.fused = request.param
    yield
    Run.fused = False


@dataclass
class Run:
    """The run around a round, as a test wants it. busy, stop, fail: whether it is so in the step after so many."""

    fused: ClassVar[bool] = False

    busy_in: Callable[[int], bool] = lambda step: False
    stop_in: Callable[[int], bool] = lambda step: False
    fail_in: Callable[[int], bool] = lambda step: False
    state: TrainState = field(init=False)
    commits: list[tuple[int, bool]] = field(default_factory=list)
    kept: dict[int, Progress] = field(default_factory=dict)
    weights: dict[int, Any] = field(default_factory=dict)
    told: dict[int, dict[str, float]] = field(default_factory=dict)
    clock: PhaseClock = field(default_factory=PhaseClock)
    percent: dict[int, dict[str, float]] = field(default_factory=dict)
    now: int = 0

    def before_step(self, progress: Progress) -> None:
        self.now = progress.updates

    def flags(self) -> tuple[bool, bool, bool]:
        return self.stop_in(self.now), self.busy_in(self.now), self.fail_in(self.now)

    def raise_commit_failure(self) -> None:
        raise UserError("a commit failed")

    def commit(self, *, wait: bool) -> None:
        progress = self.state.progress
        self.commits.append((progress.updates, wait))
        self.kept[progress.updates] = progress.model_copy(deep=True)
        moments = {name: moment.clone() for name, moment in self.state.engine.moments().items()}
        self.weights[progress.updates] = {n: p.detach().clone() for n, p in self.state.weights.items()}, moments

    def log(self, step: int, values: dict[str, float]) -> None:
        self.told[step] = values

    def log_times(self, step: int, percent: dict[str, float]) -> None:
        self.percent[step] = percent

    def train(self, plan: Any, resumed: Run | None = None) -> Run:
        """A round, from its beginning or from the newest commit of another run."""
        torch.manual_seed(0)
        model = nn.Conv2d(3, 3, 3, padding=1)
        weights = dict(model.named_parameters())
        masks = masking.dense_masks(weights, ["weight"])
        self.state = TrainState(
            DdpEngine(weights, lambda given: torch.optim.Adam(list(given.values()), lr=9.0, fused=self.fused)), masks
        )
        begin = 0
        if resumed is not None:
            begin = max(resumed.kept)
            self.state.load_weights(resumed.weights[begin][0])
            self.state.progress = resumed.kept[begin].model_copy(deep=True)
            self.state.load_moments(resumed.weights[begin][1])
        ranks = Ranks(device="cpu")
        stream = batches(plan.batch_split.passes, begin)
        train.train_round(self.state, ranks.network.wrap(model), stream, plan, ranks, self, lambda step, text: None)
        return self


def bits(run: Run) -> str:
    return masking.digest_tensors(run.state.weights)


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


def test_the_shares_of_each_epochs_time_are_told_and_make_it_whole() -> None:
    run = Run().train(plan())
    assert sorted(run.percent) == [4, 8, 12]
    for percent in run.percent.values():
        assert sum(percent.values()) == pytest.approx(100)
        assert percent["time/forward_backward"] > 0 and percent["time/reduce_optimiser"] > 0
    assert run.percent[4]["time/commit"] > 0 and run.percent[4]["time/tracking"] > 0
