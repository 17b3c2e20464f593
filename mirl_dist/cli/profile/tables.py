"""Shows the profile of training steps as tables for a terminal, or as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirl_dist import __version__
from mirl_dist.cli.profile.measure import KERNEL_STEPS, WARM_UP_STEPS, KernelTime, RankTimes
from mirl_dist.data.sampler import ranks_in_words
from mirl_dist.observability.progress import say
from mirl_dist.observability.step_times import Phase
from mirl_dist.training.preflight import RunPlan

_MOST_COLUMNS = 4
"""With more ranks the table shows the fastest, the median and the slowest rank of each phase."""
_OTHER = "other"
_NUMBERS_WIDTH = 36
"""Columns of the terminal for the borders and numbers of the table of kernels."""


def rows_of(times: RankTimes) -> dict[str, float]:
    """Return seconds per step by phase, with 'other' for what no phase covers."""
    rows = {phase.value: times.phases.get(phase, 0.0) for phase in Phase}
    return rows | {_OTHER: max(0.0, times.step_seconds - sum(rows.values()))}


def step_seconds(ranks: Sequence[RankTimes]) -> float:
    """Return the seconds of a step: those of the slowest rank, for which the others wait."""
    return max(times.step_seconds for times in ranks)


def print_profile(plan: RunPlan, engine: str, ranks: Sequence[RankTimes], steps: int) -> None:
    """Print the time per phase and rank, speed and share of the peak, and the largest kernels of rank 0."""
    config, seconds, console = plan.config, step_seconds(ranks), Console()
    console.print(_phase_table(ranks, "a training step: ms and share"))
    split = plan.batch_split
    say(
        f"{seconds:.4g} s per step, {config.batch.global_ / seconds:.4g} samples/s: {ranks_in_words(len(ranks))} x "
        f"{split.passes} x {split.forward} samples of {config.data.patch_pixels} pixels, {config.train.precision}, "
        f"{engine}, {ranks[0].device} ({steps} steps after {WARM_UP_STEPS})"
    )
    counted, peak = sum(times.flops for times in ranks), sum(times.peak for times in ranks)
    say(
        f"{counted / 1e9:.4g} GFLOP per step: {counted / seconds / 1e9:.4g} GFLOP/s, {counted / seconds / peak:.1%} of "
        f"the {peak / 1e9:.4g} that a matrix product reaches here"
    )
    every = config.checkpoint.every_steps
    say(
        f"commit: {ranks[0].commit_seconds:.3g} s for a snapshot, every "
        f"{'round' if every is None else f'{every:,} steps'}; tracking: {ranks[0].report_seconds:.3g} s, every "
        f"{config.tracking.every_steps} steps; both are spread over the steps"
    )
    if Phase.REDUCE not in _measured(ranks):
        say("reduce: " + ("none, as one rank trains alone" if len(ranks) == 1 else "part of backward with this engine"))
    title = f"largest kernels of rank 0, {KERNEL_STEPS} steps, own time"
    console.print(_kernel_table(ranks[0].kernels, title, console.width))


def _measured(ranks: Sequence[RankTimes]) -> set[Phase]:
    return {phase for times in ranks for phase, seconds in times.phases.items() if seconds > 0}


def _phase_table(ranks: Sequence[RankTimes], title: str) -> Table:
    table = Table(title=Text(title))
    table.add_column("phase")
    all_rows = [rows_of(times) for times in ranks]
    few = len(ranks) <= _MOST_COLUMNS
    for head in [f"rank {rank}" for rank in range(len(ranks))] if few else ["fastest", "median", "slowest"]:
        table.add_column(head, justify="right")
    total = step_seconds(ranks)
    for name in all_rows[0]:
        seconds = [rows[name] for rows in all_rows]
        shown = seconds if few else [min(seconds), statistics.median(seconds), max(seconds)]
        table.add_row(Text(name), *(f"{1000 * one:.1f} {one / total:6.1%}" for one in shown))
    return table


def _kernel_table(kernels: Sequence[KernelTime], title: str, width: int) -> Table:
    table = Table(title=Text(title))
    table.add_column("kernel", no_wrap=True, overflow="ellipsis", max_width=width - _NUMBERS_WIDTH)
    for head in ("calls", "ms", "share"):
        table.add_column(head, justify="right", no_wrap=True)
    for kernel in kernels:
        table.add_row(Text(kernel.name), f"{kernel.calls:g}", f"{1000 * kernel.seconds:.2f}", f"{kernel.share:.1%}")
    return table


def profile_as_json(plan: RunPlan, engine: str, ranks: Sequence[RankTimes], steps: int) -> bytes:
    """Return all measured values as JSON; seconds, operations and operations per second."""
    seconds, config = step_seconds(ranks), plan.config
    described = {
        "config": config.experiment_keys(),
        "batch": {"global": config.batch.global_} | plan.batch_split._asdict(),
        "precision": config.train.precision,
        "engine": engine,
        "world": len(ranks),
        "versions": {"mirl_dist": __version__, "torch": torch.__version__},
        "steps": steps,
        "step_seconds": seconds,
        "samples_per_second": config.batch.global_ / seconds,
        "peak_share": sum(times.flops for times in ranks) / seconds / sum(times.peak for times in ranks),
        "ranks": [
            times._asdict() | {"phases": rows_of(times), "kernels": [kernel._asdict() for kernel in times.kernels]}
            for times in ranks
        ],
    }
    return json.dumps(described, indent=1).encode() + b"\n"
