"""How well the order shuffles, beside a full permutation and a plain WebDataset buffer, on the counts of MIR-L's data.

    python benchmarks/shuffle.py [--out docs/results/shuffle.csv] [--plot docs/shuffle.png]

No image is read: shards are counts alone. Columns: steps between one read of a source image and its next, at three
quantiles; different images in a window of 100 steps; and, each over the same of a full permutation: pairs of reads from
one shard inside a batch, such pairs inside a window, and the variance of a task's count in a batch (the worst task's).
"""

from __future__ import annotations

import argparse
import csv
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray

from mirl_dist.data.manifest import Kind, Shard
from mirl_dist.data.sampler import GlobalSampler, Position

MIX = {"denoise_15": 3.0, "denoise_25": 3.0, "denoise_50": 3.0, "derain": 120.0, "dehaze": 1.0}
FULL: dict[Kind, int] = {"clean": 5144, "derain": 200, "dehaze": 72135}
SUBSET: dict[Kind, int] = {"clean": 257, "derain": 20, "dehaze": 2164}
DATA = {"full sets": (FULL, 3), "MIR-L's shares": (SUBSET, 40)}  # counts, and epochs to look at
SIZES, BATCHES = (20, 60, 140, 500), (8, 32, 128)
WINDOW, BUFFER = 100, 1000
IDEAL, LANES, PLAIN = "full permutation", "order by lanes", f"WebDataset, buffer {BUFFER}"
QUANTILES = (0.01, 0.1, 0.5)


class Reads(NamedTuple):
    """What is read, in order: number of the source image, index of the task."""

    image: NDArray[np.int64]
    task: NDArray[np.int64]


class Quality(NamedTuple):
    """One row: distances in steps at three quantiles, images per window, and three figures over the ideal's."""

    data: str
    batch: int
    way: str
    shard: int
    distance_1: float
    distance_10: float
    distance_50: float
    images: float
    together_in_batch: float
    together_in_window: float
    balance: float


def shards_of(counts: dict[Kind, int], size: int) -> list[Shard]:
    """Shards of nearly equal counts, `size` at most."""
    made = []
    for kind, count in counts.items():
        parts = np.diff(np.linspace(0, count, -(-count // size) + 1).astype(int))
        for number, samples in enumerate(parts.tolist()):
            made.append(
                Shard(
                    name=f"train-{kind}-{number:05d}.tar",
                    role="train",
                    set=kind,
                    kind=kind,
                    samples=samples,
                    least_pixels=64,
                    bytes=0,
                    sha256="0" * 64,
                    index_sha256="0" * 64,
                )
            )
    return made


def firsts(shards: list[Shard]) -> NDArray[np.int64]:
    """Number of the first image of each shard."""
    return np.cumsum([0, *(s.samples for s in shards)])[:-1]


def by_lanes(shards: list[Shard], batch: int, epochs: int) -> Reads:
    order = GlobalSampler(MIX, shards, batch, seed=0)
    slots = [slot for at in order.positions(Position(0, 0), epochs) for slot in order.slots(0, at)]
    held = np.array([(slot.shard, slot.sample, slot.task) for slot in slots])
    return Reads(firsts(shards)[held[:, 0]] + held[:, 1], held[:, 2])


def listed(shards: list[Shard]) -> list[tuple[int, int]]:
    """Every shard as often as the mix says, with the task that it is then read for: as lists of files are repeated."""
    found = []
    for task, (word, repeats) in enumerate(MIX.items()):
        kind = "clean" if word.startswith("denoise") else word
        found += [(number, task) for number, s in enumerate(shards) if s.kind == kind] * int(repeats)
    return found


def permuted(shards: list[Shard], epochs: int) -> Reads:
    begins, rng = firsts(shards), np.random.default_rng(0)
    parts = [(begins[i] + np.arange(shards[i].samples), task) for i, task in listed(shards)]
    image = np.concatenate([p for p, _ in parts])
    task = np.concatenate([np.full(len(p), t) for p, t in parts])
    orders = [rng.permutation(len(image)) for _ in range(epochs)]
    return Reads(np.concatenate([image[p] for p in orders]), np.concatenate([task[p] for p in orders]))


def plain(shards: list[Shard], epochs: int) -> Reads:
    """Shards in random order, their samples through a shuffle buffer: WebDataset's own filter."""
    begins, rng = firsts(shards).tolist(), np.random.default_rng(0)
    entries = listed(shards)

    def samples() -> Iterator[tuple[int, int]]:
        for at in rng.permutation(len(entries)).tolist():
            shard, task = entries[at]
            for sample in range(shards[shard].samples):
                yield begins[shard] + sample, task

    held = np.array([read for _ in range(epochs) for read in webdataset.shuffle(BUFFER, seed=0)(samples())])
    return Reads(held[:, 0], held[:, 1])


def distances(reads: Reads, batch: int) -> NDArray[np.int64]:
    """Steps from each read of an image to the next read of the same image."""
    order = np.argsort(reads.image, kind="stable")
    image, step = reads.image[order], order // batch
    found: NDArray[np.int64] = np.diff(step)[image[1:] == image[:-1]]
    return found


def variances(reads: Reads, batch: int) -> NDArray[np.float64]:
    """Variance of each task's count in a batch."""
    whole = len(reads.task) // batch * batch
    per_batch = [np.sum(reads.task[:whole].reshape(-1, batch) == task, axis=1) for task in range(len(MIX))]
    found: NDArray[np.float64] = np.var(per_batch, axis=1)
    return found


def together(reads: Reads, shards: list[Shard], span: int) -> float:
    """Pairs of reads from one shard, but of different images, among every `span` reads: the mean."""
    shard = np.searchsorted(firsts(shards), reads.image, side="right") - 1
    starts = range(0, len(shard) - span + 1, span)
    both = [pairs(shard[i : i + span]) - pairs(reads.image[i : i + span]) for i in starts]
    return float(np.mean(both))


def pairs(numbers: NDArray[np.int64]) -> int:
    counts = np.unique(numbers, return_counts=True)[1]
    return int(np.sum(counts * (counts - 1)) // 2)


def quality(reads: Reads, ideal: Reads, shards: list[Shard], data: str, batch: int, way: str) -> Quality:
    span = WINDOW * batch
    windows = [reads.image[i : i + span] for i in range(0, len(reads.image) - span + 1, span)]
    images = float(np.mean([len(np.unique(w)) for w in windows]))
    near = [together(reads, shards, n) / together(ideal, shards, n) for n in (batch, span)]
    balance = float(np.max(variances(reads, batch) / variances(ideal, batch)))
    steps = np.quantile(distances(reads, batch), QUANTILES).tolist()
    return Quality(data, batch, way, 0, steps[0], steps[1], steps[2], images, near[0], near[1], balance)


def rows() -> Iterator[Quality]:
    for data, (counts, epochs) in DATA.items():
        shards = {size: shards_of(counts, size) for size in SIZES}
        ideal = permuted(shards[SIZES[0]], epochs)
        buffered = {size: plain(shards[size], epochs) for size in SIZES}
        for batch in BATCHES:
            yield quality(ideal, ideal, shards[SIZES[0]], data, batch, IDEAL)._replace(shard=0)
            for size in SIZES:
                lanes = by_lanes(shards[size], batch, epochs)
                yield quality(lanes, ideal, shards[size], data, batch, LANES)._replace(shard=size)
            for size in SIZES:
                yield quality(buffered[size], ideal, shards[size], data, batch, PLAIN)._replace(shard=size)


def table_costs() -> str:
    """Time and memory of one epoch's table."""
    said = []
    for data, (counts, _) in DATA.items():
        order = GlobalSampler(MIX, shards_of(counts, 140), 8, seed=0)
        seconds = []
        for epoch in range(7):
            began = time.process_time()
            order.slots(0, Position(epoch, 0))
            seconds.append(time.process_time() - began)
        fresh = GlobalSampler(MIX, shards_of(counts, 140), 8, seed=0)
        tracemalloc.start()
        fresh.slots(0, Position(0, 0))
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        said.append(
            f"{data}: {order.length:,} slots an epoch, table in {1e3 * np.median(seconds):.1f} ms, "
            f"{kept / 1e6:.2f} MB kept, {peak / 1e6:.2f} MB at the peak"
        )
    return "\n".join(said)


def draw(found: list[Quality], path: Path) -> None:
    """What clumps, over a full permutation, against the size of the shards: the full sets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "together_in_batch": "pairs from one shard in a batch",
        "together_in_window": f"pairs from one shard in {WINDOW} steps",
        "balance": "variance of a task's count in a batch",
    }
    figure, panels = plt.subplots(1, len(titles), figsize=(12, 3.8), layout="constrained")
    for panel, (field, title) in zip(panels, titles.items(), strict=True):
        for way, colour in ((LANES, "tab:blue"), (PLAIN, "tab:red")):
            for batch, mark in zip(BATCHES, "os^", strict=True):
                mine = [q for q in found if (q.data, q.way, q.batch) == ("full sets", way, batch)]
                heights = [getattr(q, field) for q in mine]
                label = f"{way}, batch {batch}"
                panel.plot([q.shard for q in mine], heights, color=colour, marker=mark, label=label)
        panel.axhline(1, color="black", linestyle="--", linewidth=1, label=IDEAL)
        panel.set(xscale="log", yscale="log", title=title, xlabel="samples in a shard")
        panel.set_xticks(SIZES, [str(size) for size in SIZES])
        panel.set_yticks((1, 2, 5, 10, 20), ["1", "2", "5", "10", "20"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("times that of a full permutation")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="CSV of the table")
    parser.add_argument("--plot", type=Path, help="PNG of what clumps")
    given = parser.parse_args()
    print(f"{'data':15}{'batch':>6}  {'way':24}{'shards':>7}{'1 %':>6}{'10 %':>6}{'50 %':>6}{'images':>8}", end="")
    print(f"{'in batch':>10}{'in window':>11}{'balance':>9}")
    found = []
    for q in rows():
        found.append(q)
        steps = "".join(f"{x:6.0f}" for x in (q.distance_1, q.distance_10, q.distance_50))
        print(f"{q.data:15}{q.batch:6}  {q.way:24}{str(q.shard or ''):>7}{steps}{q.images:8.0f}", end="")
        print(f"{q.together_in_batch:10.2f}{q.together_in_window:11.2f}{q.balance:9.2f}", flush=True)
    print(table_costs())
    if given.out is not None:
        with given.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Quality._fields)
            writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in q] for q in found)
    if given.plot is not None:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
