"""The page's pictures: the same images restored by each method's last ticket, side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from PIL import Image

from mirl_dist.data import image_strip
from mirl_dist.errors import UserError
from mirl_dist.evaluation.metrics import PSNR_CEILING_DB
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report.charts import last_rounds
from mirl_dist.tickets.report.html import Html, data_uri, join, row, table, tag

MAX_ROWS, MAX_BYTES = 12, 2_500_000
"""Images shown, and bytes that all of them may take on the page."""


class Column(NamedTuple):
    """The ticket of a line and its images by title: (degraded, restored, clean)."""

    group: Group
    entry: Entry
    images: Mapping[str, tuple[image_strip.Pixels, ...]]


def gallery(groups: Sequence[Group]) -> Html:
    """A row per image: degraded, restored by each ticket with its PSNR, dense, clean; and what was left out."""
    columns, remarks = _choose_columns(groups)
    titles = _spread_over_tasks(list(dict.fromkeys(t for c in columns for t in c.images)))
    if not titles:
        return join([tag("p", "No ticket came with pictures (evaluate.pictures)."), *_paragraphs(remarks)])
    kept = titles[:MAX_ROWS]
    body, lossy = _encode_rows(columns, kept)
    if len(kept) < len(titles):
        remarks.append(f"{len(kept)} of {len(titles)} images are shown.")
    remarks.append("JPEG (quality 90), to keep the page small." if lossy else "Pixels are exact (PNG).")
    heads = [_column_head(c) for c in columns]
    last = [h for c, h in zip(columns, heads, strict=True) if c.entry.method == DENSE]
    first = [h for c, h in zip(columns, heads, strict=True) if c.entry.method != DENSE]
    caption = (
        "Centres of test images: the input, what each method's last ticket makes of it (one seed), the dense network's "
        "work, and the clean image. In dB: PSNR of the 8-bit centre that is shown, not the score of the whole image. "
        + " ".join(remarks)
    )
    pictures = table(
        [["degraded", *first, *last, "clean"]], body, class_="pictures", style=f"min-width:{112 * (len(columns) + 2)}px"
    )
    return tag("figure", pictures, tag("figcaption", caption))


def _paragraphs(texts: Sequence[str]) -> list[Html]:
    return [tag("p", text, class_="soft") for text in texts]


def _choose_columns(groups: Sequence[Group]) -> tuple[list[Column], list[str]]:
    """One ticket per method, of the lowest seed whose pictures can be read; what could not be, in words."""
    columns, remarks = [], []
    for group in last_rounds(groups):
        for entry in sorted((s for s in group.entries if s.strip is not None), key=lambda s: s.seed):
            assert entry.strip is not None, "chosen by having one"
            try:
                rows = image_strip.rows(entry.strip, f"pictures of {entry.name}")
            except UserError as fault:
                remarks.append(str(fault))
                continue
            columns.append(Column(group, entry, {r.title: r.images for r in rows if len(r.images) == 3}))
            break
    return columns, remarks


def _spread_over_tasks(titles: Sequence[str]) -> list[str]:
    """The first image of each task and set, then the second ones."""
    tasks: dict[str, list[str]] = {}
    for title in titles:
        tasks.setdefault(title.partition(" ")[0], []).append(title)
    return [t for turn in zip_longest(*tasks.values()) for t in turn if t is not None]


def _column_head(column: Column) -> Html:
    group, ticket = column.group, column.entry.ticket
    text = f"round {group.round_}, {1 - ticket.total_sparsity:.1%}, seed {column.entry.seed}"
    return tag("th", group.method, tag("br"), tag("small", text, class_="soft"))


def _encode_rows(columns: Sequence[Column], titles: Sequence[str]) -> tuple[list[Html], bool]:
    """Rows of the table, and whether the pictures had to be made smaller by loss."""
    body = [_image_rows(columns, title, False) for title in titles]
    if sum(len(html) for rows in body for html in rows) <= MAX_BYTES:
        return [html for rows in body for html in rows], False
    kept: list[Html] = []
    size = 0
    for title in titles:
        rows = _image_rows(columns, title, True)
        size += sum(map(len, rows))
        if size > MAX_BYTES and kept:
            kept.append(
                row(
                    [
                        tag(
                            "td",
                            "More images would make the page too large.",
                            colspan=str(len(columns) + 2),
                            class_="row",
                        )
                    ]
                )
            )
            break
        kept += rows
    return kept, True


def _image_rows(columns: Sequence[Column], title: str, lossy: bool) -> list[Html]:
    with_image = [(c, c.images[title]) for c in columns if title in c.images]
    degraded, _, clean = with_image[0][1]
    cells = {
        c.group.method: _image_cell(images[1], clean, lossy, _note_other_input(images, degraded, clean))
        for c, images in with_image
    }
    ordered = [c for c in columns if c.entry.method != DENSE] + [c for c in columns if c.entry.method == DENSE]
    middle = [cells.get(c.group.method, tag("td", "–")) for c in ordered]
    width = str(len(middle) + 2)
    return [
        row([tag("td", title, colspan=width, class_="row")]),
        row([_image_cell(degraded, clean, lossy), *middle, tag("td", _image_tag(clean, lossy, "clean"), "clean")]),
    ]


def _note_other_input(
    images: Sequence[image_strip.Pixels], degraded: image_strip.Pixels, clean: image_strip.Pixels
) -> str:
    same = np.array_equal(images[0], degraded) and np.array_equal(images[2], clean)
    return "" if same else " (another input)"


def _image_cell(image: image_strip.Pixels, clean: image_strip.Pixels, lossy: bool, more: str = "") -> Html:
    score = _psnr(image, clean)
    text = f"{score:.2f} dB{more}" if score is not None else f"another size{more}"
    return tag("td", _image_tag(image, lossy, text), text)


def _psnr(image: image_strip.Pixels, clean: image_strip.Pixels) -> float | None:
    if image.shape != clean.shape:
        return None
    error = float(np.mean((image.astype(np.float64) - clean) ** 2))
    return min(10 * float(np.log10(255**2 / error)), PSNR_CEILING_DB) if error else PSNR_CEILING_DB


def _image_tag(image: image_strip.Pixels, lossy: bool, alt: str) -> Html:
    data = io.BytesIO()
    if lossy:
        Image.fromarray(image).save(data, "JPEG", quality=90, subsampling=0)
    else:
        Image.fromarray(image).save(data, "PNG", optimize=True)
    height, width = image.shape[:2]
    kind = "image/jpeg" if lossy else "image/png"
    return tag("img", src=data_uri(data.getvalue(), kind), alt=alt, width=str(width), height=str(height))
