"""What a cut and a round cost on many ranks: formulas, measured constants and named assumptions; see docs/scale.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PHASES = ("train", "reduce", "meet", "select", "score", "commit", "digest")
WORLDS = tuple(2**i for i in range(10))
BINS = 2048 + 1024 + 1024


def words(tensors: int, *, own: bool, layers: bool = False) -> int:
    """int64 that a rank gives to the gathers of one cut of that many tensors: a finite check and three counts per group
    of competing tensors; where ranks own parts also the sizes of all, before and after, and the ties of each group."""
    groups = tensors if layers else 1
    return groups * (1 + BINS) + (2 * 2 * tensors + tensors) * own


def received(ranks: int, given: int) -> int:
    """Bytes that each rank receives, and in a ring also sends, when all gather so many int64 of each."""
    return (ranks - 1) * given * 8


def reduced(ranks: int, given: int) -> int:
    """The same for a ring all-reduce."""
    return 2 * (ranks - 1) * given * 8 // ranks


class Constants(NamedTuple):
    """Seconds, bytes, bytes a second. Published or counted: weights to images; measured on a CPU: counting_seconds to
    upload_seconds; ASSUMED: all from samples_per_second on."""

    weights: float = 35_592_263
    samples: float = 120 * 859 * 8  # MIR-L: epochs, steps, batch
    batch: float = 8
    images: float = 3 * 68 + 3 * 100 + 100 + 500  # BSD68 and Urban100 at three sigmas, Rain100L, SOTS outdoor
    commit_every: float = 1000
    tensors: float = 548
    counting_seconds: float = 0.95  # three passes and the finite check over all weights, shared by the ranks
    masking_seconds: float = 0.33  # of replicas: on every rank, whatever their number
    digest_seconds: float = 0.37  # four digests of the weights, two of the masks
    metrics_seconds: float = 0.19  # PSNR and SSIM of a megapixel
    snapshot_seconds: float = 0.048  # training stands still, for each commit
    upload_seconds: float = 2.89  # of the round's ticket, which the ranks wait for
    samples_per_second: float = 50  # one GPU, patches of 64 pixels, forward and backward
    launches: float = 6_000  # of kernels in a step of any size: 5,000 counted for fp32, 6,600 to 8,800 for bf16
    launch_seconds: float = 7e-6  # 6 to 8 microseconds of the host for each, with autograd and Python
    megapixels: float = 400  # of all images that are scored
    forward_share: float = 1 / 3  # of a sample's work
    node_gpus: float = 8
    node_bandwidth: float = 12e9  # a rank's, in a ring within a node: PCIe 4.0
    network_bandwidth: float = 10e9  # a rank's, in a ring through all nodes: InfiniBand at 100 Gb/s
    latency: float = 5e-6  # of one hop of a ring
    hidden: float = 0.0  # an all-reduce hides behind this share of the training; DDP's behind up to 0.6


def bandwidth(c: Constants, ranks: int) -> float:
    return c.node_bandwidth if ranks <= c.node_gpus else c.network_bandwidth


def all_reduce(c: Constants, ranks: int) -> float:
    """Seconds of one ring all-reduce of the gradients."""
    return 2 * (ranks - 1) / ranks * 4 * c.weights / bandwidth(c, ranks) + 2 * (ranks - 1) * c.latency


def phases(c: Constants, ranks: int, batch: float) -> dict[str, float]:
    """Seconds of each phase of one round on that many ranks, with that global batch."""
    steps, hops = c.samples / batch, (ranks - 1) * c.latency
    each = math.ceil(c.images / ranks) / c.images * c.megapixels
    forward = c.forward_share / c.samples_per_second / 64**2 * 1e6
    counts = received(ranks, words(int(c.tensors), own=False)) / bandwidth(c, ranks) + 4 * hops
    step = max(batch / ranks / c.samples_per_second, c.launches * c.launch_seconds)
    commits = steps / c.commit_every * c.snapshot_seconds + c.upload_seconds
    return {
        "train": steps * step,
        "reduce": steps * max(0.0, all_reduce(c, ranks) - c.hidden * step),
        "meet": steps * hops,
        "select": c.counting_seconds / ranks + c.masking_seconds + counts,
        "score": each * (forward + c.metrics_seconds),
        "commit": commits,
        "digest": c.digest_seconds,
    }


def table(c: Constants, batch: float | None, worlds: Sequence[int] = WORLDS) -> list[str]:
    """Lines of Markdown: ranks, global batch, a step in milliseconds, phases in seconds, the round, how many times
    faster than on one GPU, and the share of the ideal. batch: None for the smallest that the ranks divide: the
    published one, then one each."""
    alone = sum(phases(c, 1, batch or c.batch).values())
    lines = [
        f"| W | B | step | {' | '.join(PHASES)} | round | faster | ideal |",
        "|---|---|---|" + "---|" * len(PHASES) + "---|---|---|",
    ]
    for ranks in worlds:
        of = max(c.batch, ranks) if batch is None else batch
        if of % ranks:
            lines.append(f"| {ranks} | {of:.0f} | refused: {ranks} does not divide it |")
            continue
        cost = phases(c, ranks, of)
        whole, steps = sum(cost.values()), c.samples / of
        step = 1e3 * sum(cost[p] for p in PHASES[:3]) / steps
        numbers = " | ".join(f"{cost[p]:,.0f}" if cost[p] >= 10 else f"{cost[p]:.2g}" for p in PHASES)
        gain = f"{alone / whole:.1f} | {alone / whole / ranks:.0%}"
        lines.append(f"| {ranks} | {of:.0f} | {step:.0f} | {numbers} | {clock(whole)} | {gain} |")
    return lines


def clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def plot(c: Constants, batches: Sequence[float | None], to: Path) -> None:
    """The share of each phase against the number of GPUs, a panel for each batch as in `table`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(batches), figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, batch in zip(panels, batches, strict=True):
        worlds = [w for w in WORLDS if batch is None or batch % w == 0]
        costs = [phases(c, w, max(c.batch, w) if batch is None else batch) for w in worlds]
        shares = [[100 * cost[p] / sum(cost.values()) for cost in costs] for p in PHASES]
        bottoms = [0.0] * len(worlds)
        for phase, share in zip(PHASES, shares, strict=True):
            panel.bar([str(w) for w in worlds], share, bottom=bottoms, label=phase)
            bottoms = [a + b for a, b in zip(bottoms, share, strict=True)]
        title = "global batch 8, then one sample each" if batch is None else f"global batch {batch:.0f}"
        panel.set(xlabel="GPUs", title=title)
    panels[0].set_ylabel("share of a round, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", reverse=True)
    figure.savefig(to, dpi=100)


__all__ = ["WORLDS", "Constants", "all_reduce", "phases", "plot", "received", "reduced", "table", "words"]
