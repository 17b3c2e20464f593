"""Inspects all images of a recipe before building: which are usable, and what is wrong with the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mirl_dist.config.canonical_json import digest_of_json
from mirl_dist.data.building.discovery import ImageProblem, SourceImage, find_images, format_complaints, printable
from mirl_dist.data.building.recipe import Recipe
from mirl_dist.data.image_files import ImageInfo, examine
from mirl_dist.data.parallel import ProgressCallback, WorkerGroup, distributed_map
from mirl_dist.errors import UserError


@dataclass(frozen=True)
class Inspection:
    """What can be built: usable images, facts about their files, what is skipped and why, and the fingerprint."""

    images: tuple[SourceImage, ...]
    file_info: Mapping[Path, ImageInfo]
    skipped: tuple[str, ...]
    fingerprint: str


def inspect_images(recipe: Recipe, workers: int, progress: ProgressCallback, group: WorkerGroup) -> Inspection:
    """Find, pair, read and decode every image of a recipe. Rank 0 lists the files; all ranks share reading them.

    Raises UserError, on every rank, listing unusable images (with recipe.broken: stop), sets without a usable image, or
    images that are in both training and evaluation.
    """
    pictures, complaints = group.on_main(lambda: find_images(recipe))
    paths = sorted({file for picture in pictures for file in picture.files})
    examined = distributed_map(group, examine, paths, workers, progress, "checking images", 8)
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
        raise UserError(
            format_complaints(
                [c.full() for c in complaints],
                f"{len(complaints)} things in the images of recipe '{recipe.name}' are wrong:",
                "Put them right, or write broken: skip into the recipe to leave them out.",
            )
        )
    _check_empty_sets(recipe, usable, complaints)
    if not recipe.allow_overlap:
        _check_overlap(usable, file_info)
    skipped = tuple(c.portable() for c in complaints)
    return Inspection(tuple(usable), file_info, skipped, fingerprint(recipe, usable, file_info, skipped))


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
        raise UserError(
            format_complaints(
                [c.full() for c in complaints if c.label in empty],
                f"no usable image is left in: {', '.join(empty)}.",
                "Put these right, or take the set out of the recipe.",
            )
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
        raise UserError(
            format_complaints(
                both,
                f"{len(both)} images serve both training and evaluation:",
                "Leave them out on one side (exclude), or write allow_overlap: true if it is meant.",
            )
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
            row.append(hashlib.sha256(picture.disparity.read_bytes()).hexdigest())
        sources.append(row)
    return digest_of_json([recipe.content(), sources, skipped])
