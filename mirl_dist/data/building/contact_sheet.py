"""Summaries of built shards: a table of the sets, and a contact sheet with samples of each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice

import numpy as np

from mirl_dist.data import image_strip
from mirl_dist.data.degradations.degrade import Pixels
from mirl_dist.data.image_files import decode
from mirl_dist.data.manifest import CLEAN, DEGRADED, Manifest, Shard, StoredImage
from mirl_dist.data.shards import Shards
from mirl_dist.storage import Store
from mirl_dist.storage.retry import DEFAULT_PATIENCE, to_stderr, with_retries

NAME = "contact_sheet.png"
SIDE, ACROSS = 160, 8  # pixels per side of a crop; crops per row
_HEAD = ("role", "set", "kind", "samples", "pixels (width x height)", "MB", "shards")
_NUMBERS = (3, 5, 6)  # right-aligned columns


def _group_by_set(manifest: Manifest) -> Iterator[list[Shard]]:
    """Group the shards of a manifest by set, in its order."""
    for _, shards in groupby(manifest.shards, key=lambda s: (s.role, s.set)):
        yield list(shards)


def _title(shards: list[Shard]) -> str:
    first, what = shards[0], "images" if shards[0].kind == "clean" else "pairs, degraded | clean"
    return f"{first.role} {first.set}: {first.kind}, {sum(s.samples for s in shards):,} {what}"


def lines(store: Store, manifest: Manifest) -> list[str]:
    """Format a table of the sets, and a line with the address of the shards.

    Raises UserError for an index that does not match.
    """
    built = Shards(store, manifest.dump())
    rows = [_HEAD, *(_summarize_set(built, shards) for shards in _group_by_set(manifest))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def text(row: tuple[str, ...]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(c.rjust(width) if i in _NUMBERS else c.ljust(width) for i, (c, width) in cells).rstrip()

    size = sum(s.bytes for s in manifest.shards) / 1e6
    return [
        *map(text, rows),
        f"{len(manifest.shards)} shards, {size:.1f} MB, in {store.where()} (manifest {manifest.digest()[:12]}). "
        f"Look at {store.where(NAME)}.",
    ]


def _summarize_set(built: Shards, shards: list[Shard]) -> tuple[str, ...]:
    """Return the cells of one set's row."""
    sizes = {(e.height, e.width) for shard in shards for e in built.index(shard).entries}
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    small, large = (f"{width}x{height}" for height, width in (ordered[0], ordered[-1]))
    pixels = small if small == large else f"{small} to {large}"
    samples, megabytes = sum(s.samples for s in shards), sum(s.bytes for s in shards) / 1e6
    first = shards[0]
    return (first.role, first.set, first.kind, f"{samples:,}", pixels, f"{megabytes:.1f}", f"{len(shards)}")


def draw_sheet(store: Store, manifest: Manifest) -> bytes:
    """Draw a PNG file with one row per set: centre crops of its first samples, in shard order."""
    built = Shards(store, manifest.dump())
    sets = _group_by_set(manifest)
    return image_strip.strip([image_strip.Row(_title(s), tuple(islice(_read_crops(built, s), ACROSS))) for s in sets])


def _read_crops(built: Shards, shards: list[Shard]) -> Iterator[Pixels]:
    """Yield the centres of the images, uint8 (SIDE, SIDE, 3), padded with white if an image is smaller."""
    for shard in shards:
        for entry in built.index(shard).entries:
            for stored in map(entry.image, (DEGRADED, CLEAN)):
                if stored is not None:
                    centre = image_strip.centre(decode(_read_bytes(built.store, shard.name, stored)).pixels, SIDE)
                    spare = [(SIDE - side) for side in centre.shape[:2]]
                    margins = [(each // 2, each - each // 2) for each in spare]
                    yield np.pad(centre, (*margins, (0, 0)), constant_values=255)


def _read_bytes(store: Store, name: str, stored: StoredImage) -> bytes:
    """Read the bytes of one image, without reading the whole shard."""

    def read() -> bytes:
        data = bytearray()
        for block in store.read(name, stored.offset):
            data += block
            if len(data) >= stored.size:
                break
        return bytes(data[: stored.size])

    return with_retries(read, f"reading {store.where(name)}", DEFAULT_PATIENCE, to_stderr)
