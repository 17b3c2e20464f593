"""Assigns samples to shards before encoding, from names and sizes only."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

from mirl_dist.data.building.discovery import SourceImage, printable
from mirl_dist.data.building.recipe import Recipe
from mirl_dist.data.image_files import Box, ImageInfo, centre_box
from mirl_dist.data.manifest import ImageFormat, ppm_header

PNG_SHARE = 0.6  # approximate PNG size of photographs, relative to raw bytes
BLOCK = 512  # bytes; in a tar, the header and the data of every member are padded to whole blocks


@dataclass(frozen=True)
class LayoutItem:
    """One sample to store.

    version: of a synthetic degradation. digests: of the files at inspection. box: the part to keep. form: the format.
    """

    key: str
    picture: SourceImage
    version: int
    digests: tuple[str, ...]
    box: Box
    form: ImageFormat


@dataclass(frozen=True)
class ShardPlan:
    """One tar to write: its name, the recipe's seed, and its samples in order."""

    name: str
    seed: int
    items: tuple[LayoutItem, ...]


def _sample_name(picture: SourceImage, version: int) -> str:
    """Return a name that is unique in the set; each version of a synthetic degradation is a separate sample."""
    return printable(picture.name) + (f"/{version}" if version else "")


def sample_key(picture: SourceImage, version: int = 0) -> str:
    """Return a sample's key: readable, without dots and slashes, and independent of the folder's location.

    It has at most 69 characters, so that `key.degraded.ppm` fits into the 100 of a plain tar header.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(printable(picture.name)).stem)[:24]
    digest = hashlib.sha256(_sample_name(picture, version).encode()).hexdigest()[:8]
    return f"{picture.role}-{picture.set}-{stem}-{digest}"


def _shuffle(items: Sequence[LayoutItem], seed: int) -> list[LayoutItem]:
    """Shuffle training samples by seed and name, so that every shard is a random sample of its set."""

    def sort_key(item: LayoutItem) -> bytes:
        name = _sample_name(item.picture, item.version)
        return hashlib.sha256(f"{seed}/order/{item.picture.set}/{name}".encode()).digest()

    return sorted(items, key=sort_key)


def _split_evenly(weights: Sequence[float], limit: float) -> list[list[int]]:
    """Split positions into consecutive, non-empty groups of nearly equal weight, of about `limit` at most."""
    total = sum(weights)
    count = math.ceil(total / limit)
    middles = [after - weight / 2 for weight, after in zip(weights, accumulate(weights), strict=True)]
    return [list(group) for _, group in groupby(range(len(weights)), key=lambda i: int(middles[i] / total * count))]


def _estimate_bytes(item: LayoutItem) -> float:
    """Estimate the size of a sample in a tar, in bytes; exact for PPM."""
    raw = len(ppm_header(item.box.height, item.box.width)) + 3 * item.box.height * item.box.width
    image = raw if item.form == "ppm" else int(PNG_SHARE * raw)
    images = 1 if item.picture.kind == "clean" else 2
    return images * (BLOCK + math.ceil(image / BLOCK) * BLOCK) + 2 * BLOCK


def plan_shards(
    recipe: Recipe, pictures: Sequence[SourceImage], file_info: Mapping[Path, ImageInfo]
) -> list[ShardPlan]:
    """Return the plans of all tars of a recipe. pictures: usable images, grouped by set. file_info: of their files."""
    centres = {e.set: e.centre_pixels for e in recipe.evaluate}
    plans = []
    for (role, name), group in groupby(pictures, key=lambda p: (p.role, p.set)):
        side = centres[name] if role == "evaluate" else None
        form: ImageFormat = recipe.train_format if role == "train" else "png"
        items = []
        for picture in group:
            size = file_info[picture.clean]
            digests, box = tuple(file_info[f].sha256 for f in picture.files), centre_box(size.height, size.width, side)
            items += [
                LayoutItem(sample_key(picture, v), picture, v, digests, box, form) for v in range(picture.versions)
            ]
        if role == "train":
            items = _shuffle(items, recipe.seed)
        for number, part in enumerate(
            _split_evenly([_estimate_bytes(i) for i in items], recipe.shard_megabytes * 2**20)
        ):
            part_items = tuple(items[position] for position in part)
            plans.append(ShardPlan(f"{role}-{name}-{number:05d}.tar", recipe.seed, part_items))
    return plans
