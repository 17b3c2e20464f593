"""One round's training, on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mirl_dist import objective
from mirl_dist.data.sample import Batch
from mirl_dist.faults import Fault, Stopped
from mirl_dist.pruning import masks
from mirl_dist.ranks import Ranks
from mirl_dist.report import Advance
from mirl_dist.state import Progress, State
from mirl_dist.tasks import Task

Rate = Callable[[Progress], float]


@dataclass(frozen=True)
class Plan:
    """The numbers of one round. batch: samples per step over all ranks; passes: forward passes per step and rank."""

    tasks: tuple[Task, ...]
    epochs: int
    steps_per_epoch: int
    batch: int
    passes: int
    clip_norm: float | None
    commit_every: int | None
    report_every: int


@dataclass
class Meter:
    """Losses, samples and time since the last report."""

    tasks: int
    device: torch.device
    sums: Tensor = field(init=False)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2, self.tasks, dtype=torch.float64, device=self.device)

    def count(self, losses: Tensor, batch: Batch) -> None:
        self.sums += objective.by_task(losses, batch.task, self.tasks)


def train_round(
    state: State,
    model: nn.Module,
    batches: Iterator[Batch],
    plan: Plan,
    ranks: Ranks,
    *,
    rate: Rate,
    stop_asked: Callable[[], bool],
    commit: Callable[[], None],
    log: Callable[[int, dict[str, float]], None],
    advance: Advance,
) -> None:
    """Train the masked network from `state.progress` to the end of its round, in place.

    model: the wrapped network whose parameters are `state.weights`; batches: this rank's, from that position on.
    Raises Fault on every rank, before the step, for a loss or gradient that is not finite; Stopped after a commit
    when any rank was asked to stop.
    """
    parameters, progress, meter = (
        list(state.weights.values()),
        state.progress,
        Meter(len(plan.tasks), ranks.device),
    )
    while progress.epoch < plan.epochs:
        lr = rate(progress)
        for i in range(plan.passes):
            batch = next(batches).to(ranks.device)
            with ranks.accumulate(model, more=i + 1 < plan.passes):
                with ranks.autocast():
                    restored = model(batch.degraded)
                losses = objective.per_sample_l1(restored, batch.clean)
                stop, skipped = refuse_non_finite(losses, batch, progress, ranks, stop_asked())
                ranks.backward(objective.combine(losses) / plan.passes)
            meter.count(losses, batch)
            progress.skipped += skipped
        masks.close_gradients(state.weights, state.masks)
        norm = nn.utils.clip_grad_norm_(parameters, plan.clip_norm or float("inf"))
        refuse_non_finite_gradient(norm, batch, progress)
        for group in state.optimiser.param_groups:
            group["lr"] = lr
        state.optimiser.step()
        state.optimiser.zero_grad()
        count(progress, plan)
        if progress.updates % plan.report_every == 0 or progress.epoch == plan.epochs:
            report(progress, meter, plan, ranks, lr, float(norm), log, advance)
        if stop or (plan.commit_every and progress.updates % plan.commit_every == 0):
            commit()
        if stop:
            raise Stopped(f"stopped as asked in round {progress.round} after {progress.updates} steps; committed")


def count(progress: Progress, plan: Plan) -> None:
    """Move the position one optimiser step on."""
    progress.updates += 1
    progress.samples += plan.batch
    progress.epoch, progress.step = divmod(progress.updates, plan.steps_per_epoch)


def report(
    progress: Progress,
    meter: Meter,
    plan: Plan,
    ranks: Ranks,
    lr: float,
    norm: float,
    log: Callable[[int, dict[str, float]], None],
    advance: Advance,
) -> None:
    """Sum the losses since the last report over the ranks, log them per task, and start counting afresh."""
    sums, counts = ranks.sum(meter.sums)
    elapsed = max(time.monotonic() - meter.began, 1e-9)
    progress.seconds += elapsed
    speed = float(counts.sum()) / elapsed
    loss = float(sums.sum() / counts.sum())
    values = {"lr": lr, "gradient_norm": norm, "samples_per_second": speed, "loss/mean": loss}
    values |= {
        f"loss/{task.name}": float(s / n)
        for task, s, n in zip(plan.tasks, sums.tolist(), counts.tolist(), strict=True)
        if n
    }
    log(progress.updates, values)
    advance(progress.updates, f"loss {loss:.4f}  {speed:.0f} samples/s")
    meter.sums.zero_()
    meter.began = time.monotonic()


def _position(progress: Progress) -> str:
    return f"round {progress.round}, epoch {progress.epoch}, step {progress.step}"


def refuse_non_finite(losses: Tensor, batch: Batch, progress: Progress, ranks: Ranks, stop: bool) -> tuple[bool, int]:
    """Raise Fault on every rank when any sample of any rank has a loss that is not finite; naming it.

    The same meeting of ranks tells whether any of them was asked to stop, and how many samples of this pass stood in
    for damaged ones: that is what is returned.
    """
    bad = ~torch.isfinite(losses.detach())
    flags = ranks.sum(torch.tensor([int(bad.any()), int(stop), batch.skipped], dtype=torch.int64))
    if flags[0]:
        names = [key for key, wrong in zip(batch.keys, bad.tolist(), strict=True) if wrong]
        said = [f"rank {r}: {', '.join(n)}" for r, n in enumerate(ranks.gather_objects(names)) if n]
        raise Fault(
            f"the loss is not finite at {_position(progress)}, samples as task:key: {'; '.join(said)}. Nothing of "
            "this step was applied. Check those samples, "
            "or lower optimiser.lr or optimiser.clip_norm in a new run.folder.",
            everywhere=True,
        )
    return bool(flags[1]), int(flags[2])


def refuse_non_finite_gradient(norm: Tensor, batch: Batch, progress: Progress) -> None:
    """Raise Fault before the step when the averaged gradient, the same on every rank, is not finite."""
    if not bool(torch.isfinite(norm)):
        raise Fault(
            f"the gradient is not finite at {_position(progress)} though every loss was; rank 0 held samples "
            f"{', '.join(batch.keys)}. Nothing of this step was applied. "
            "Lower optimiser.lr, or train in fp32, in a new run.folder.",
            everywhere=True,
        )
