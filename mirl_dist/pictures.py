"""Pictures for people: rows of degraded, restored and clean, one row per task."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]
_GAP, _TITLE = 4, 18


class Row(NamedTuple):
    """One line of a strip: a title and images of one height, uint8 (H, W, 3)."""

    title: str
    images: tuple[Pixels, ...]


def centre(image: Pixels, pixels: int) -> Pixels:
    """The centre of an image, at most `pixels` on a side."""
    height, width = image.shape[:2]
    h, w = min(height, pixels), min(width, pixels)
    top, left = (height - h) // 2, (width - w) // 2
    return image[top : top + h, left : left + w]


def strip(rows: Sequence[Row]) -> bytes:
    """Rows below one another, each under its title, as PNG bytes. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("a strip needs at least one row")
    width = max(sum(i.shape[1] + _GAP for i in row.images) for row in rows) + _GAP
    height = sum(row.images[0].shape[0] + _TITLE + _GAP for row in rows) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    top = _GAP
    for row in rows:
        pen.text((_GAP, top + 3), row.title, fill="black")
        left = _GAP
        for image in row.images:
            sheet.paste(Image.fromarray(image), (left, top + _TITLE))
            left += image.shape[1] + _GAP
        top += row.images[0].shape[0] + _TITLE + _GAP
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()
