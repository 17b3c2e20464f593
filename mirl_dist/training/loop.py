"""One round's training, on one screen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mirl_dist.config.tasks import Task
from mirl_dist.data.sample import Batch
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.stragglers import StragglerDetector
from mirl_dist.errors import Stopped
from mirl_dist.observability.console import note
from mirl_dist.observability.progress import Advance, say
from mirl_dist.training import guards
from mirl_dist.training.losses import by_task, combine, per_sample_l1
from mirl_dist.training.state import Progress, TrainState


@dataclass(frozen=True)
class RoundConfig:
    """The numbers of one round. batch: samples per step over all ranks; passes: forward passes per step and rank;
    skip_bad: steps of the round that may be left out; slow_factor, spike_factor: as in the config."""

    tasks: tuple[Task, ...]
    epochs: int
    steps_per_epoch: int
    batch: int
    passes: int
    clip_norm: float | None
    commit_every: int | None
    report_every: int
    skip_bad: int = 0
    spike_factor: float | None = None
    slow_factor: float = 1.5
    patch_pixels: int = 64


class LoopHooks(Protocol):
    """The run around a round's loop.

    rate: the learning rate at a position; begins_step: heard before each step, may raise Stopped on all ranks; commit:
    keep the state, in the background unless `wait`; busy, failed: whether a commit is being written, or could not be
    (on the rank that writes); refuse_failed: raise that failure, on every rank; log: values of a step, on the rank
    that tells.
    """

    def rate(self, progress: Progress) -> float: ...
    def before_step(self, progress: Progress) -> None: ...
    def stop_requested(self) -> bool: ...
    def commit_busy(self) -> bool: ...
    def commit_failed(self) -> bool: ...
    def raise_commit_failure(self) -> None: ...
    def commit(self, *, wait: bool) -> None: ...
    def log(self, step: int, values: dict[str, float]) -> None: ...


class StepStatus(NamedTuple):
    """What all ranks know after their meeting in a pass, before the backward pass: whether any of them met a loss that
    is not finite, was asked to stop, has no batch (and was asked to stop), is writing a commit, could not write one;
    reads in which a sample stood in for a damaged one; the sum of the losses over the samples."""

    bad: bool
    stop: bool
    no_batch: bool
    commit_busy: bool
    commit_failed: bool
    skipped: int
    loss: float


def train_round(
    state: TrainState,
    model: nn.Module,
    batches: Iterator[Batch],
    plan: RoundConfig,
    ranks: Ranks,
    around: LoopHooks,
    advance: Advance,
) -> None:
    """Train the masked network from `state.progress` to the end of its round, in place; commit its end.

    model: the network to train, whose weights are `state.weights`; batches: this rank's, from that position on.
    Raises UserError on every rank, before the step, for a loss or gradient that is not finite, and for a commit that could
    not be written; Stopped after a commit when any rank was asked to stop.
    """
    engine, progress = state.engine, state.progress
    meter, pace, spikes = (
        Meter(plan, progress, ranks.device),
        StragglerDetector(ranks.hosts),
        guards.SpikeDetector(plan.spike_factor),
    )
    due = False
    while progress.epoch < plan.epochs:
        lr, seen, loss, norm = around.rate(progress), guards.StepLosses(), 0.0, torch.tensor(float("nan"))
        try:
            with meter.paused():
                around.before_step(progress)
        except Stopped:
            progress.unreported = meter.unreported(ranks)
            around.commit(wait=True)
            raise
        skipped = 0
        for i in range(plan.passes):
            pace.begin()
            batch = next_batch(batches, ranks.device)
            pace.batch_ready()
            with ranks.accumulate(model, more=i + 1 < plan.passes):
                losses = forward(model, batch, plan, seen, ranks)
                word = sync_status(losses, batch, ranks, around, pace)
                if word.no_batch:
                    progress.unreported = meter.unreported(ranks)
                    around.commit(wait=True)
                    raise Stopped(
                        f"stopped as asked in round {progress.round} after {progress.updates} steps; committed"
                    )
                if word.bad and not seen.skipped:
                    guards.check_loss(seen, progress, plan.skip_bad, ranks)
                    seen.skipped = True
                if not seen.skipped:
                    ranks.backward(combine(losses) / plan.passes)
            loss += word.loss / plan.batch
            skipped += word.skipped
        if not seen.skipped:
            engine.mask_gradients(state.masks)
            norm = engine.clip(plan.clip_norm)
            seen.skipped = guards.check_gradient(norm, seen, progress, plan.skip_bad, ranks)
        if seen.skipped:
            engine.drop_gradients()
        else:
            engine.step(lr)
            meter.add(seen)
            spikes.check(loss, seen, progress, ranks)
        progress.skipped += skipped
        advance_progress(progress, plan, left_out=seen.skipped)
        ended = progress.epoch == plan.epochs
        if progress.updates % plan.report_every == 0 or ended:
            report_step(progress, meter, pace, plan, ranks, {"lr": lr, "gradient_norm": float(norm)}, around, advance)
        if word.commit_failed:
            around.raise_commit_failure()
        due = due or (plan.commit_every is not None and progress.updates % plan.commit_every == 0)
        if word.stop or ended or (due and not word.commit_busy):
            progress.unreported = meter.unreported(ranks)
            around.commit(wait=word.stop)
            due = False
        if word.stop:
            raise Stopped(f"stopped as asked in round {progress.round} after {progress.updates} steps; committed")


def next_batch(batches: Iterator[Batch], device: torch.device) -> Batch | None:
    """The next batch; None when this rank was asked to stop while a shard did not come."""
    try:
        return next(batches).to(device)
    except Stopped:
        return None


def forward(model: nn.Module, batch: Batch | None, plan: RoundConfig, seen: guards.StepLosses, ranks: Ranks) -> Tensor:
    """The loss of each sample; of none without a batch, for which a rank goes along where the others need it to."""
    if batch is None:
        if ranks.is_sharded:
            ranks.forward(model, torch.zeros(1, 3, plan.patch_pixels, plan.patch_pixels, device=ranks.device))
        return torch.zeros(0)
    restored = ranks.forward(model, batch.degraded)
    losses = per_sample_l1(restored, batch.clean)
    seen.add(losses.detach(), batch)
    return losses


def sync_status(
    losses: Tensor, batch: Batch | None, ranks: Ranks, around: LoopHooks, pace: StragglerDetector
) -> StepStatus:
    """The one meeting of ranks in a pass: who met a loss that is not finite, who was asked to stop, and so on."""
    bad = not bool(torch.isfinite(losses.detach()).all())
    skipped = 0 if batch is None else batch.skipped
    flags = [bad, around.stop_requested(), batch is None, around.commit_busy(), around.commit_failed(), skipped]
    mine = torch.tensor([*map(float, flags), float(losses.detach().sum())], dtype=torch.float64)
    pace.reached_collective()
    *told, replaced, loss = ranks.sum(mine, what="sum of losses and flags").tolist()
    bad, stop, starved, busy, failed = (count > 0 for count in told)
    return StepStatus(bad, stop, starved, busy, failed, int(replaced), loss)


def advance_progress(progress: Progress, plan: RoundConfig, *, left_out: bool) -> None:
    """Move the position one optimiser step on."""
    progress.updates += 1
    progress.bad += left_out
    progress.samples += plan.batch
    progress.epoch, progress.step = divmod(progress.updates, plan.steps_per_epoch)


class Meter:
    """Losses, samples and time since the last report; what a commit carried over is counted in."""

    def __init__(self, plan: RoundConfig, progress: Progress, device: torch.device) -> None:
        self.tasks = len(plan.tasks)
        self.sums = torch.zeros(2, self.tasks, dtype=torch.float64, device=device)
        self.carried = torch.tensor(progress.unreported or [[0.0] * self.tasks] * 2, dtype=torch.float64)
        self.began = time.monotonic()

    def add(self, seen: guards.StepLosses) -> None:
        for losses, batch in seen.passes:
            self.sums += by_task(losses, batch.task, self.tasks)

    def unreported(self, ranks: Ranks) -> list[list[float]]:
        """What has not been reported: losses and samples per task, summed over ranks."""
        found: list[list[float]] = (ranks.sum(self.sums) + self.carried).tolist()
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What may take long here is no training: scoring within a round."""
        since = time.monotonic()
        yield
        self.began += time.monotonic() - since

    def reset(self) -> None:
        self.sums.zero_()
        self.carried.zero_()
        self.began = time.monotonic()


def report_step(
    progress: Progress,
    meter: Meter,
    pace: StragglerDetector,
    plan: RoundConfig,
    ranks: Ranks,
    values: dict[str, float],
    around: LoopHooks,
    advance: Advance,
) -> None:
    """Sum the losses since the last report over the ranks, log them per task, name slow ranks, and count afresh."""
    now = ranks.sum(meter.sums)
    losses, counts = now + meter.carried
    elapsed = max(time.monotonic() - meter.began, 1e-9)
    progress.seconds += elapsed
    speed = float(now[1].sum()) / elapsed
    # The loss comes first: MLflow opens its comparison of rounds with the first metric that it heard of.
    mean = {"loss/mean": float(losses.sum() / counts.sum())} if counts.sum() else {}  # else every step was left out
    values = (
        mean
        | {
            f"loss/{task.name}": float(s / n)
            for task, s, n in zip(plan.tasks, losses.tolist(), counts.tolist(), strict=True)
            if n
        }
        | values
    )
    around.log(progress.updates, values | {"samples_per_second": speed})
    advance(progress.updates, f"loss {values.get('loss/mean', float('nan')):.4f}  {speed:.0f} samples/s")
    batch_seconds, rest_seconds = pace.mean_seconds()
    told = {"batch_seconds": batch_seconds, "rest_seconds": rest_seconds} | values
    note(f"round {progress.round}", "note", round=progress.round, step=progress.updates, **told)
    if ranks.world > 1:
        mine = torch.tensor([batch_seconds, rest_seconds], dtype=torch.float64)
        paces = ranks.gather(mine, what="gather of paces")
        lines = pace.find_slow([(float(a), float(b)) for a, b in paces.tolist()], plan.slow_factor)
        for line in lines if ranks.is_main else ():
            say(f"warning: {line}")
    meter.reset()
    progress.unreported = []
