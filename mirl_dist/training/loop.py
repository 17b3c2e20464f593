"""Trains one round: `train_round` is the training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn

from mirl_dist.config.config import Config
from mirl_dist.data.sample import Batch
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.stragglers import StragglerDetector
from mirl_dist.errors import Stopped
from mirl_dist.observability.console import NOTE, note
from mirl_dist.observability.progress import Advance, say
from mirl_dist.training import guards, losses
from mirl_dist.training.guards import StepLosses
from mirl_dist.training.preflight import RunPlan
from mirl_dist.training.schedule import learning_rate
from mirl_dist.training.state import Progress, TrainState
from mirl_dist.training.step_times import Phase, PhaseClock, report_epoch


class LoopHooks(Protocol):
    """What the loop requires of the run.

    before_step: may raise Stopped on all ranks; flags: whether this rank was asked to stop, whether it is writing a
    commit, and whether that failed; raise_commit_failure: raises the failure on every rank; commit: saves the state, in
    the background unless `wait`; log: logs the values of a step; log_times: logs percentages of an epoch's time; clock:
    measures the phases of steps.
    """

    clock: PhaseClock

    def before_step(self, progress: Progress) -> None: ...
    def flags(self) -> tuple[bool, bool, bool]: ...
    def raise_commit_failure(self) -> None: ...
    def commit(self, *, wait: bool) -> None: ...
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def log_times(self, step: int, percent: dict[str, float]) -> None: ...


class StepStatus(NamedTuple):
    """The result of the all-reduce of a pass, before the backward pass; the same on all ranks.

    A flag is set if any rank sets it (no_batch: a stop was requested while waiting for a shard). replaced: reads in
    which a damaged sample was replaced by another; loss: sum over samples.
    """

    bad: bool
    no_batch: bool
    stop: bool
    commit_busy: bool
    commit_failed: bool
    replaced: int
    loss: float


def train_round(
    state: TrainState,
    model: nn.Module,
    batches: Iterator[Batch],
    plan: RunPlan,
    ranks: Ranks,
    hooks: LoopHooks,
    advance: Advance,
) -> None:
    """Train the masked network in place from `state.progress` to the end of its round, and commit the result.

    model: the network to train, whose weights are `state.weights`; batches: this rank's, from that position on.
    Raises UserError on every rank for a non-finite loss or gradient that may not be skipped (before the update), and
    for a failed commit; Stopped, after a commit, if any rank was asked to stop.
    """
    config, progress, commit_due = plan.config, state.progress, False
    epochs, commit_every = config.round_epochs(progress.round), config.checkpoint.every_steps
    meter, spikes = Meter(plan, progress, ranks), guards.SpikeDetector(config.guard.spike_factor)
    hooks.clock.begin_round()
    while progress.epoch < epochs:
        lr = learning_rate(config, progress, plan.sampler.steps_per_epoch)
        call_before_step(hooks, meter)
        step_losses = StepLosses()
        status = forward_backward(model, batches, step_losses, hooks, meter)
        if status.no_batch:
            commit_and_stop(hooks, meter)
        norm = update_weights(state, lr, step_losses, config, ranks, hooks.clock)
        if not step_losses.skipped:
            meter.add(step_losses)
            spikes.check(status.loss, step_losses, progress, ranks)
        advance_progress(progress, plan, replaced=status.replaced, skipped=step_losses.skipped)
        hooks.clock.samples += config.batch.global_
        ended = progress.epoch == epochs
        if progress.updates % config.tracking.every_steps == 0 or ended:
            with hooks.clock.phase(Phase.TRACKING):
                report_step(meter, {"lr": lr, "gradient_norm": float(norm)}, hooks, advance)
        if progress.step == 0:  # before a commit, which then has the record of it
            hooks.log_times(progress.updates, report_epoch(hooks.clock, progress))
        if status.commit_failed:
            hooks.raise_commit_failure()
        commit_due = commit_due or (commit_every is not None and progress.updates % commit_every == 0)
        if status.stop:
            commit_and_stop(hooks, meter)
        if ended or (commit_due and not status.commit_busy):
            commit(hooks, meter, wait=False)
            commit_due = False


def call_before_step(hooks: LoopHooks, meter: Meter) -> None:
    """Call the hook, excluding its time from the measured speed; commit if it raises Stopped."""
    began = time.monotonic()
    try:
        hooks.before_step(meter.progress)
    except Stopped:
        commit(hooks, meter, wait=True)
        raise
    finally:
        seconds = time.monotonic() - began
        meter.since += seconds
        hooks.clock.exclude(seconds)


def commit(hooks: LoopHooks, meter: Meter, *, wait: bool) -> None:
    """Commit the state, with the losses not yet reported."""
    with hooks.clock.phase(Phase.COMMIT):
        meter.progress.unreported = meter.unreported()
        hooks.commit(wait=wait)


def commit_and_stop(hooks: LoopHooks, meter: Meter) -> NoReturn:
    """Commit the state and raise Stopped."""
    commit(hooks, meter, wait=True)
    position = f"round {meter.progress.round} after {meter.progress.updates} steps"
    raise Stopped(f"stopped on request in {position}; committed")


def forward_backward(
    model: nn.Module, batches: Iterator[Batch], step_losses: StepLosses, hooks: LoopHooks, meter: Meter
) -> StepStatus:
    """Run all forward and backward passes of a step; return the last status, with mean loss and replaced of all passes.

    Returns early if any rank has no batch. A non-finite loss on any rank marks the step as skipped.
    """
    loss, replaced, ranks, config, clock = 0.0, 0, meter.ranks, meter.plan.config, hooks.clock
    passes = meter.plan.batch_split.passes
    for number in range(passes):
        meter.stragglers.begin()
        with clock.phase(Phase.DATA):
            batch = next_batch(batches, ranks.device)
        meter.stragglers.batch_ready()
        with ranks.network.accumulate(model, more=number + 1 < passes):
            with clock.phase(Phase.FORWARD):
                sample_losses = forward(model, batch, config.data.patch_pixels, step_losses, ranks)
            with clock.phase(Phase.LOSS_SUM):
                status = sync_status(sample_losses, batch, ranks, hooks, meter.stragglers)
            if status.no_batch:
                return status
            if status.bad and not step_losses.skipped:
                guards.check_loss(step_losses, meter.progress, config.guard.skip_bad_batches, ranks)
                step_losses.skipped = True
            if not step_losses.skipped:
                with clock.phase(Phase.BACKWARD):
                    ranks.network.backward(sample_losses.mean() / passes)
        loss += status.loss / config.batch.global_
        replaced += status.replaced
    return status._replace(loss=loss, replaced=replaced)


def next_batch(batches: Iterator[Batch], device: torch.device) -> Batch | None:
    """Return the next batch; None if a stop was requested while waiting for a shard."""
    try:
        return next(batches).to(device)
    except Stopped:
        return None


def forward(model: nn.Module, batch: Batch | None, patch_pixels: int, step_losses: StepLosses, ranks: Ranks) -> Tensor:
    """Return per-sample losses (B,); empty without a batch (a sharded engine still runs a dummy forward pass)."""
    if batch is None:
        if ranks.network.is_sharded:
            ranks.network.forward(model, torch.zeros((1, 3, *2 * [patch_pixels]), device=ranks.device))
        return torch.zeros(0)
    restored = ranks.network.forward(model, batch.degraded)
    sample_losses = losses.per_sample_l1(restored, batch.clean)
    step_losses.add(sample_losses.detach(), batch)
    return sample_losses


def sync_status(
    sample_losses: Tensor, batch: Batch | None, ranks: Ranks, hooks: LoopHooks, stragglers: StragglerDetector
) -> StepStatus:
    """Sum losses and flags over all ranks: one collective per pass."""
    sample_losses = sample_losses.detach()
    bad, replaced = not bool(torch.isfinite(sample_losses).all()), 0 if batch is None else batch.skipped
    own = [bad, batch is None, *hooks.flags(), replaced, float(sample_losses.sum())]
    stragglers.reached_collective()
    total = ranks.sum(torch.tensor(own, dtype=torch.float64), what="sum of losses and flags")
    bad, no_batch, stop, busy, failed, replaced, loss = total.tolist()
    return StepStatus(bad > 0, no_batch > 0, stop > 0, busy > 0, failed > 0, int(replaced), loss)


def update_weights(
    state: TrainState, lr: float, step_losses: StepLosses, config: Config, ranks: Ranks, clock: PhaseClock
) -> Tensor:
    """Mask and clip the gradients and make one optimiser step, or drop the gradients if the step is skipped.

    Returns the norm of the averaged gradient, NaN after a non-finite loss. A non-finite norm marks the step as skipped.
    """
    norm = torch.tensor(float("nan"))
    if not step_losses.skipped:
        with clock.phase(Phase.MASKS):
            state.engine.mask_gradients(state.masks)
            norm = state.engine.clip(config.optimiser.clip_norm)
            allowed = config.guard.skip_bad_batches
            step_losses.skipped = guards.check_gradient(norm, step_losses, state.progress, allowed, ranks)
    with clock.phase(Phase.OPTIMISER):
        if step_losses.skipped:
            state.engine.drop_gradients()
        else:
            state.engine.step(lr)
    return norm


def advance_progress(progress: Progress, plan: RunPlan, *, replaced: int, skipped: bool) -> None:
    """Advance the position by one optimiser step."""
    progress.skipped += replaced
    progress.updates += 1
    progress.bad += skipped
    progress.samples += plan.config.batch.global_
    progress.epoch, progress.step = divmod(progress.updates, plan.sampler.steps_per_epoch)


class Meter:
    """Losses, samples and time since the last report, including unreported losses restored from the last commit."""

    def __init__(self, plan: RunPlan, progress: Progress, ranks: Ranks) -> None:
        self.plan, self.progress, self.ranks = plan, progress, ranks
        self.stragglers = StragglerDetector(ranks.hosts)
        tasks = len(plan.sampler.tasks)
        self.sums = torch.zeros(2, tasks, dtype=torch.float64, device=ranks.device)
        self.carried = torch.tensor(progress.unreported or [[0.0] * tasks] * 2, dtype=torch.float64)
        self.since = time.monotonic()

    def add(self, step_losses: StepLosses) -> None:
        for sample_losses, batch in step_losses.passes:
            self.sums += losses.by_task(sample_losses, batch.task, len(self.plan.sampler.tasks))

    def unreported(self) -> list[list[float]]:
        """Return the unreported losses and samples per task, summed over ranks; a collective."""
        totals: list[list[float]] = (self.ranks.sum(self.sums) + self.carried).tolist()
        return totals

    def take(self) -> tuple[Tensor, Tensor, float]:
        """Return losses and samples per task, and samples per second, since the last report; then reset."""
        recent = self.ranks.sum(self.sums)
        losses_per_task, counts = recent + self.carried
        elapsed = max(time.monotonic() - self.since, 1e-9)
        self.progress.seconds += elapsed
        self.progress.unreported = []
        self.sums.zero_()
        self.carried.zero_()
        self.since = time.monotonic()
        return losses_per_task, counts, float(recent[1].sum()) / elapsed


def report_step(meter: Meter, values: dict[str, float], hooks: LoopHooks, advance: Advance) -> None:
    """Log the mean loss since the last report, overall and per task; warn of slow ranks."""
    progress = meter.progress
    losses_per_task, counts, speed = meter.take()
    # The loss comes first: MLflow's comparison of rounds shows the first metric received.
    mean = {"loss/mean": float(losses_per_task.sum() / counts.sum())} if counts.sum() else {}  # none: all were skipped
    per_task = zip(meter.plan.sampler.tasks, losses_per_task.tolist(), counts.tolist(), strict=True)
    values = mean | {f"loss/{task.name}": total / count for task, total, count in per_task if count} | values
    hooks.log(progress.updates, values | {"samples_per_second": speed})
    advance(progress.updates, f"loss {values.get('loss/mean', float('nan')):.4f}  {speed:.0f} samples/s")
    warn_of_stragglers(meter, values)


def warn_of_stragglers(meter: Meter, values: dict[str, float]) -> None:
    """Record how this rank spent its time; warn of ranks that are slower than the others."""
    ranks, progress = meter.ranks, meter.progress
    batch_seconds, rest_seconds = meter.stragglers.mean_seconds()
    timings = {"batch_seconds": batch_seconds, "rest_seconds": rest_seconds}
    note(f"round {progress.round}", NOTE, round=progress.round, step=progress.updates, **timings, **values)
    if ranks.world == 1:
        return
    own = torch.tensor([batch_seconds, rest_seconds], dtype=torch.float64)
    per_rank = [(float(batch), float(rest)) for batch, rest in ranks.gather(own, what="gather of paces").tolist()]
    for line in meter.stragglers.find_slow(per_rank, meter.plan.config.ranks.slow_factor):
        if ranks.is_main:
            say(f"warning: {line}")
