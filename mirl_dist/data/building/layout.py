"""Assigns samples to shards before any pixel is encoded: arithmetic on names and sizes."""

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
from mirl_dist.data.image_files import ImageInfo
from mirl_dist.data.manifest import ImageFormat, ppm_header

PNG_SHARE = 0.6  # of the raw bytes: about what PNG leaves of photographs
BLOCK = 512  # of a tar: every member takes a header and its data, each filled up to whole blocks


@dataclass(frozen=True)
class CentreBox:
    """A part of an image, in pixels: top and left corner, height and width."""

    y: int
    x: int
    height: int
    width: int


@dataclass(frozen=True)
class LayoutItem:
    """One sample to store: its key, its picture, which version of a made degradation, the digests the files had when
    checked, the part to keep, and how."""

    key: str
    picture: SourceImage
    version: int
    digests: tuple[str, ...]
    box: CentreBox
    form: ImageFormat


@dataclass(frozen=True)
class ShardPlan:
    """One tar to write, with its samples in order."""

    name: str
    seed: int
    items: tuple[LayoutItem, ...]


def centre_box(height: int, width: int, side: int | None) -> CentreBox:
    """The centre of an image, at most `side` pixels high and wide; the whole image for None."""
    h, w = (height, width) if side is None else (min(height, side), min(width, side))
    return CentreBox((height - h) // 2, (width - w) // 2, h, w)


def _sample_name(picture: SourceImage, version: int) -> str:
    """Name a sample among those of its set; further versions of a made degradation are further samples."""
    return printable(picture.name) + (f"/{version}" if version else "")


def sample_key(picture: SourceImage, version: int = 0) -> str:
    """Make a sample's key: readable, without dots and slashes, the same for the same file wherever it lies.

    At most 69 characters, so that `key.degraded.ppm` fits the 100 of a plain tar header.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(printable(picture.name)).stem)[:24]
    digest = hashlib.sha256(_sample_name(picture, version).encode()).hexdigest()[:8]
    return f"{picture.role}-{picture.set}-{stem}-{digest}"


def _shuffle(items: Sequence[LayoutItem], seed: int) -> list[LayoutItem]:
    """Shuffle training samples into an order drawn from seed and names, so that every shard is a sample of its set."""

    def sort_key(item: LayoutItem) -> bytes:
        name = _sample_name(item.picture, item.version)
        return hashlib.sha256(f"{seed}/order/{item.picture.set}/{name}".encode()).digest()

    return sorted(items, key=sort_key)


def _split_evenly(weights: Sequence[float], limit: float) -> list[list[int]]:
    """Split positions into consecutive groups of nearly equal weight, none empty, of about `limit` at most."""
    total = sum(weights)
    count = math.ceil(total / limit)
    middles = [after - weight / 2 for weight, after in zip(weights, accumulate(weights), strict=True)]
    return [list(group) for _, group in groupby(range(len(weights)), key=lambda i: int(middles[i] / total * count))]


def _estimate_bytes(item: LayoutItem) -> float:
    """Estimate the bytes of a sample in a tar; exact for PPM."""
    raw = len(ppm_header(item.box.height, item.box.width)) + 3 * item.box.height * item.box.width
    image = raw if item.form == "ppm" else int(PNG_SHARE * raw)
    images = 1 if item.picture.kind == "clean" else 2
    return images * (BLOCK + math.ceil(image / BLOCK) * BLOCK) + 2 * BLOCK


def plan_shards(
    recipe: Recipe, pictures: Sequence[SourceImage], file_info: Mapping[Path, ImageInfo]
) -> list[ShardPlan]:
    """Plan the tars of a recipe. pictures: those to use, grouped by set; file_info: of their files."""
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
