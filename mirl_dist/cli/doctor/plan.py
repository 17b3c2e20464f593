"""The plan of a launch in numbers: batch split, steps, memory per rank, time per round."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mirl_dist.cli.doctor import memory
from mirl_dist.cli.doctor.machine import split_in_words, store_of
from mirl_dist.cli.doctor.memory import GIB, OVERHEAD, Budget, Gpu, Passes, Size
from mirl_dist.config.config import Config
from mirl_dist.config.schema_training import EvaluateSection
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, ranks_in_words, split_batch
from mirl_dist.data.shards import Shards
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.errors import UserError
from mirl_dist.training.checkpointing.checkpoint import Checkpoints

OpenedShards = tuple[Shards, GlobalSampler]


class LaunchPlan(NamedTuple):
    """What a config means under a launch file.

    split: None if the batch cannot be split. sampler: None without shards. states: bytes of weights, gradients, moments
    and masks per rank. passes: bytes of forward and backward passes. scoring: (bytes, height, width) of the largest
    image to score. rate: samples per second over all ranks, and where it was measured.
    """

    config: Config
    launch_file: LaunchFile
    split: BatchSplit | None
    sampler: GlobalSampler | None
    size: Size
    states: Budget
    passes: Passes
    scoring: tuple[int, int, int] | None
    gpu: Gpu | None
    rate: tuple[float, str] | None

    def bytes_without_pass(self) -> int:
        """Return the bytes on a rank's GPU outside of passes."""
        return self.states.total + OVERHEAD

    def needed_bytes(self) -> int | None:
        """Return the peak bytes on a rank's GPU, during a pass or while scoring; None if the batch cannot be split."""
        if self.split is None:
            return None
        scoring = self.scoring[0] if self.scoring else 0  # includes all weights: scoring gathers sharded ones
        return self.bytes_without_pass() + max(sum(self.passes.of(self.split.forward)), scoring)

    def largest_forward(self) -> int | None:
        """Return the largest batch.forward that fits the GPU, 0 if none does; None without GPU or split."""
        if self.gpu is None or self.split is None:
            return None
        return memory.largest_forward(self.passes, self.bytes_without_pass(), self.gpu.bytes, self.split.per_rank)


def make_plan(
    config: Config, launch_file: LaunchFile, opened: OpenedShards | None, gpu: str | None, rate: float | None
) -> LaunchPlan:
    """Compute the plan of a launch. Raises UserError for an unknown GPU.

    opened: None if the shards cannot be read. gpu: a name in memory.GPUS; None: this machine's GPU, if any.
    rate: samples per second over all ranks; None: as measured in the run's folder.
    """
    name, sizes = config.model.name, config.model.sizes()
    try:
        split = split_batch(config.batch.global_, config.batch.forward, launch_file.ranks)
    except UserError:
        split = None
    size = memory.size_of(name, sizes, config.prune.scope)
    states = memory.state_bytes(size, launch_file.engine, launch_file.ranks, offload=launch_file.offload)
    passes = memory.passes_of(name, sizes, config.data.patch_pixels, config.train.precision)
    shards, sampler = opened or (None, None)
    largest = _largest_image(config.evaluate, shards) if shards else None
    scoring = (memory.scoring_bytes(name, sizes, *largest), *largest) if largest else None
    measured = (rate, "--rate") if rate else _measured_rate(config, launch_file)
    chosen = None if gpu is None else memory.gpu_of(gpu)
    if chosen is None and config.train.device != "cpu" and hardware.gpus():
        chosen = Gpu(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory)
    return LaunchPlan(config, launch_file, split, sampler, size, states, passes, scoring, chosen, measured)


def _largest_image(section: EvaluateSection, shards: Shards) -> tuple[int, int] | None:
    """Return height and width of the largest image or tile to be scored; None if unknown."""
    tile, sets = section.tile_pixels, section.sets
    try:
        entries = [p.entry for name, ps in shards.places("evaluate").items() if not sets or name in sets for p in ps]
    except UserError:  # reported by check_shards
        return None
    sides = [(min(e.height, tile or e.height), min(e.width, tile or e.width)) for e in entries]
    return max(sides, key=lambda s: s[0] * s[1], default=None)


def _measured_rate(config: Config, launch_file: LaunchFile) -> tuple[float, str] | None:
    """Return the samples per second of the run in the config's folder, and where measured; None if unknown."""
    checkpoints = Checkpoints(store_of(config.store, config.run.folder))
    try:
        tickets = checkpoints.tickets()
        _, totals = checkpoints.latest_progress(checkpoints.commits())
    except UserError:  # reported by check_permissions
        return None
    if not totals.seconds or not totals.samples:
        return None
    world = tickets[-1].world if tickets else None
    on_ranks = "" if world in (None, launch_file.ranks) else f" on {ranks_in_words(world)}"
    return totals.samples / totals.seconds, f"measured in this run{on_ranks}"


# -- output -------------------------------------------------------------------------------------------------------


def plan_lines(plan: LaunchPlan) -> list[str]:
    """Format the plan as lines of text, at most 100 columns wide."""
    config, launch_file, split = plan.config, plan.launch_file, plan.split
    offload = ", offloaded to the host" if launch_file.offload else ""
    nodes = f"{launch_file.nodes} {'node' if launch_file.nodes == 1 else 'nodes'}"
    lines = [_line("engine", f"{launch_file.engine}{offload}: {nodes} x {ranks_in_words(launch_file.ranks_per_node)}")]
    if split is not None:
        words = split_in_words(launch_file.ranks, split, "forward pass")
        lines.append(_line("batch", f"{config.batch.global_} = {words}"))
    memory_bytes = _memory_rows(plan) | ({"on the host": plan.states.host} if plan.states.host else {})
    rows = [f"  {what:34}{size / 2**20:10,.1f}" for what, size in memory_bytes.items()]
    return [*lines, *_step_lines(plan), "", f"{'memory of a rank':36}{'MiB':>10}", *rows, "", *_gpu_lines(plan)]


def _line(what: str, text: str) -> str:
    return f"{what:12} {text}"


def _memory_rows(plan: LaunchPlan) -> dict[str, int]:
    rows, precision = dict(plan.states.gpu), plan.config.train.precision
    if plan.split is not None:
        saved, working = plan.passes.of(plan.split.forward)
        rows |= {f"activations of {plan.split.forward} samples, {precision}": saved, "at work in a pass": working}
    else:
        rows[f"activations of one sample, {precision}"] = plan.passes.of(1).saved
    rows["CUDA, NCCL, workspaces (assumed)"] = OVERHEAD
    return rows | {"in all": sum(rows.values())}


def _step_lines(plan: LaunchPlan) -> list[str]:
    if plan.sampler is None:
        return [_line("epoch", "unknown: the shards were not read")]
    steps, config = plan.sampler.steps_per_epoch, plan.config
    lines = [_line("epoch", f"{steps:,} steps, {steps * config.batch.global_:,} samples")]
    rounds = {"round 0": 0, "fine-tuning": 1} if config.is_finetuning(1) else {"a round": 0}
    for name, round_ in rounds.items():
        epochs = config.round_epochs(round_)
        lines.append(_line(name, f"{epochs} epochs, {epochs * steps:,} steps; {_duration(plan, epochs * steps)}"))
    return lines


def _duration(plan: LaunchPlan, steps: int) -> str:
    if plan.rate is None:
        return "time unknown: no measured rate; run a round, or give --rate"
    rate, source = plan.rate
    seconds = steps * plan.config.batch.global_ / rate
    if seconds < 60:
        time = f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    else:
        time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return f"{time} at {rate:.4g} samples/s ({source})"


def _gpu_lines(plan: LaunchPlan) -> list[str]:
    if plan.gpu is None:
        return [_line("GPU", f"none here; --gpu {'|'.join(memory.GPUS)} judges for one")]
    room, base = plan.gpu.bytes, plan.bytes_without_pass()
    text = f"{plan.gpu.name}, {room / GIB:.1f} GiB: "
    if plan.split is None:
        text += "unknown, for the ranks cannot share the batch"
    else:
        largest = plan.largest_forward()
        text += _fits(base + sum(plan.passes.of(plan.split.forward)), room)
        text += f"; largest batch.forward that fits: {largest}" if largest else "; no batch.forward fits"
    lines = [_line("GPU", text)]
    if plan.scoring is not None:
        size, height, width = plan.scoring
        text = f"{size / 2**20:,.0f} MiB more for an image of {height} x {width}: {_fits(base + size, room)}"
        lines.append(_line("scoring", text))
    return lines


def _fits(needed: int, room: int) -> str:
    return "fits" if needed <= room else "DOES NOT FIT"


def plan_as_dict(plan: LaunchPlan) -> dict[str, Any]:
    """Return the plan for JSON output: bytes, steps, samples, seconds."""
    launch_file, split, sampler = plan.launch_file, plan.split, plan.sampler
    batch, needed = plan.config.batch.global_, plan.needed_bytes()
    steps = None if sampler is None else sampler.steps_per_epoch * plan.config.round_epochs(0)
    return {
        "engine": launch_file.engine,
        "offload": launch_file.offload,
        "nodes": launch_file.nodes,
        "ranks": launch_file.ranks,
        "ranks_per_node": launch_file.ranks_per_node,
        "per_rank": split and split.per_rank,
        "passes": split and split.passes,
        "forward": split and split.forward,
        "steps_per_epoch": sampler and sampler.steps_per_epoch,
        "steps_per_round": steps,
        "samples_per_epoch": sampler and sampler.steps_per_epoch * batch,
        "seconds_per_round": plan.rate and steps and steps * batch / plan.rate[0],
        "bytes": _memory_rows(plan),
        "host_bytes": plan.states.host,
        "scoring_bytes": plan.scoring and plan.scoring[0],
        "gpu": plan.gpu and plan.gpu.name,
        "gpu_bytes": plan.gpu and plan.gpu.bytes,
        "fits": None if plan.gpu is None or needed is None else needed <= plan.gpu.bytes,
        "largest_forward": plan.largest_forward(),
    }
