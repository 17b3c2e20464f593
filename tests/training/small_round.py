"""A round of twelve steps of a tiny network, with a run around it that stops, fails and commits as a test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from mirl_dist.config.config import from_dump
from mirl_dist.config.tasks import Task
from mirl_dist.data.sample import Batch
from mirl_dist.data.sampler import BatchSplit
from mirl_dist.distributed.engines.ddp import DdpEngine
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import Stopped, UserError
from mirl_dist.observability.step_times import PhaseClock
from mirl_dist.pruning import masks as masking
from mirl_dist.training import loop, losses
from mirl_dist.training.progress import Progress
from mirl_dist.training.state import TrainState

TASKS = (Task.of("derain"), Task.of("dehaze"))
STEPS = 12


def plan(
    *, commit_every: int | None = 3, report_every: int = 4, skip_bad: int = 0, passes: int = 1, world: int = 1
) -> Any:
    """What the loop reads of a run's plan: one round of three epochs of four steps."""
    tree = {
        "train": {"epochs": 3},
        "batch": {"global": 4},
        "optimiser": {"lr": 0.1, "clip_norm": 1.0},
        "schedule": {"by": "step", "warmup_epochs": 0},
        "checkpoint": {"every_steps": commit_every},
        "tracking": {"every_steps": report_every},
        "guard": {"skip_bad_batches": skip_bad},
        "ranks": {"slow_factor": 1e9},
    }
    sampler = SimpleNamespace(tasks=TASKS, steps_per_epoch=4)
    split = BatchSplit(4 // world, passes, 4 // world)
    return SimpleNamespace(config=from_dump(tree, "test"), sampler=sampler, batch_split=split)


def batches(passes: int, begin: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """What the steps of a round read, from one on; a step's samples are the same in one pass and in two."""
    for step in range(begin, STEPS):
        chance = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (2, 4, 3, 8, 8), generator=chance, dtype=torch.uint8)
        task, keys = torch.tensor([0, 1, 1, 0]), tuple(f"{step}-{i}" for i in range(4))
        for part in torch.arange(4).chunk(world)[rank].chunk(passes):
            mine = slice(int(part[0]), int(part[-1]) + 1)
            yield Batch(images[0, mine], images[1, mine], task[mine], keys[mine])


@dataclass
class Run:
    """The run around a round, as a test wants it. busy, stop, fail: whether it is so in the step after so many;
    nan_in, starved_in: whether a loss of this rank is not finite, or its batch is missing, in a pass of that step."""

    fused: ClassVar[bool] = False
    """Whether the optimiser gates its updates by itself, so that the loop runs a step ahead."""

    busy_in: Callable[[int], bool] = lambda step: False
    stop_in: Callable[[int], bool] = lambda step: False
    fail_in: Callable[[int], bool] = lambda step: False
    nan_in: Callable[[int, int], bool] = lambda step, number: False
    starved_in: Callable[[int, int], bool] = lambda step, number: False
    state: TrainState = field(init=False)
    commits: list[tuple[int, bool]] = field(default_factory=list)
    kept: dict[int, Progress] = field(default_factory=dict)
    weights: dict[int, Any] = field(default_factory=dict)
    told: dict[int, dict[str, float]] = field(default_factory=dict)
    percent: dict[int, dict[str, float]] = field(default_factory=dict)
    clock: PhaseClock = field(default_factory=PhaseClock)
    now: int = 0
    number: int = 0

    def before_step(self, progress: Progress) -> None:
        self.now, self.number = progress.updates, 0

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

    def train(self, plan: Any, resumed: Run | None = None, ranks: Ranks | None = None) -> Run:
        """A round, from its beginning or from the newest commit of another run."""
        torch.manual_seed(0)
        ranks = ranks or Ranks(device="cpu")
        model = nn.Conv2d(3, 3, 3, padding=1)
        weights = dict(model.named_parameters())
        make = partial(torch.optim.Adam, lr=9.0, fused=self.fused)
        wrapped = ranks.network.wrap(model)
        ranks.network.warm_up(wrapped, torch.zeros(1, 3, 8, 8))
        engine = DdpEngine(weights, lambda given: make(list(given.values())))
        self.state = TrainState(engine, masking.dense_masks(weights, ["weight"]))
        begin = 0
        if resumed is not None and resumed.kept:
            begin = max(resumed.kept)
            self.state.load_weights(resumed.weights[begin][0])
            self.state.progress = resumed.kept[begin].model_copy(deep=True)
            self.state.load_moments(resumed.weights[begin][1])
        stream = self._arriving(batches(plan.batch_split.passes, begin, ranks.rank, ranks.world))
        with mock.patch.object(losses, "per_sample_l1", partial(self._losing, losses.per_sample_l1)):
            loop.train_round(self.state, wrapped, stream, plan, ranks, self, lambda step, text: None)
        return self

    def _arriving(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        for batch in stream:
            if self.starved_in(self.now, self.number):
                raise Stopped("stopped on request while waiting for a shard")
            yield batch

    def _losing(self, l1: Callable[..., Tensor], restored: Tensor, clean: Tensor) -> Tensor:
        samples, is_nan = l1(restored, clean), self.nan_in(self.now, self.number)
        self.number += 1
        return torch.cat([samples[:-1], samples[-1:] * float("nan")]) if is_nan else samples


def bits(run: Run) -> str:
    return masking.digest_tensors(run.state.weights)
