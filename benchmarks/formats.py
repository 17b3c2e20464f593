"""What one patch costs out of images stored in several formats: time, bytes stored, bytes read, reachable crops.

    python benchmarks/loader.py --formats [--rounds 7] [--out docs/results/formats.csv]

Real images of three sets are encoded into one file for each format; every round cuts the same 64-pixel patches out of
all of them, one format after the other. A tile serves only crops that lie inside it, so tiles reach fewer of them.
"""

from __future__ import annotations

import csv
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirl_dist.data.manifest import ppm_header

Pixels = NDArray[np.uint8]
SETS = ("denoise/BSD400", "derain/Rain100L/input", "dehaze/SOTS-indoor/input")
IMAGES, PATCH, READS = 16, 64, 200  # images of each set; patches in a round


class Member(NamedTuple):
    """One stored image or tile: first byte and size in the file, height and width in pixels."""

    offset: int
    size: int
    height: int
    width: int


class Form(NamedTuple):
    """A way to store images: whole or in tiles of `tile` pixels, encoded by `encode`, a patch read by `patch`."""

    name: str
    tile: int | None
    encode: Callable[[Pixels], bytes]
    patch: Callable[[int, Member, int, int], Pixels]


class Stored(NamedTuple):
    """Images in one format: an open file, the members of each image, and the share of all crops that they reach."""

    handle: int
    members: list[list[Member]]
    bytes: float
    reach: float


def pillow(form: str, **options: int | bool) -> Callable[[Pixels], bytes]:
    def encode(image: Pixels) -> bytes:
        held = io.BytesIO()
        Image.fromarray(image).save(held, form, **options)
        return held.getvalue()

    return encode


def ppm(image: Pixels) -> bytes:
    return ppm_header(image.shape[0], image.shape[1]) + image.tobytes()


def npy(image: Pixels) -> bytes:
    held = io.BytesIO()
    np.save(held, image)
    return held.getvalue()


def rows(handle: int, member: Member, y: int, x: int) -> Pixels:
    """Only the rows of the patch are read."""
    stride = 3 * member.width
    header = member.size - stride * member.height
    band = os.pread(handle, PATCH * stride, member.offset + header + y * stride)
    return np.frombuffer(band, np.uint8).reshape(PATCH, member.width, 3)[:, x : x + PATCH]


def decoded(handle: int, member: Member, y: int, x: int) -> Pixels:
    with Image.open(io.BytesIO(os.pread(handle, member.size, member.offset))) as image:
        return np.array(image.convert("RGB"))[y : y + PATCH, x : x + PATCH]


def loaded(handle: int, member: Member, y: int, x: int) -> Pixels:
    image: Pixels = np.load(io.BytesIO(os.pread(handle, member.size, member.offset)))
    return image[y : y + PATCH, x : x + PATCH]


FORMS = (
    Form("PPM whole, rows read", None, ppm, rows),
    Form("npy whole, all read", None, npy, loaded),
    Form("PNG whole", None, pillow("PNG"), decoded),
    Form("WebP lossless whole", None, pillow("WEBP", lossless=True), decoded),
    Form("JPEG q95 whole (lossy)", None, pillow("JPEG", quality=95), decoded),
    Form("PNG tile 96", 96, pillow("PNG"), decoded),
    Form("PNG tile 128", 128, pillow("PNG"), decoded),
    Form("PNG tile 192", 192, pillow("PNG"), decoded),
    Form("WebP lossless tile 128", 128, pillow("WEBP", lossless=True), decoded),
    Form("PPM tile 96, rows read", 96, ppm, rows),
    Form("PPM tile 128, rows read", 128, ppm, rows),
    Form("PPM tile 192, rows read", 192, ppm, rows),
)


def starts(side: int, tile: int | None) -> list[int]:
    """Where tiles begin along one side: one beside the other, the last at the edge."""
    if tile is None or tile >= side:
        return [0]
    return [*range(0, side - tile, tile), side - tile]


def reached(side: int, tile: int | None) -> float:
    """The share of all patch positions along one side that lie inside a tile."""
    length = min(side, tile or side)
    inside = {s + i for s in starts(side, tile) for i in range(length - PATCH + 1)}
    return len(inside) / (side - PATCH + 1)


def store(form: Form, images: list[Pixels], path: Path) -> Stored:
    """All images in one file."""
    members: list[list[Member]] = []
    with path.open("wb") as file:
        for image in images:
            height, width = image.shape[:2]
            members.append([])
            for y in starts(height, form.tile):
                for x in starts(width, form.tile):
                    part = np.ascontiguousarray(image[y : y + (form.tile or height), x : x + (form.tile or width)])
                    data = form.encode(part)
                    members[-1].append(Member(file.tell(), len(data), *part.shape[:2]))
                    file.write(data)
        total = file.tell()
    reach = [reached(i.shape[0], form.tile) * reached(i.shape[1], form.tile) for i in images]
    return Stored(os.open(path, os.O_RDONLY), members, total / len(images), statistics.mean(reach))


def timed(form: Form, stored: Stored, seed: int) -> float:
    """CPU microseconds per patch."""
    rng = np.random.default_rng(seed)
    places = []
    for _ in range(READS):
        of_image = stored.members[int(rng.integers(len(stored.members)))]
        member = of_image[int(rng.integers(len(of_image)))]
        y, x = int(rng.integers(member.height - PATCH + 1)), int(rng.integers(member.width - PATCH + 1))
        places.append((member, y, x))
    began = time.process_time()
    for member, y, x in places:
        form.patch(stored.handle, member, y, x)
    return 1e6 * (time.process_time() - began) / READS


def read_per_patch(form: Form, stored: Stored) -> float:
    """Mean bytes that one patch reads."""
    of_image = [
        statistics.mean(PATCH * 3 * m.width if form.patch is rows else m.size for m in members)
        for members in stored.members
    ]
    return statistics.mean(of_image)


def photographs(data: Path) -> Iterator[Pixels]:
    for name in SETS:
        paths = sorted((data / "train" / name).iterdir())
        for path in paths[:: max(1, len(paths) // IMAGES)][:IMAGES]:
            with Image.open(path) as image:
                yield np.array(image.convert("RGB"))


def main(data: Path, rounds: int, out: Path | None) -> None:
    """Print the table; CSV to `out`."""
    images = list(photographs(data))
    with tempfile.TemporaryDirectory(prefix="formats-") as folder:
        stored = {form: store(form, images, Path(folder) / str(i)) for i, form in enumerate(FORMS)}
        times: dict[Form, list[float]] = {form: [] for form in FORMS}
        for number in range(rounds):
            for form in FORMS if number % 2 == 0 else reversed(FORMS):
                times[form].append(timed(form, stored[form], number))
        for held in stored.values():
            os.close(held.handle)
    table: list[tuple[str, ...]] = [
        ("format", "us CPU per patch", "kB stored per image", "kB read per patch", "crops reached, %")
    ]
    for form, held in stored.items():
        cells = (statistics.median(times[form]), held.bytes / 1e3, read_per_patch(form, held) / 1e3, 100 * held.reach)
        table.append((form.name, *(f"{cell:.0f}" for cell in cells)))
    for name, *rest in table:
        print(f"{name:26}" + "".join(f"{cell:>21}" for cell in rest))
    print(f"{len(images)} images, {PATCH}-pixel patches, {rounds} interleaved rounds of {READS}, medians")
    if out is not None:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows(table)
