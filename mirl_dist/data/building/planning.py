"""Plans a build: which images of a recipe are usable, what is wrong with the others, and which shard stores which."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, groupby
from pathlib import Path

from mirl_dist.config.canonical_json import digest_of_json
from mirl_dist.data.building.discovery import ImageProblem, SourceImage, error_of, find_images, find_unused, printable
from mirl_dist.data.building.recipe import Recipe
from mirl_dist.data.image_files import Box, ImageInfo, centre_box, examine
from mirl_dist.data.manifest import ImageFormat, ppm_header
from mirl_dist.data.parallel import ProgressCallback, WorkerGroup, distributed_map

PNG_SHARE = 0.6  # approximate PNG size of photographs, relative to raw bytes
BLOCK = 512  # bytes; in a tar, the header and the data of every member are padded to whole blocks


@dataclass(frozen=True)
class Inspection:
    """What can be built: usable images, facts about their files, what is skipped and why, and the fingerprint.

    remarks: lines for the user about conversions, files that are not used, and suspicious pairs.
    """

    images: tuple[SourceImage, ...]
    file_info: Mapping[Path, ImageInfo]
    skipped: tuple[str, ...]
    fingerprint: str
    remarks: tuple[str, ...]


def inspect_images(recipe: Recipe, workers: int, progress: ProgressCallback, group: WorkerGroup) -> Inspection:
    """Find, pair, read and decode every image of a recipe. Rank 0 lists the files; all ranks share reading them.

    Raises UserError, on every rank, listing unusable images (with recipe.broken: stop), sets without a usable image, or
    images that are in both training and evaluation.
    """
    pictures, complaints = group.on_main(lambda: find_images(recipe))
    paths = sorted({file for picture in pictures for file in picture.files})
    examined = distributed_map(group, examine, paths, workers, progress, "checking images")
    file_info = dict(zip(paths, examined, strict=True))
    return group.on_main(lambda: _select_usable(recipe, pictures, complaints, file_info))


def _select_usable(
    recipe: Recipe, pictures: Iterable[SourceImage], complaints: list[ImageProblem], file_info: Mapping[Path, ImageInfo]
) -> Inspection:
    usable = []
    for picture in pictures:
        problems = _find_problems(picture, file_info, recipe.least_pixels)
        complaints += problems
        if not problems:
            usable.append(picture)
    if complaints and recipe.broken == "stop":
        raise error_of(
            [c.full() for c in complaints],
            f"{len(complaints)} things in the images of recipe '{recipe.name}' are wrong:",
            "Put them right, or write broken: skip into the recipe to leave them out.",
        )
    _check_empty_sets(recipe, usable, complaints)
    if not recipe.allow_overlap:
        _check_overlap(usable, file_info)
    skipped = tuple(c.portable() for c in complaints)
    remarks = (*_remarks(usable, file_info), *find_unused(recipe, file_info.keys()))
    return Inspection(tuple(usable), file_info, skipped, fingerprint(recipe, usable, file_info, skipped), remarks)


def _remarks(pictures: Iterable[SourceImage], file_info: Mapping[Path, ImageInfo]) -> Iterator[str]:
    """Yield what was done to images of each set on decoding, and pairs of which both sides are the same pixels."""
    counts: Counter[str] = Counter()
    for picture in pictures:
        counts.update(f"{picture.label}: {note}" for file in picture.files for note in file_info[file].notes)
        if len({file_info[file].pixels_sha256 for file in picture.files}) < len(picture.files):
            counts[f"{picture.label}: degraded image equal to its clean partner"] += 1
    for text, count in sorted(counts.items()):
        yield f"{text} (images: {count:,})"


def _find_problems(picture: SourceImage, file_info: Mapping[Path, ImageInfo], least: int) -> list[ImageProblem]:
    """Return why an image or pair cannot be used; empty if it can."""

    def complaint(file: Path, problem: str) -> ImageProblem:
        name = printable(picture.name)
        if file != picture.files[-1]:
            name += f" (its clean partner {printable(file.name)})"
        return ImageProblem(picture.label, name, printable(file), problem)

    problems = [complaint(f, problem) for f in picture.files if (problem := file_info[f].problem) is not None]
    if problems:
        return problems
    clean = file_info[picture.clean]
    size = f"{clean.width}x{clean.height}"
    if picture.degraded is not None:
        other = file_info[picture.degraded]
        if (clean.height, clean.width) != (other.height, other.width):
            problem = f"is {other.width}x{other.height}, its clean partner {printable(picture.clean.name)} {size}"
            problems.append(complaint(picture.degraded, problem))
    if picture.role == "train" and min(clean.height, clean.width) < least:
        problems.append(complaint(picture.files[-1], f"is {size}, its shorter side below least_pixels, {least}"))
    return problems


def _check_empty_sets(recipe: Recipe, pictures: Iterable[SourceImage], complaints: list[ImageProblem]) -> None:
    filled = {picture.label for picture in pictures}
    empty = [f"{role} {one.set}" for role, one in recipe.sets() if f"{role} {one.set}" not in filled]
    if empty:
        raise error_of(
            [c.full() for c in complaints if c.label in empty],
            f"no usable image is left in: {', '.join(empty)}.",
            "Put these right, or take the set out of the recipe.",
        )


def _check_overlap(pictures: Iterable[SourceImage], file_info: Mapping[Path, ImageInfo]) -> None:
    """Raise UserError if images with equal pixels are in both training and evaluation: scores would be invalid."""
    trained: dict[str, Path] = {}
    scored: dict[str, Path] = {}
    for picture in pictures:
        for file in picture.files:
            (trained if picture.role == "train" else scored).setdefault(file_info[file].pixels_sha256, file)
    digests = sorted(trained.keys() & scored.keys(), key=lambda digest: trained[digest])
    both = [f"{printable(trained[digest])} = {printable(scored[digest])}" for digest in digests]
    if both:
        raise error_of(
            both,
            f"{len(both)} images serve both training and evaluation:",
            "Leave them out on one side (exclude), or write allow_overlap: true if it is meant.",
        )


def fingerprint(
    recipe: Recipe, pictures: Iterable[SourceImage], file_info: Mapping[Path, ImageInfo], skipped: tuple[str, ...]
) -> str:
    """Return the hex SHA-256 of the recipe (without locations), the skipped images, and all file names and digests."""
    sources = []
    for picture in pictures:
        row = [picture.label, printable(picture.name)]
        row += [f"{printable(f.name)} {file_info[f].sha256}" for f in picture.files]
        if picture.disparity is not None:
            row.append(sha256(picture.disparity.read_bytes()).hexdigest())
        sources.append(row)
    return digest_of_json([recipe.content(), sources, skipped])


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
    digest = sha256(_sample_name(picture, version).encode()).hexdigest()[:8]
    return f"{picture.role}-{picture.set}-{stem}-{digest}"


def _split_evenly(items: Sequence[LayoutItem], limit: float) -> Iterator[tuple[LayoutItem, ...]]:
    """Split items into consecutive, non-empty groups of nearly equal size, of about `limit` bytes at most."""
    weights = [_estimate_bytes(item) for item in items]
    total = sum(weights)
    count = math.ceil(total / limit)
    middles = [after - weight / 2 for weight, after in zip(weights, accumulate(weights), strict=True)]
    for _, group in groupby(range(len(items)), key=lambda i: int(middles[i] / total * count)):
        yield tuple(items[i] for i in group)


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
        if role == "train":  # shuffled by seed and name, so that every shard is a random sample of its set
            order = f"{recipe.seed}/order/{name}"
            items.sort(key=lambda item: sha256(f"{order}/{_sample_name(item.picture, item.version)}".encode()).digest())
        for number, part in enumerate(_split_evenly(items, recipe.shard_megabytes * 2**20)):
            plans.append(ShardPlan(f"{role}-{name}-{number:05d}.tar", recipe.seed, part))
    return plans
