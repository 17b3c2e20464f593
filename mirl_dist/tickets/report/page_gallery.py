"""The page's image gallery: the same images restored by each method's last ticket, side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mirl_dist.data import image_strip
from mirl_dist.errors import UserError
from mirl_dist.evaluation import metrics
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report.charts import last_rounds

MAX_ROWS, MAX_BYTES = 12, 2_500_000
"""Maximum number of image rows, and of bytes of all rows on the page."""


class Column(NamedTuple):
    """A column of the gallery: a ticket and its images, title -> (degraded, restored, clean)."""

    group: Group
    entry: Entry
    images: Mapping[str, tuple[image_strip.Pixels, ...]]


class ImageCell(NamedTuple):
    """One image of the gallery. source: pixels as a data URI. width, height: in pixels. text: PSNR, or a label."""

    source: str
    width: int
    height: int
    text: str


class Gallery(NamedTuple):
    """The gallery. rows: (title of a test image, its cells: degraded, restored by each column's ticket, None if the
    ticket lacks it, clean). remarks: what was left out, and the image format. full: whether MAX_BYTES cut off rows."""

    columns: list[Column]
    rows: list[tuple[str, list[ImageCell | None]]]
    remarks: list[str]
    full: bool


def gallery(groups: Sequence[Group]) -> Gallery:
    """Build a row per image: degraded, restored by each ticket, dense, clean. Uses JPEG if PNG exceeds MAX_BYTES."""
    columns, remarks = _choose_columns(groups)
    titles = _spread_over_tasks(dict.fromkeys(t for c in columns for t in c.images))
    kept = titles[:MAX_ROWS]
    if not kept:
        return Gallery(columns, [], remarks, False)
    if len(kept) < len(titles):
        remarks.append(f"{len(kept)} of {len(titles)} images are shown.")
    formats = {"image/png": "Pixels are exact (PNG).", "image/jpeg": "JPEG (quality 90), to keep the page small."}
    for media_type in formats:
        rows = [(title, _image_cells(columns, title, media_type)) for title in kept]
        total = list(accumulate(sum(len(cell.source) for cell in cells if cell) for _, cells in rows))
        if total[-1] <= MAX_BYTES:
            break
    fitting = max(1, sum(size <= MAX_BYTES for size in total))
    return Gallery(columns, rows[:fitting], [*remarks, formats[media_type]], fitting < len(rows))


def _choose_columns(groups: Sequence[Group]) -> tuple[list[Column], list[str]]:
    """Choose one ticket per method, of the lowest seed with readable images, dense last; return errors as remarks."""
    columns, remarks = [], []
    for group in last_rounds(groups):
        for entry in sorted(group.entries, key=lambda s: s.seed):
            if entry.strip is None:
                continue
            try:
                rows = image_strip.rows(entry.strip, f"pictures of {entry.name}")
            except UserError as fault:
                remarks.append(str(fault))
                continue
            columns.append(Column(group, entry, {r.title: r.images for r in rows if len(r.images) == 3}))
            break
    return sorted(columns, key=lambda c: c.entry.dense), remarks


def _spread_over_tasks(titles: Iterable[str]) -> list[str]:
    """Order titles round-robin over tasks and sets: first images, then second ones, and so on."""
    tasks: dict[str, list[str]] = {}
    for title in titles:
        tasks.setdefault(title.partition(" ")[0], []).append(title)
    return [t for turn in zip_longest(*tasks.values()) for t in turn if t is not None]


def _image_cells(columns: Sequence[Column], title: str, media_type: str) -> list[ImageCell | None]:
    degraded, _, clean = next(c.images[title] for c in reversed(columns) if title in c.images)
    cells: list[ImageCell | None] = [_image_cell(degraded, media_type, _describe_quality(degraded, clean))]
    for column in columns:
        images = column.images.get(title)
        if images is None:
            cells.append(None)
            continue
        same = np.array_equal(images[0], degraded) and np.array_equal(images[2], clean)
        text = _describe_quality(images[1], clean) + ("" if same else " (another input)")
        cells.append(_image_cell(images[1], media_type, text))
    return [*cells, _image_cell(clean, media_type, "clean")]


def _describe_quality(image: image_strip.Pixels, clean: image_strip.Pixels) -> str:
    return f"{metrics.psnr(image, clean, peak=255):.2f} dB" if image.shape == clean.shape else "another size"


def _image_cell(image: image_strip.Pixels, media_type: str, text: str) -> ImageCell:
    data = io.BytesIO()
    options: dict[str, Any] = {"optimize": True} if media_type == "image/png" else {"quality": 90, "subsampling": 0}
    Image.fromarray(image).save(data, media_type.removeprefix("image/"), **options)
    height, width = image.shape[:2]
    return ImageCell(data_uri(data.getvalue(), media_type), width, height, text)


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
