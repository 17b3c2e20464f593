"""Which sample goes into which shard, decided before any pixel is encoded: arithmetic on names and sizes."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

from mirl_dist.data.pairing import Picture, printable
from mirl_dist.data.recipe import Recipe
from mirl_dist.data.source_image import Examined

PNG_SHARE = 0.6  # of the raw bytes: about what PNG leaves of photographs


@dataclass(frozen=True)
class Box:
    """A part of an image, in pixels: top and left corner, height and width."""

    y: int
    x: int
    height: int
    width: int


@dataclass(frozen=True)
class Cut:
    """One picture, the digests its files had when they were checked, and the boxes to store of it, by key."""

    picture: Picture
    digests: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...]


@dataclass(frozen=True)
class ShardPlan:
    """One tar to write, with its samples in order."""

    name: str
    seed: int
    cuts: tuple[Cut, ...]


def starts(side: int, tile: int) -> list[int]:
    """Where tiles begin along a side: every `tile` pixels, and the last flush with the border."""
    begins = list(range(0, side - tile + 1, tile))
    return begins if begins[-1] + tile == side else [*begins, side - tile]


def tiles(height: int, width: int, tile: int) -> list[Box]:
    """Square tiles that cover an image whose sides are at least `tile`."""
    return [Box(y, x, tile, tile) for y in starts(height, tile) for x in starts(width, tile)]


def centre(height: int, width: int, side: int | None) -> Box:
    """The centre of an image, at most `side` pixels high and wide; the whole image for None."""
    h, w = (height, width) if side is None else (min(height, side), min(width, side))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def key(picture: Picture, box: Box, whole: bool) -> str:
    """A sample's name: readable, without dots and slashes, the same for the same file wherever it lies.

    Below 90 characters, so that `key.degraded.png` fits the 100 of a plain tar header.
    """
    name = printable(picture.name)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem)[:24]
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    place = "" if whole else f"-y{box.y:05d}-x{box.x:05d}"
    return f"{picture.role}-{picture.set}-{stem}-{digest}{place}"


def _shuffled(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    """Training pictures in an order drawn from seed and names, so that every shard is a sample of its set."""

    def lot(picture: Picture) -> bytes:
        return hashlib.sha256(f"{seed}/order/{picture.set}/{printable(picture.name)}".encode()).digest()

    return sorted(pictures, key=lot)


def _share_out(weights: Sequence[int], limit: float) -> list[list[int]]:
    """Positions in consecutive groups of nearly equal weight, none empty, of about `limit` at most."""
    total = sum(weights)
    count = math.ceil(total / limit)
    middles = [after - weight / 2 for weight, after in zip(weights, accumulate(weights), strict=True)]
    return [list(group) for _, group in groupby(range(len(weights)), key=lambda i: int(middles[i] / total * count))]


def shards(recipe: Recipe, pictures: Sequence[Picture], seen: Mapping[Path, Examined]) -> list[ShardPlan]:
    """The tars of a recipe. pictures: those to use, grouped by set; seen: what checking their files found."""
    centres = {e.set: e.centre_pixels for e in recipe.evaluate}
    plans = []
    for (role, name), group in groupby(pictures, key=lambda p: (p.role, p.set)):
        members = list(group)
        cuts = []
        for picture in _shuffled(members, recipe.seed) if role == "train" else members:
            size = seen[picture.clean]
            if role == "train":
                boxes = tiles(size.height, size.width, recipe.tile_pixels)
            else:
                boxes = [centre(size.height, size.width, centres[name])]
            named = tuple((key(picture, box, whole=role == "evaluate"), box) for box in boxes)
            cuts.append(Cut(picture, tuple(seen[f].sha256 for f in picture.files), named))
        images = 1 if members[0].kind == "denoise" else 2
        weights = [images * sum(3 * box.height * box.width for _, box in cut.boxes) for cut in cuts]
        for number, part in enumerate(_share_out(weights, recipe.shard_megabytes * 2**20 / PNG_SHARE)):
            held = tuple(cuts[position] for position in part)
            plans.append(ShardPlan(f"{role}-{name}-{number:05d}.tar", recipe.seed, held))
    return plans
