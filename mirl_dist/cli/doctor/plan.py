"""What a config means under a launch file, in numbers: shares, steps, memory per rank, time per round."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mirl_dist.cli.doctor import memory
from mirl_dist.cli.doctor.disks import store_of
from mirl_dist.cli.doctor.memory import GIB, OVERHEAD, Budget, Gpu, Passes, Size
from mirl_dist.config.config import Config
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, ranks_in_words, split_batch
from mirl_dist.data.shards import Shards
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.errors import UserError
from mirl_dist.training.checkpoint import Checkpoints

_UNKNOWN = "unknown: no measured rate; run a round, or give --rate"


class LaunchPlan(NamedTuple):
    """shares: None where the batch cannot be shared; order: None without shards; kept: of the run's states, on a rank;
    passes: of forward and backward; scoring: (bytes, height, width) of the largest image to score; rate: samples a
    second over all ranks, and where it was measured."""

    config: Config
    said: LaunchFile
    shares: BatchSplit | None
    order: GlobalSampler | None
    size: Size
    states: Budget
    passes: Passes
    scoring: tuple[int, int, int] | None
    gpu: Gpu | None
    rate: tuple[float, str] | None

    def taken(self) -> int:
        """Bytes on a rank's GPU without a pass."""
        return self.states.total + OVERHEAD

    def needed(self) -> int | None:
        """Bytes on a rank's GPU, with its pass or while it scores."""
        if self.shares is None:
            return None
        scoring = self.scoring[0] if self.scoring else 0  # the network is whole then, whatever the engine
        return self.taken() + max(sum(self.passes.of(self.shares.forward)), scoring)


def make(
    config: Config, said: LaunchFile, found: tuple[Shards, GlobalSampler] | None, gpu: str | None, rate: float | None
) -> LaunchPlan:
    """gpu: a name of budget.GPUS; None: the one found here, if any. rate: samples a second over all ranks; None: as the
    run's own folder knows. Raises UserError for an unknown GPU."""
    name, sizes = config.model.name, config.model.sizes()
    try:
        shares = split_batch(config.batch.global_, config.batch.forward, said.ranks)
    except UserError:
        shares = None
    size = memory.size_of(name, sizes, config.prune.scope)
    states = memory.share(size, said.engine, said.ranks, offload=said.offload)
    passes = memory.passes_of(name, sizes, config.data.patch_pixels, config.train.precision)
    largest = _largest(config, found[0]) if found else None
    scoring = (memory.scoring(name, sizes, *largest), *largest) if largest else None
    order = found[1] if found else None
    told = (rate, "--rate") if rate else _measured(config, said)
    return LaunchPlan(config, said, shares, order, size, states, passes, scoring, _gpu(config, gpu), told)


def _gpu(config: Config, name: str | None) -> Gpu | None:
    if name is not None:
        return memory.gpu_of(name)
    if config.train.device == "cpu" or not hardware.gpus():
        return None
    return Gpu(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory)


def _largest(config: Config, shards: Shards) -> tuple[int, int] | None:
    """Height and width of the largest image that is scored at once."""
    tile, sets = config.evaluate.tile_pixels, config.evaluate.sets
    try:
        found = [p.entry for name, ps in shards.places("evaluate").items() if not sets or name in sets for p in ps]
    except UserError:  # told where the shards are tried
        return None
    sides = [(min(e.height, tile or e.height), min(e.width, tile or e.width)) for e in found]
    return max(sides, key=lambda s: s[0] * s[1], default=None)


def _measured(config: Config, said: LaunchFile) -> tuple[float, str] | None:
    """The rate of the run in this config's folder."""
    checkpoints = Checkpoints(store_of(config, config.run.folder))
    try:
        tickets = checkpoints.tickets()
        _, stands = checkpoints.latest_progress(checkpoints.commits())
    except UserError:  # told where the folder is tried
        return None
    if not stands.seconds or not stands.samples:
        return None
    world = tickets[-1].world if tickets else None
    where = "measured in this run"
    if world is not None and world != said.ranks:
        where += f" on {ranks_in_words(world)}"
    return stands.samples / stands.seconds, where


# -- told ---------------------------------------------------------------------------------------------------------


def lines(plan: LaunchPlan) -> list[str]:
    """For people, in 100 columns."""
    config, said, shares = plan.config, plan.said, plan.shares
    nodes = "node" if said.nodes == 1 else "nodes"
    offload = ", offloaded to the host" if said.offload else ""
    told = [_line("engine", f"{said.engine}{offload}: {said.nodes} {nodes} x {ranks_in_words(said.ranks_per_node)}")]
    if shares is not None:
        passes = "forward pass" if shares.passes == 1 else "forward passes"
        share = f"{ranks_in_words(said.ranks)} x {shares.passes} {passes} x {shares.forward} samples"
        told.append(_line("batch", f"{config.batch.global_} = {share}"))
    told += _steps(plan)
    told += ["", f"{'memory of a rank':36}{'MiB':>10}"]
    told += [_row(name, bytes_) for name, bytes_ in _memory(plan).items()]
    if plan.states.host:
        told.append(_row("on the host", plan.states.host))
    told += ["", *_verdict(plan)]
    return told


def _line(what: str, text: str) -> str:
    return f"{what:12} {text}"


def _row(what: str, bytes_: int) -> str:
    return f"  {what:34}{bytes_ / 2**20:10,.1f}"


def _memory(plan: LaunchPlan) -> dict[str, int]:
    found = dict(plan.states.gpu)
    if plan.shares is not None:
        kept, working = plan.passes.of(plan.shares.forward)
        found[f"activations of {plan.shares.forward} samples, {plan.config.train.precision}"] = kept
        found["at work in a pass"] = working
    else:
        found[f"activations of one sample, {plan.config.train.precision}"] = plan.passes.of(1).kept
    found["CUDA, NCCL, workspaces (assumed)"] = OVERHEAD
    return found | {"in all": sum(found.values())}


def _steps(plan: LaunchPlan) -> list[str]:
    if plan.order is None:
        return [_line("epoch", "unknown: the shards were not read")]
    steps, config = plan.order.steps_per_epoch, plan.config
    text = f"{steps:,} steps, {steps * config.batch.global_:,} samples"
    told = [_line("epoch", text)]
    for round_ in (0, 1)[: 1 + config.is_finetuning(1)]:
        epochs = config.round_epochs(round_)
        name = "a round" if not config.is_finetuning(1) else ("round 0" if not round_ else "fine-tuning")
        told.append(_line(name, f"{epochs} epochs, {epochs * steps:,} steps; {_time(plan, epochs * steps)}"))
    return told


def _time(plan: LaunchPlan, steps: int) -> str:
    if plan.rate is None:
        return f"time {_UNKNOWN}"
    rate, where = plan.rate
    seconds = steps * plan.config.batch.global_ / rate
    if seconds < 60:
        time = f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    else:
        time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return f"{time} at {rate:.4g} samples/s ({where})"


def _verdict(plan: LaunchPlan) -> list[str]:
    if plan.gpu is None:
        return [_line("GPU", f"none here; --gpu {'|'.join(memory.GPUS)} judges for one")]
    told, where = [], f"{plan.gpu.name}, {plan.gpu.bytes / GIB:.1f} GiB"
    if plan.shares is None:
        told.append(_line("GPU", f"{where}: unknown, for the ranks cannot share the batch"))
    else:
        needs = plan.taken() + sum(plan.passes.of(plan.shares.forward))
        most = memory.fitting(plan.passes, plan.taken(), plan.gpu.bytes, plan.shares.per_rank)
        least = "no batch.forward fits" if not most else f"largest batch.forward that fits: {most}"
        told.append(_line("GPU", f"{where}: {_fits(needs, plan.gpu)}; {least}"))
    if plan.scoring is not None:
        bytes_, height, width = plan.scoring
        text = f"{bytes_ / 2**20:,.0f} MiB more for an image of {height} x {width}"
        told.append(_line("scoring", f"{text}: {_fits(plan.taken() + bytes_, plan.gpu)}"))
    return told


def _fits(needed: int, gpu: Gpu) -> str:
    return "fits" if needed <= gpu.bytes else "DOES NOT FIT"


def tree(plan: LaunchPlan) -> dict[str, Any]:
    """For programs: bytes, steps, samples, seconds."""
    said, shares, order = plan.said, plan.shares, plan.order
    most = None
    if plan.gpu is not None and shares is not None:
        most = memory.fitting(plan.passes, plan.taken(), plan.gpu.bytes, shares.per_rank)
    steps = None if order is None else order.steps_per_epoch * plan.config.round_epochs(0)
    needed = plan.needed()
    return {
        "engine": said.engine,
        "offload": said.offload,
        "nodes": said.nodes,
        "ranks": said.ranks,
        "ranks_per_node": said.ranks_per_node,
        "per_rank": shares and shares.per_rank,
        "passes": shares and shares.passes,
        "forward": shares and shares.forward,
        "steps_per_epoch": order and order.steps_per_epoch,
        "steps_per_round": steps,
        "samples_per_epoch": order and order.steps_per_epoch * plan.config.batch.global_,
        "seconds_per_round": plan.rate and steps and steps * plan.config.batch.global_ / plan.rate[0],
        "bytes": _memory(plan),
        "host_bytes": plan.states.host,
        "scoring_bytes": plan.scoring and plan.scoring[0],
        "gpu": plan.gpu and plan.gpu.name,
        "gpu_bytes": plan.gpu and plan.gpu.bytes,
        "fits": None if plan.gpu is None or needed is None else needed <= plan.gpu.bytes,
        "largest_forward": most,
    }
