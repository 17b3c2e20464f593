"""Runs training steps of a config on the product's own loop, and measures them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from mirl_dist.cli.profile import flops
from mirl_dist.cli.profile.flops import wait_for_device
from mirl_dist.config.config import Config
from mirl_dist.data.sampler import Position
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import Stopped
from mirl_dist.observability.console import rank_label
from mirl_dist.observability.mlflow.journal import Journal
from mirl_dist.observability.mlflow.outbox import Outbox
from mirl_dist.observability.progress import bar
from mirl_dist.observability.step_times import Phase, PhaseClock
from mirl_dist.training import dataloaders, loop
from mirl_dist.training.initial import InitialState, OpenTicket, create_initial
from mirl_dist.training.preflight import RunPlan
from mirl_dist.training.progress import Progress
from mirl_dist.training.run import network_of
from mirl_dist.training.state import TrainState

WARM_UP_STEPS, KERNEL_STEPS = 3, 2
LARGEST_KERNELS = 10


class KernelTime(NamedTuple):
    """One kind of kernel: calls and seconds per step, without kernels that it calls, and its share of all of them."""

    name: str
    calls: float
    seconds: float
    share: float


class RankTimes(NamedTuple):
    """What one rank measured. phases: seconds per step; a commit and a report count by how often a run makes them.

    step_seconds: of a step without waiting for the GPU between phases; commit_seconds: of the snapshot of one commit;
    flops: operations of a step on this rank; peak: measured operations per second of a matrix product. kernels: the
    largest ones, on rank 0.
    """

    rank: str
    device: str
    phases: dict[Phase, float]
    step_seconds: float
    commit_seconds: float
    report_seconds: float
    flops: int
    peak: float
    kernels: list[KernelTime]


class StepWindows:
    """Stretches of timed steps. times: seconds of each, and its seconds by phase."""

    def __init__(self, device: torch.device) -> None:
        self.clock = PhaseClock()
        self.times: list[tuple[float, dict[Phase, float]]] = []
        self._device, self._began = device, 0.0

    def open(self) -> None:
        """Begin a window; from the second one on the host waits for the GPU at both ends of each phase."""
        wait_for_device(self._device)
        self.clock.synchronise = torch.cuda.synchronize if self.times else None
        self.clock.begin_round()
        self._began = time.perf_counter()

    def close(self) -> None:
        """End a window."""
        wait_for_device(self._device)
        seconds = time.perf_counter() - self._began
        self.clock.synchronise = None
        self.clock.take()  # into `clock.round`, where the epochs of the window are
        self.times.append((seconds, self.clock.round.phases))


class KernelRecorder:
    """torch's profiler on rank 0; on other ranks it does nothing. largest: the kernels with most time, after `stop`."""

    def __init__(self, ranks: Ranks) -> None:
        self.largest: list[KernelTime] = []
        self._device, self._is_main = ranks.device, ranks.is_main
        self._profiler: Any = None

    def start(self) -> None:
        if self._is_main:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
            self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
            self._profiler.start()

    def stop(self, steps: int) -> None:
        """steps: how many were recorded."""
        if self._profiler is not None:
            wait_for_device(self._device)
            self._profiler.stop()
            self.largest = largest_kernels(self._profiler, steps, cuda=self._device.type == "cuda")


class ProfileHooks:
    """Hooks of the training loop that write nothing but a temporary journal, and stop it after the profiled steps.

    Warm-up steps are followed by a window of `steps` timed ones, on a GPU by a second window, and by a few steps under
    torch's profiler.
    """

    def __init__(self, state: TrainState, ranks: Ranks, stop: StopSignal, steps: int, journal: Path) -> None:
        self.windows, self.kernels = StepWindows(ranks.device), KernelRecorder(ranks)
        self.commit_seconds = 0.0
        self._state, self._ranks, self._stop, self._steps = state, ranks, stop, steps
        self._outbox = Outbox("", uuid.uuid4().hex, Journal(journal)) if ranks.is_main else None
        self._updates = 0

    @property
    def clock(self) -> PhaseClock:
        return self.windows.clock

    @property
    def timed_steps(self) -> int:
        """The number of timed steps in all windows."""
        return self._steps * (2 if self._ranks.device.type == "cuda" else 1)

    @property
    def total_steps(self) -> int:
        return WARM_UP_STEPS + self.timed_steps + KERNEL_STEPS

    def before_step(self, progress: Progress) -> None:
        self._updates, timed = progress.updates, progress.updates - WARM_UP_STEPS
        if not 0 <= timed <= self.timed_steps or timed % self._steps:
            return
        if timed > 0:
            self.windows.close()
        if timed < self.timed_steps:
            self.windows.open()
        else:
            self.kernels.start()

    def flags(self) -> tuple[bool, bool, bool]:
        return self._stop() or self._updates + 1 >= self.total_steps, False, False

    def raise_commit_failure(self) -> None:
        raise AssertionError("no commit is written")

    def commit(self, *, wait: bool) -> None:
        """Measure the snapshot of a commit, when the loop ends. The first snapshot allocates memory, as in a run."""
        self.kernels.stop(self._updates + 1 - WARM_UP_STEPS - self.timed_steps)
        for _ in range(2):
            wait_for_device(self._ranks.device)
            began = time.perf_counter()
            self._state.snapshot(keep=self._ranks.is_main)
            self.commit_seconds = time.perf_counter() - began

    def log(self, step: int, values: dict[str, float]) -> None:
        if self._outbox is not None:
            self._outbox.put_points("points", "round/00", [(name, value, step) for name, value in values.items()])

    def log_times(self, step: int, percent: dict[str, float]) -> None:
        self.log(step, percent)


def largest_kernels(profiler: torch.profiler.profile, steps: int, *, cuda: bool) -> list[KernelTime]:
    """Return the kernels with most time of their own: CUDA kernels, or operators of torch on the CPU."""
    events = []
    for event in profiler.key_averages():
        on_gpu = event.device_type.name == "CUDA"
        if on_gpu == cuda:
            events.append((event.self_device_time_total if cuda else event.self_cpu_time_total, event))
    total = max(sum(microseconds for microseconds, _ in events), 1e-9)
    events.sort(key=lambda one: (-one[0], one[1].key))
    return [
        KernelTime(event.key, event.count / steps, microseconds * 1e-6 / steps, microseconds / total)
        for microseconds, event in events[:LARGEST_KERNELS]
    ]


def profile_steps(
    plan: RunPlan, ranks: Ranks, stop: StopSignal, open_ticket: OpenTicket, steps: int, folder: Path
) -> list[RankTimes]:
    """Train a few steps of round 0 and measure them; return the times of all ranks. A collective.

    folder: temporary, for this rank's journal. Raises like a run: UserError for damaged data and non-finite losses,
    Stopped if any rank was asked to stop.
    """
    config = plan.config
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    ranks.barrier()
    peak = flops.measure_peak(ranks.device, dtype)
    network, _ = network_of(config, _initial_state(config, open_ticket, ranks), ranks)
    hooks = ProfileHooks(network.state, ranks, stop, steps, folder)
    own = _with_steps(plan, hooks.total_steps, report_every=steps)
    pool = dataloaders.shard_pool_of(own.config, own.shards, rank_label(ranks.rank), stop)
    stream = dataloaders.train_loader_of(own, pool, ranks).batches(0, Position(0, 0), own.config.train.epochs)
    total = hooks.total_steps
    with ranks.in_phase("training"), closing(stream) as batches, _measured_reduce(network.wrapped, ranks, hooks.clock):
        try:
            with bar("profile", total, shown=ranks.is_main) as advance:
                loop.train_round(network.state, network.wrapped, batches, own, ranks, hooks, advance)
        except Stopped:
            if network.state.progress.updates < total:
                raise Stopped("stopped on request before the profile was complete") from None
    pool.close()
    return ranks.gather_objects(_rank_times(plan, ranks, hooks, steps, peak), what="gather of times")


def _initial_state(config: Config, open_ticket: OpenTicket, ranks: Ranks) -> InitialState:
    """Create the initial weights and masks on rank 0 and broadcast them."""
    state = ranks.keep_on_main(lambda: create_initial(config, open_ticket), what="first weights")
    weights = ranks.broadcast_tensors(state.weights if state else None)
    masks = ranks.broadcast_tensors(state.masks or {} if state else None)
    return InitialState(weights, masks or None, None)


def _with_steps(plan: RunPlan, steps: int, report_every: int) -> RunPlan:
    """Return the plan with a round of more than `steps` steps, one commit at its end, and reports when told."""
    config = plan.config
    epochs = max(config.train.epochs, steps // plan.sampler.steps_per_epoch + 1)
    sections: dict[str, Any] = {
        "train": config.train.model_copy(update={"epochs": epochs}),
        "checkpoint": config.checkpoint.model_copy(update={"every_steps": None}),
        "tracking": config.tracking.model_copy(update={"every_steps": report_every}),
    }
    return plan._replace(config=config.model_copy(update=sections))


@contextmanager
def _measured_reduce(model: nn.Module, ranks: Ranks, clock: PhaseClock) -> Iterator[None]:
    """Measure the wait for DDP's all-reduce: what follows the gradient of the first layer, the last one computed."""
    if ranks.world == 1 or ranks.network.is_sharded:
        yield
        return
    first: Any = next(model.parameters())
    handle = first.register_post_accumulate_grad_hook(lambda _: clock.mark(Phase.REDUCE))
    try:
        yield
    finally:
        handle.remove()


def _rank_times(plan: RunPlan, ranks: Ranks, hooks: ProfileHooks, steps: int, peak: float) -> RankTimes:
    """Return the times of this rank. plan: with the run's own config."""
    config = plan.config
    windows = hooks.windows.times
    seconds, phases = windows[0][0], windows[-1][1]  # without waiting for the GPU, and with it
    report = phases.get(Phase.TRACKING, 0.0)
    commits_per_step = 1 / config.checkpoint.every_steps if config.checkpoint.every_steps is not None else 0.0
    per_step = {phase: phases.get(phase, 0.0) / steps for phase in Phase}
    per_step[Phase.COMMIT] = hooks.commit_seconds * commits_per_step
    per_step[Phase.TRACKING] = report / config.tracking.every_steps
    step_seconds = (seconds - report) / steps + per_step[Phase.COMMIT] + per_step[Phase.TRACKING]
    samples = plan.batch_split.per_rank
    cuda = ranks.device.type == "cuda"
    return RankTimes(
        rank=ranks.names[ranks.rank],
        device=torch.cuda.get_device_name(ranks.device) if cuda else f"CPU, threads per rank {torch.get_num_threads()}",
        phases=per_step,
        step_seconds=step_seconds,
        commit_seconds=hooks.commit_seconds,
        report_seconds=report,
        flops=flops.step_flops(config.model.name, config.model.sizes(), config.data.patch_pixels, samples),
        peak=peak,
        kernels=hooks.kernels.largest,
    )
