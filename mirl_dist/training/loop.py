"""Trains one round: `train_round` is the training loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn

from mirl_dist.data.sample import Batch
from mirl_dist.distributed.host_copy import HostCopy
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.stragglers import StragglerDetector
from mirl_dist.errors import Stopped
from mirl_dist.observability.console import NOTE, note
from mirl_dist.observability.progress import Advance, say
from mirl_dist.observability.step_times import Phase, PhaseClock, report_epoch
from mirl_dist.training import guards, losses
from mirl_dist.training.guards import StepLosses
from mirl_dist.training.preflight import RunPlan
from mirl_dist.training.progress import Progress
from mirl_dist.training.schedule import learning_rate
from mirl_dist.training.state import TrainState
from mirl_dist.training.step_status import StepStatus, UpdateGate, sum_status

_PASSES_ADDED_AT_ONCE = 100


class LoopHooks(Protocol):
    """What the loop requires of the run.

    before_step: called with the position of the step to queue next; may raise Stopped on all ranks. flags: whether this
    rank was asked to stop, whether it is writing a commit, and whether that failed; raise_commit_failure: raises the
    failure on every rank; commit: saves the state, in the background unless `wait`; log: logs the values of a step;
    log_times: logs percentages of an epoch's time; clock: measures the phases of steps.
    """

    @property
    def clock(self) -> PhaseClock: ...
    def before_step(self, progress: Progress) -> None: ...
    def flags(self) -> tuple[bool, bool, bool]: ...
    def raise_commit_failure(self) -> None: ...
    def commit(self, *, wait: bool) -> None: ...
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def log_times(self, step: int, percent: dict[str, float]) -> None: ...


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
    Raises UserError on every rank for a non-finite loss or gradient that may not be skipped (its step changes nothing),
    and for a failed commit; Stopped, after a commit, if any rank was asked to stop.
    """
    config, progress, commit_due = plan.config, state.progress, False
    epochs, commit_every = config.round_epochs(progress.round), config.checkpoint.every_steps
    meter, spikes = Meter(plan, progress, ranks, hooks.clock), guards.SpikeDetector(config.guard.spike_factor)
    steps = StepQueue(state, model, batches, hooks, meter)
    while progress.epoch < epochs:
        step = steps.next_step(alone=commit_due or is_milestone(plan, progress))
        with meter.clock.phase(Phase.WAIT):  # the one wait for the device in a step
            status = StepStatus.of(step.outcome.read(), ranks.world)
        if status.no_batch:
            commit_and_stop(hooks, meter)
        skipped = guards.check_step(status, step.losses, progress, config.guard.skip_bad_batches, ranks)
        if not skipped:
            meter.add(step.losses)
            spikes.check(status.loss / config.batch.global_, step.losses, progress, ranks)
        advance_progress(progress, plan, replaced=status.replaced, skipped=skipped)
        meter.clock.samples += config.batch.global_
        ended = progress.epoch == epochs
        if progress.updates % config.tracking.every_steps == 0 or ended:
            with meter.clock.phase(Phase.TRACKING):
                report_step(meter, {"lr": step.lr, "gradient_norm": status.norm}, hooks, advance)
        if progress.step == 0:  # before a commit, which then has the record of it
            hooks.log_times(progress.updates, report_epoch(meter.clock, progress.round, progress.epoch))
        if status.commit_failed:
            hooks.raise_commit_failure()
        commit_due = commit_due or (commit_every is not None and progress.updates % commit_every == 0)
        if status.stop:
            commit_and_stop(hooks, meter)
        if ended or (commit_due and not status.commit_busy):
            commit(hooks, meter, wait=False)
            commit_due = False


def is_milestone(plan: RunPlan, progress: Progress) -> bool:
    """Whether the state after the next step is looked at: by a commit, a report, a validation or a rewind point."""
    config, updates = plan.config, progress.updates + 1
    every = plan.sampler.steps_per_epoch, config.tracking.every_steps, config.checkpoint.every_steps
    return updates == config.rewind.step or any(steps is not None and updates % steps == 0 for steps in every)


class QueuedStep(NamedTuple):
    """A step that the device computes now or soon. outcome: of `sum_status`."""

    lr: float
    losses: StepLosses
    outcome: HostCopy


class StepQueue:
    """Queues the steps of a round on the device, where the engine allows it one ahead of the host's knowledge.

    `state.progress` is the position after the steps that `next_step` has returned and the caller has counted. If
    training ends with one of them, a gate on the device keeps the step behind it from changing the state.
    """

    def __init__(
        self, state: TrainState, model: nn.Module, batches: Iterator[Batch], hooks: LoopHooks, meter: Meter
    ) -> None:
        self._state, self._model, self._batches, self._hooks, self._meter = state, model, batches, hooks, meter
        skips = meter.plan.config.guard.skip_bad_batches - state.progress.bad
        self._gate = UpdateGate(max(0, skips), meter.ranks.device)
        self._queued: deque[QueuedStep] = deque()
        self._no_batch = False

    def next_step(self, *, alone: bool) -> QueuedStep:
        """Return the next step in order. alone: queue none behind it, because the state after it is looked at."""
        wanted = 1 if alone or not self._state.engine.runs_ahead else 2
        while len(self._queued) < wanted:
            self._queued.append(self._queue_step())
        return self._queued.popleft()

    def _queue_step(self) -> QueuedStep:
        """Queue one optimiser step: gradients, masks, clipping, the sum over ranks, and the update. Nothing waits."""
        plan, ranks, engine = self._meter.plan, self._meter.ranks, self._state.engine
        progress = self._state.progress.ahead(len(self._queued), plan.sampler.steps_per_epoch)
        call_before_step(self._hooks, progress, self._meter)
        lr = learning_rate(plan.config, progress, plan.sampler.steps_per_epoch)
        step_losses = StepLosses(no_batch=self._no_batch)
        forward_backward(self._model, self._batches, step_losses, self._meter)
        self._no_batch = step_losses.no_batch  # none will follow in the next step either
        clock = self._meter.clock
        with clock.phase(Phase.MASKS):
            engine.mask_gradients()
            norm = engine.clip(plan.config.optimiser.clip_norm)
        stop, commit_busy, commit_failed = self._hooks.flags()
        flags = step_losses.no_batch, stop, commit_failed, commit_busy
        with clock.phase(Phase.LOSS_SUM):
            total = sum_status(flags, step_losses.replaced(), step_losses.sum(ranks.device), norm, ranks)
        with clock.phase(Phase.OPTIMISER):
            engine.step(lr, self._gate.refuses(total))
        return QueuedStep(lr, step_losses, HostCopy(total))


def call_before_step(hooks: LoopHooks, progress: Progress, meter: Meter) -> None:
    """Call the hook, excluding its time from the measured speed; commit if it raises Stopped."""
    began = time.monotonic()
    try:
        hooks.before_step(progress)
    except Stopped:
        commit(hooks, meter, wait=True)
        raise
    finally:
        seconds = time.monotonic() - began
        meter.since += seconds
        meter.clock.exclude(seconds)


def commit(hooks: LoopHooks, meter: Meter, *, wait: bool) -> None:
    """Commit the state, with the losses not yet reported."""
    with meter.clock.phase(Phase.COMMIT):
        meter.progress.unreported = meter.unreported()
        hooks.commit(wait=wait)


def commit_and_stop(hooks: LoopHooks, meter: Meter) -> NoReturn:
    """Commit the state and raise Stopped."""
    commit(hooks, meter, wait=True)
    position = f"round {meter.progress.round} after {meter.progress.updates} steps"
    raise Stopped(f"stopped on request in {position}; committed")


def forward_backward(model: nn.Module, batches: Iterator[Batch], step_losses: StepLosses, meter: Meter) -> None:
    """Run all forward and backward passes of a step, which average the gradients over ranks."""
    ranks, passes, clock = meter.ranks, meter.plan.batch_split.passes, meter.clock
    for number in range(passes):
        meter.stragglers.begin()
        with clock.phase(Phase.DATA):
            batch = None if step_losses.no_batch else next_batch(batches, ranks.device)
        meter.stragglers.batch_ready()
        with ranks.network.accumulate(model, more=number + 1 < passes):
            with clock.phase(Phase.FORWARD):
                loss = forward(model, batch, meter.plan, step_losses, ranks)
            meter.stragglers.reached_collective()
            with clock.phase(Phase.BACKWARD):
                ranks.network.backward(loss / passes)


def next_batch(batches: Iterator[Batch], device: torch.device) -> Batch | None:
    """Return the next batch; None if a stop was requested while waiting for a shard."""
    try:
        return next(batches).to(device)
    except Stopped:
        return None


def forward(model: nn.Module, batch: Batch | None, plan: RunPlan, step_losses: StepLosses, ranks: Ranks) -> Tensor:
    """Return the mean loss; without a batch that of a pass without weight, for the other ranks' collectives."""
    if batch is None:
        step_losses.no_batch = True
        samples = plan.batch_split.forward if plan.config.train.compile else 1  # another shape would be compiled now
        blank = torch.zeros((samples, 3, *2 * [plan.config.data.patch_pixels]), device=ranks.device)
        return 0 * ranks.network.forward(model, blank).sum()
    sample_losses = losses.per_sample_l1(ranks.network.forward(model, batch.degraded), batch.clean)
    step_losses.add(sample_losses.detach(), batch)
    return sample_losses.mean()


def advance_progress(progress: Progress, plan: RunPlan, *, replaced: int, skipped: bool) -> None:
    """Advance the position by one optimiser step."""
    progress.skipped += replaced
    progress.updates += 1
    progress.bad += skipped
    progress.samples += plan.config.batch.global_
    progress.epoch, progress.step = divmod(progress.updates, plan.sampler.steps_per_epoch)


class Meter:
    """Losses, samples and time since the last report, including unreported losses restored from the last commit."""

    def __init__(self, plan: RunPlan, progress: Progress, ranks: Ranks, clock: PhaseClock) -> None:
        self.plan, self.progress, self.ranks, self.clock = plan, progress, ranks, clock
        clock.begin_round()
        self.stragglers = StragglerDetector(ranks.hosts, on_gpu=ranks.device.type == "cuda")
        tasks = len(plan.sampler.tasks)
        self._passes: list[tuple[Tensor, Tensor]] = []
        self._sums = torch.zeros(2, tasks, dtype=torch.float64, device=ranks.device)
        self._carried = torch.tensor(progress.unreported or [[0.0] * tasks] * 2, dtype=torch.float64)
        self.since = time.monotonic()

    def add(self, step_losses: StepLosses) -> None:
        self._passes += [(sample_losses, batch.task) for sample_losses, batch in step_losses.passes]
        if len(self._passes) >= _PASSES_ADDED_AT_ONCE:
            self._add_up()

    def _add_up(self) -> Tensor:
        """Return losses and samples per task of this rank; many passes at once launch few kernels."""
        if self._passes:
            sample_losses, tasks = (torch.cat(values) for values in zip(*self._passes, strict=True))
            self._sums += losses.by_task(sample_losses, tasks, len(self.plan.sampler.tasks))
            self._passes.clear()
        return self._sums

    def unreported(self) -> list[list[float]]:
        """Return the unreported losses and samples per task, summed over ranks; a collective."""
        totals: list[list[float]] = (self.ranks.sum(self._add_up()) + self._carried).tolist()
        return totals

    def take(self) -> tuple[Tensor, Tensor, float]:
        """Return losses and samples per task, and samples per second, since the last report; then reset."""
        recent = self.ranks.sum(self._add_up())
        losses_per_task, counts = recent + self._carried
        elapsed = max(time.monotonic() - self.since, 1e-9)
        self.progress.seconds += elapsed
        self.progress.unreported = []
        self._sums.zero_()
        self._carried.zero_()
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
