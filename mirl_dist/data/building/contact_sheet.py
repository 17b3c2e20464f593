"""Summaries of built shards: a table of the sets, and a contact sheet with samples of each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np

from mirl_dist.data import image_strip
from mirl_dist.data.degradations.degrade import Pixels
from mirl_dist.data.image_files import decode
from mirl_dist.data.manifest import CLEAN, DEGRADED, Index, Manifest, SampleEntry, Shard, StoredImage, read_index
from mirl_dist.storage import Store
from mirl_dist.storage.retry import DEFAULT_PATIENCE, to_stderr, with_retries

NAME = "contact_sheet.png"
SIDE, ACROSS = 160, 8  # pixels per side of a crop; crops per row


class SetSummary(NamedTuple):
    """One set: number of images or pairs, height and width of the smallest and the largest, bytes, and shards."""

    role: str
    set: str
    kind: str
    samples: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    bytes: int
    shards: int

    @property
    def title(self) -> str:
        what = "images" if self.kind == "clean" else "pairs, degraded | clean"
        return f"{self.role} {self.set}: {self.kind}, {self.samples:,} {what}"


def _group_by_set(manifest: Manifest) -> Iterator[list[Shard]]:
    """Group the shards of a manifest by set."""
    for _, shards in groupby(manifest.shards, key=lambda s: (s.role, s.set)):
        yield list(shards)


def _read_index(store: Store, shard: Shard) -> Index:
    return read_index(store.get(shard.index_name), shard, store.where(shard.index_name))


def summarize_sets(store: Store, manifest: Manifest) -> list[SetSummary]:
    """Summarize every set of a manifest, in its order. Raises UserError for an index that does not match."""
    return [_summarize_set(store, shards) for shards in _group_by_set(manifest)]


def _summarize_set(store: Store, shards: list[Shard]) -> SetSummary:
    sizes = {(e.height, e.width) for shard in shards for e in _read_index(store, shard).entries}
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    samples, bytes_ = sum(s.samples for s in shards), sum(s.bytes for s in shards)
    return SetSummary(
        shards[0].role, shards[0].set, shards[0].kind, samples, ordered[0], ordered[-1], bytes_, len(shards)
    )


def lines(store: Store, manifest: Manifest) -> list[str]:
    """Format a table of the sets, and a line with the address of the shards."""
    head = ("role", "set", "kind", "samples", "pixels (width x height)", "MB", "shards")
    cells = [head]
    for row in summarize_sets(store, manifest):
        small, large = (f"{width}x{height}" for height, width in (row.smallest, row.largest))
        pixels = small if small == large else f"{small} to {large}"
        cells.append(
            (row.role, row.set, row.kind, f"{row.samples:,}", pixels, f"{row.bytes / 1e6:.1f}", f"{row.shards}")
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    right = {3, 5, 6}  # right-aligned columns: numbers

    def text(line: tuple[str, ...]) -> str:
        placed = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        return "  ".join(placed).rstrip()

    size = sum(s.bytes for s in manifest.shards) / 1e6
    return [
        *map(text, cells),
        f"{len(manifest.shards)} shards, {size:.1f} MB, in {store.where()} (manifest {manifest.digest()[:12]}). "
        f"Look at {store.where(NAME)}.",
    ]


def draw_sheet(store: Store, manifest: Manifest) -> bytes:
    """Draw a PNG file with one row per set: centre crops of its first samples, in shard order."""
    rows = []
    for shards in _group_by_set(manifest):
        crops: list[Pixels] = []
        for shard, entry in _iterate_samples(store, shards):
            crops += [_crop_centre(store, shard, image) for image in map(entry.image, (DEGRADED, CLEAN)) if image]
            if len(crops) >= ACROSS:
                break
        rows.append(image_strip.Row(_summarize_set(store, shards).title, tuple(crops)))
    return image_strip.strip(rows)


def _iterate_samples(store: Store, shards: list[Shard]) -> Iterator[tuple[Shard, SampleEntry]]:
    for shard in shards:
        for entry in _read_index(store, shard).entries:
            yield shard, entry


def _crop_centre(store: Store, shard: Shard, stored: StoredImage) -> Pixels:
    """Read the centre of an image, uint8 (SIDE, SIDE, 3), padded with white if the image is smaller."""
    centre = image_strip.centre(decode(_read_member(store, shard, stored)), SIDE)
    height, width = centre.shape[:2]
    filled = np.full((SIDE, SIDE, 3), 255, np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    filled[top : top + height, left : left + width] = centre
    return filled


def _read_member(store: Store, shard: Shard, stored: StoredImage) -> bytes:
    """Read the bytes of one member, without reading the whole shard."""

    def read() -> bytes:
        data = bytearray()
        for block in store.read(shard.name, stored.offset):
            data += block
            if len(data) >= stored.size:
                break
        return bytes(data[: stored.size])

    return with_retries(read, f"reading {store.where(shard.name)}", DEFAULT_PATIENCE, to_stderr)
