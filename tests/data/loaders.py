"""Tiny shards of real pixels, and loaders over them, as several test modules need them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mirl_dist.config import yaml_loader
from mirl_dist.data.building import demo_photos
from mirl_dist.data.building.build import build
from mirl_dist.data.building.recipe import Recipe
from mirl_dist.data.cache import ShardCache
from mirl_dist.data.loader import TrainLoader, passes_behind
from mirl_dist.data.manifest import Index, Manifest, Shard, read_index
from mirl_dist.data.prefetch import shards_ahead
from mirl_dist.data.sample import Batch, PatchReader, Pixels
from mirl_dist.data.sampler import GlobalSampler, Position, split_batch
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.data.shards import Shards
from mirl_dist.storage import Folder, Store, open_store
from mirl_dist.storage.retry import Patience

MIX: dict[str, float] = {"denoise_25": 1, "denoise_50": 1, "derain": 1}
HEIGHT, WIDTH, PATCH, GLOBAL = 72, 48, 16, 8
HASTY = Patience(seconds=20, first=0.02, most=0.2)


def turn(image: Pixels, index: int) -> Pixels:
    """One of the eight turns and flips: index // 2 quarter turns (0, 2: none and half), odd or high ones mirrored.

    0 identity, 2 up-down, 4 left-right, 6 half turn; 1, 3, 5, 7 the same after a quarter turn.
    """
    if index & 1:
        image = np.rot90(image)
    if index & 2:
        image = image[::-1]
    if index & 4:
        image = image[:, ::-1]
    return image


def quiet(done: int, total: int, what: str) -> None:
    pass


def recipe(tree: Mapping[str, Any], **more: Any) -> Recipe:
    return yaml_loader.build(Recipe, {**tree, **more}, "the test")


def made(tree: Mapping[str, Any], out: Path | Store, **more: Any) -> Manifest:
    """The shards of a recipe in a folder or another store."""
    return build(recipe(tree, **more), Folder(out) if isinstance(out, Path) else out, 1, quiet)


def shard(number: int, samples: int, **more: Any) -> Shard:
    """A shard of a manifest that lies nowhere."""
    digest = f"{number:064x}"
    known: dict[str, Any] = {"role": "train", "set": "x", "kind": "clean", "least_pixels": 64, "bytes": 1024}
    known |= {"sha256": digest, "index_sha256": digest} | more
    return Shard(name=f"train-{known['set']}-{number:05d}.tar", samples=samples, **known)


def indices(out: Path, manifest: Manifest) -> dict[str, Index]:
    return {s.name: read_index((out / s.index_name).read_bytes(), s, s.index_name) for s in manifest.shards}


def flip(path: Path, at: int | None = None) -> None:
    """One bit of a file: that of byte `at`, or of the one in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def photo(name: str) -> Pixels:
    return np.array(Image.open(demo_photos.locate(name)[0]).convert("RGB"))


def crops(folder: Path, name: str, at: int, count: int) -> Path:
    """A folder of real crops of a photograph in PNG files."""
    path = folder / name
    path.mkdir(parents=True)
    for number in range(count):
        x = 8 * number
        Image.fromarray(photo("chelsea")[at : at + HEIGHT, x : x + WIDTH]).save(path / f"{number}.png")
    return path


def built_at(folder: Path, at: int = 0, form: str = "ppm", counts: tuple[int, int] = (10, 6), mb: float = 0.03) -> Path:
    """Shards of real pixels: 10 images for noise in several tars, 6 pairs for rain in others."""
    clean, rainy = crops(folder, "clean", at, counts[0]), crops(folder, "rain", at + 100, counts[1])
    tree = {
        "name": "tiny",
        "least_pixels": 32,
        "train_format": form,
        "shard_megabytes": mb,
        "train": [
            {"set": "c", "kind": "clean", "clean": {"folder": str(clean)}},
            {"set": "r", "kind": "derain", "clean": {"folder": str(rainy)}, "make": "rain"},
        ],
        "evaluate": [{"set": "e", "kind": "clean", "photographs": ["coffee"], "centre_pixels": 32}],
    }
    made(tree, folder / "shards")
    return folder / "shards"


def pool_of(
    address: str | Path,
    *,
    damage: str = "refuse",
    cache: Path | None = None,
    said: list[str] | None = None,
    limit: int = 10**9,
) -> ShardPool:
    """A pool of the shards at an address; the lines it says go to `said`."""

    def say(line: str) -> None:
        print(line, file=sys.stderr)
        if said is not None:
            said.append(line)

    shard_cache = None if cache is None else ShardCache(cache, limit, patience=10)
    return ShardPool(Shards(open_store(str(address))), shard_cache, damage, say, patience=HASTY)


def loader_of(
    address: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    seed: int = 0,
    forward: int | None = None,
    mix: Any = MIX,
    augment: str = "published",
    global_batch: int = GLOBAL,
    pool: ShardPool | None = None,
    **more: Any,
) -> TrainLoader:
    """The loader of one rank; more: `pool_of`'s."""
    pool = pool or pool_of(address, **more)
    shards, split = pool.shards, split_batch(global_batch, forward, world)
    sampler = GlobalSampler(mix, shards.train, global_batch, seed)
    lanes = split.per_rank * len(sampler.sources)
    limit = None if pool.cache is None else pool.cache.limit
    return TrainLoader(
        pool,
        sampler,
        PatchReader(sampler.tasks, seed, PATCH, augment),
        workers=workers,
        rank=rank,
        split=split,
        ahead=shards_ahead(lanes, passes_behind(workers), sampler.steps_per_epoch, sampler.shards(), limit, world),
        pin=False,
    )


def batches(of: TrainLoader, epochs: int = 2, start: Position = Position(0, 0), round_: int = 0) -> list[Batch]:  # noqa: B008
    """Batches as a network gets them."""
    return [batch.to(torch.device("cpu")) for batch in of.batches(round_, start, epochs)]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys == b.keys
        and torch.equal(a.degraded, b.degraded)
        and torch.equal(a.clean, b.clean)
        and torch.equal(a.task, b.task)
        for a, b in zip(one, other, strict=True)
    )
