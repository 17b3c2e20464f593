"""Samples per second and core, and bytes read per sample: the published way, a plain WebDataset pipeline, and ours.

    python benchmarks/loader.py [--out docs/results/loader.csv] [--seconds 1.5] [--rounds 7] [--data FOLDER]
    python benchmarks/loader.py --formats        # what the choice of the member format rests on

All three make the same thing of the same real images (the folder that MIRL_DATA names; its README says what lies
there): batches of 8 float patches of 64 pixels. They take turns in one process, in alternating order; ratios are of
paired rounds. CPU time stands beside wall time, since other work on the machine stretches the latter.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import webdataset
from formats import main as measure_formats
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mirl_dist.data.building.build import build
from mirl_dist.data.building.planning import inspect_images
from mirl_dist.data.building.recipe import Recipe
from mirl_dist.data.building.recipe import read as read_recipe
from mirl_dist.data.loader import TrainLoader
from mirl_dist.data.parallel import SINGLE_PROCESS
from mirl_dist.data.sample import PatchReader
from mirl_dist.data.sampler import GlobalSampler, Position, split_batch
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.data.shards import Shards
from mirl_dist.storage import Folder

Pixels = NDArray[np.uint8]
RECIPE = Path(__file__).parents[1] / "shards" / "local_data.yaml"
BATCH, PATCH, SIGMA = 8, 64, 25
WARM = 30  # batches of each way before anything is counted: imports, page cache, shuffle buffers
KINDS = {"denoise_25": "clean", "derain": "derain", "dehaze": "dehaze"}
WORKLOADS = {
    "denoise_25": {"denoise_25": 9},
    "derain": {"derain": 48},
    "dehaze": {"dehaze": 75},
    "equal parts": {"denoise_25": 9, "derain": 48, "dehaze": 75},  # 3,600 of each: 400 x 9, 75 x 48, 48 x 75
}
PUBLISHED, PLAIN, OURS, PROCESS = "published", "webdataset", "ours", "ours, 1 process"


class Pair(NamedTuple):
    """Files of one sample; degraded is None for clean images, which get noise."""

    degraded: Path | None
    clean: Path


class Round(NamedTuple):
    """What one way did in one round: samples, seconds on the wall and of CPUs (with children), bytes read."""

    work: str
    way: str
    number: int
    samples: int
    wall: float
    cpu: float
    read: int


def whole(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def multiple_of_16(image: Pixels) -> Pixels:
    height, width = image.shape[0] // 16 * 16, image.shape[1] // 16 * 16
    y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[y : y + height, x : x + width]


def patch_of(clean: Pixels, degraded: Pixels | None) -> tuple[Tensor, Tensor]:
    """Crop, one of the seven turns and flips that change the image, noise where there is no degraded image, floats."""
    y, x = (np.random.randint(side - PATCH + 1) for side in clean.shape[:2])
    index = np.random.randint(1, 8)

    def part(image: Pixels) -> Pixels:
        turned = np.rot90(image[y : y + PATCH, x : x + PATCH], index % 4)
        return np.ascontiguousarray(turned[::-1] if index >= 4 else turned)

    kept = part(clean)
    if degraded is None:
        spoilt = np.clip(kept + SIGMA * np.random.randn(*kept.shape), 0, 255).astype(np.uint8)
    else:
        spoilt = part(degraded)
    return as_tensor(spoilt), as_tensor(kept)


def as_tensor(image: Pixels) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div(255)


class WholeFiles(Dataset[tuple[Tensor, Tensor]]):
    """The published way: every patch decodes the whole files that it is cut from."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        degraded = None if pair.degraded is None else multiple_of_16(whole(pair.degraded))
        return patch_of(multiple_of_16(whole(pair.clean)), degraded)


def published(pairs: dict[str, list[Pair]], mix: dict[str, int]) -> Iterator[Any]:
    """Batches from image files without end."""
    listed = [pair for task, repeats in mix.items() for pair in pairs[task] * repeats]
    loader = DataLoader(WholeFiles(listed), batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def plain_webdataset(folder: Path, mix: dict[str, int]) -> Iterator[Any]:
    """Batches from the same shards by WebDataset's own means, without end; the mix's tasks in turn."""

    def samples(task: str) -> Iterator[tuple[Tensor, Tensor]]:
        shards = [s for s in Shards(Folder(folder)).train if s.kind == KINDS[task]]
        urls = [str(folder / shard.name) for shard in shards]
        pipeline = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(100).decode("rgb8")
        while True:
            for sample in pipeline:
                yield patch_of(sample["clean.ppm"], sample.get("degraded.ppm"))

    turns = itertools.cycle([samples(task) for task in mix])
    while True:
        yield default_collate([next(next(turns)) for _ in range(BATCH)])


def ours(pool: ShardPool, mix: dict[str, int], workers: int) -> Iterator[Any]:
    """Batches of the package's loader, as a network on the CPU gets them."""
    shards, split = pool.shards, split_batch(BATCH, None, 1)
    sampler = GlobalSampler(mix, shards.train, BATCH, seed=0)
    patches = PatchReader(sampler.tasks, 0, PATCH, "published")
    loader = TrainLoader(pool, sampler, patches, workers=workers, rank=0, split=split, ahead=BATCH, pin=False)
    with closing(loader.batches(0, Position(0, 0), epochs=1000)) as batches:
        for batch in batches:
            yield batch.to(torch.device("cpu"))


def spent() -> tuple[float, float, int]:
    """Wall clock, CPU seconds, and bytes read through system calls up to now: this process and its loaders."""
    cpu, read = time.process_time(), _read_bytes("self")
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        read += _read_bytes(str(child.pid))
    return time.perf_counter(), cpu, read


def _read_bytes(process: str) -> int:
    return int(Path(f"/proc/{process}/io").read_text().split()[1])  # rchar: also what the page cache serves


def measured(work: str, way: str, number: int, batches: Iterator[Any], seconds: float) -> Round:
    wall, cpu, read = spent()
    count = 0
    while time.perf_counter() < wall + seconds:
        next(batches)
        count += BATCH
    after = spent()
    return Round(work, way, number, count, after[0] - wall, after[1] - cpu, after[2] - read)


def silent(done: int, total: int, what: str) -> None:
    pass


def compare(recipe: Recipe, data: str, folder: Path, rounds: int, seconds: float) -> list[Round]:
    """Rounds of every way on every workload."""
    files: dict[str, list[Pair]] = {task: [] for task in KINDS}
    for picture in inspect_images(recipe, 1, silent, SINGLE_PROCESS).images:
        task = next(task for task, kind in KINDS.items() if kind == picture.kind)
        files[task].append(Pair(picture.degraded, picture.clean))
    pool = ShardPool(Shards(Folder(folder)), None, "refuse", print)
    for shard in pool.shards.train:  # each is hashed once per process: not part of a sample's cost
        pool.acquire(shard)
        pool.get(shard)
        pool.release(shard)
    found = []
    for work, mix in WORKLOADS.items():
        ways: dict[str, Iterator[Any]] = {
            PUBLISHED: published(files, mix),
            PLAIN: plain_webdataset(folder, mix),
            OURS: ours(pool, mix, 0),
            PROCESS: ours(pool, mix, 1),
        }
        for batches in ways.values():
            for _ in range(WARM):
                next(batches)
        for number in range(rounds):
            names = list(ways) if number % 2 == 0 else list(reversed(ways))
            found += [measured(work, name, number, ways[name], seconds) for name in names]
        mapped = Path("/proc/self/maps").read_text()
        assert str(folder) not in mapped and data not in mapped, "rchar does not count what is mapped"
        for batches in ways.values():
            batches.close()  # type: ignore[attr-defined]
    pool.close()
    return found


def lines_of(found: list[Round]) -> Iterator[tuple[str, ...]]:
    """One line of the table for every workload and way."""
    yield "task", "way", "samples/s/core", "us CPU", "us wall", "kB read", f"{PUBLISHED} / this, CPU", "wall"
    for work in WORKLOADS:
        base = [r for r in found if (r.work, r.way) == (work, PUBLISHED)]
        for way in (PUBLISHED, PLAIN, OURS, PROCESS):
            mine = [r for r in found if (r.work, r.way) == (work, way)]
            cpu = statistics.median(1e6 * r.cpu / r.samples for r in mine)
            wall = statistics.median(1e6 * r.wall / r.samples for r in mine)
            read = statistics.median(r.read / r.samples / 1e3 for r in mine)
            cells = [f"{1e6 / cpu:.0f}", f"{cpu:.0f}", f"{wall:.0f}", f"{read:.0f}"]
            cells += [ratios(base, mine, of) for of in (lambda r: r.cpu / r.samples, lambda r: r.wall / r.samples)]
            yield work, way, *cells


def ratios(base: list[Round], mine: list[Round], of: Callable[[Round], float]) -> str:
    paired = sorted(of(b) / of(m) for b, m in zip(base, mine, strict=True))
    return f"{statistics.median(paired):.1f} ({paired[0]:.1f}-{paired[-1]:.1f})"


def conditions(rounds: int, seconds: float) -> str:
    versions = f"torch {torch.__version__}, numpy {np.__version__}, Pillow {PIL.__version__}"
    return (
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, 1 thread, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {versions}, webdataset {webdataset.__version__}; {rounds} interleaved "
        f"rounds of {seconds:g} s each, medians (lowest to highest ratio of paired rounds); all files in the page cache"
    )


def show(table: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells))


def write(found: list[Round], table: list[tuple[str, ...]], said: str, path: Path) -> None:
    """The rounds as CSV, and the table beside it as Markdown."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Round._fields)
        writer.writerows(found)
    marks = ["|" + " --- |" * 2 + " ---: |" * (len(table[0]) - 2)]
    rows = [f"| {' | '.join(line)} |" for line in table]
    path.with_suffix(".md").write_text("\n".join([said + ".", "", rows[0], *marks, *rows[1:]]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default=os.environ.get("MIRL_DATA"), help="folder of real images (MIRL_DATA)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of one way in one round")
    parser.add_argument("--out", type=Path, help="CSV of all rounds; the table goes beside it as .md")
    parser.add_argument("--formats", action="store_true", help="compare member formats instead")
    given = parser.parse_args()
    if not given.data:
        parser.error("no images: set MIRL_DATA or give --data")
    if given.formats:
        return measure_formats(Path(given.data), given.rounds, given.out)
    torch.set_num_threads(1)
    os.environ["MIRL_DATA"] = given.data
    recipe = read_recipe(RECIPE).model_copy(update={"evaluate": ()})
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        build(recipe, Folder(Path(folder)), 1, silent)
        found = compare(recipe, given.data, Path(folder), given.rounds, given.seconds)
    table, said = list(lines_of(found)), conditions(given.rounds, given.seconds)
    show(table)
    print(said)
    if given.out is not None:
        write(found, table, said, given.out)


if __name__ == "__main__":
    main()
