"""The page's image gallery: the same images restored by each method's last ticket, side by side."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from PIL import Image

from mirl_dist.data import image_strip
from mirl_dist.errors import UserError
from mirl_dist.evaluation import metrics
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report.charts import last_rounds
from mirl_dist.tickets.report.page_figures import data_uri

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


class ImageRow(NamedTuple):
    """One test image: degraded, restored by each column's ticket (None if the ticket lacks it), clean."""

    title: str
    images: list[ImageCell | None]

    @property
    def size(self) -> int:
        return sum(len(image.source) for image in self.images if image)


class Gallery(NamedTuple):
    """The gallery. remarks: what was left out, and the image format. full: whether MAX_BYTES cut off rows."""

    columns: list[Column]
    rows: list[ImageRow]
    remarks: list[str]
    full: bool


def gallery(groups: Sequence[Group]) -> Gallery:
    """Build a row per image: degraded, restored by each ticket, dense, clean. Uses JPEG if PNG exceeds MAX_BYTES."""
    columns, remarks = _choose_columns(groups)
    titles = _spread_over_tasks(dict.fromkeys(t for c in columns for t in c.images))
    kept = titles[:MAX_ROWS]
    rows, full = [_image_row(columns, title, False) for title in kept], False
    if not rows:
        return Gallery(columns, [], remarks, False)
    if len(kept) < len(titles):
        remarks.append(f"{len(kept)} of {len(titles)} images are shown.")
    if sum(row.size for row in rows) <= MAX_BYTES:
        return Gallery(columns, rows, [*remarks, "Pixels are exact (PNG)."], False)
    rows = []
    for title in kept:
        row = _image_row(columns, title, True)
        full = bool(rows) and sum(each.size for each in rows) + row.size > MAX_BYTES
        if full:
            break
        rows.append(row)
    return Gallery(columns, rows, [*remarks, "JPEG (quality 90), to keep the page small."], full)


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
    return sorted(columns, key=lambda c: c.entry.method == DENSE), remarks


def _spread_over_tasks(titles: Iterable[str]) -> list[str]:
    """Order titles round-robin over tasks and sets: first images, then second ones, and so on."""
    tasks: dict[str, list[str]] = {}
    for title in titles:
        tasks.setdefault(title.partition(" ")[0], []).append(title)
    return [t for turn in zip_longest(*tasks.values()) for t in turn if t is not None]


def _image_row(columns: Sequence[Column], title: str, lossy: bool) -> ImageRow:
    degraded, _, clean = next(c.images[title] for c in reversed(columns) if title in c.images)
    cells: list[ImageCell | None] = [_image_cell(degraded, lossy, _describe_quality(degraded, clean))]
    for column in columns:
        images = column.images.get(title)
        if images is None:
            cells.append(None)
            continue
        same = np.array_equal(images[0], degraded) and np.array_equal(images[2], clean)
        text = _describe_quality(images[1], clean) + ("" if same else " (another input)")
        cells.append(_image_cell(images[1], lossy, text))
    return ImageRow(title, [*cells, _image_cell(clean, lossy, "clean")])


def _describe_quality(image: image_strip.Pixels, clean: image_strip.Pixels) -> str:
    return f"{metrics.psnr(image, clean, peak=255):.2f} dB" if image.shape == clean.shape else "another size"


def _image_cell(image: image_strip.Pixels, lossy: bool, text: str) -> ImageCell:
    data = io.BytesIO()
    if lossy:
        Image.fromarray(image).save(data, "JPEG", quality=90, subsampling=0)
    else:
        Image.fromarray(image).save(data, "PNG", optimize=True)
    height, width = image.shape[:2]
    return ImageCell(data_uri(data.getvalue(), "image/jpeg" if lossy else "image/png"), width, height, text)
