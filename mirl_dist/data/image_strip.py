"""Image strips: rows of degraded, restored and clean images in one PNG file, from which the rows can be read back."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from mirl_dist.data.image_files import DAMAGE, centre_box
from mirl_dist.errors import UserError

Pixels = NDArray[np.uint8]
MOST_PIXELS = 2**26
"""Largest strip that `rows` decodes, in pixels (200 MB of RGB)."""
_GAP, _TITLE = 4, 18
_CHUNK = "mirl_dist"


class Row(NamedTuple):
    """One row of a strip: a title and uint8 (H, W, 3) images of equal height."""

    title: str
    images: tuple[Pixels, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _RowLayout(_Strict):
    """Title of a row, and left, top, width and height of its images in pixels."""

    title: str
    boxes: list[tuple[NonNegativeInt, NonNegativeInt, PositiveInt, PositiveInt]]


class _StripLayout(_Strict):
    rows: list[_RowLayout]


def centre(image: Pixels, pixels: int) -> Pixels:
    """Crop the centre of an image, at most `pixels` x `pixels`."""
    height, width = image.shape[:2]
    return centre_box(height, width, pixels).cut(image)


def strip(rows: Sequence[Row], columns: Sequence[str] = ()) -> bytes:
    """Draw rows below one another, each under its title, and return PNG bytes that `rows` can read back.

    columns: headings above the images of the first row. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a strip needs at least one row")
    width = max(sum(i.shape[1] + _GAP for i in row.images) for row in rows) + _GAP
    top = _GAP + (_TITLE if columns else 0)
    height = top + sum(row.images[0].shape[0] + _TITLE + _GAP for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    lines = []
    for row in rows:
        pen.text((_GAP, top + 3), _to_ascii(row.title), fill="black")
        left, boxes = _GAP, []
        for image in row.images:
            sheet.paste(Image.fromarray(image), (left, top + _TITLE))
            boxes.append((left, top + _TITLE, image.shape[1], image.shape[0]))
            left += image.shape[1] + _GAP
        lines.append(_RowLayout(title=row.title, boxes=boxes))
        top += row.images[0].shape[0] + _TITLE + _GAP
    for word, box in zip(columns, lines[0].boxes, strict=False):
        pen.text((box[0], _GAP), _to_ascii(word), fill="black")
    info, data = PngInfo(), io.BytesIO()
    info.add_text(_CHUNK, json.dumps(_StripLayout(rows=lines).model_dump()))
    sheet.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def rows(png: bytes, source: str = "the strip of pictures") -> list[Row]:
    """Read the rows back from a PNG file that `strip` wrote. source: its name in messages.

    Raises UserError for any other bytes, and for an image above MOST_PIXELS before decoding it.
    """
    if len(png) < 33 or png[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR":
        raise UserError(f"{source} is no PNG file. Take pictures.png from a run folder.")
    width, height = struct.unpack(">II", png[16:24])
    if width * height > MOST_PIXELS:
        raise UserError(f"{source} has {width} x {height} pixels, more than {MOST_PIXELS:,}. Compare fewer pictures.")
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            mode, layout, pixels = image.mode, image.info.get(_CHUNK), np.array(image)
    except DAMAGE as error:
        problem = f"is damaged ({str(error) or type(error).__name__})"
        raise UserError(f"{source} {problem}. Take it from the run again.") from None
    if mode != "RGB" or pixels.shape[:2] != (height, width) or not isinstance(layout, str):
        raise UserError(f"{source} is a PNG file, but no strip of pictures. Take pictures.png from a run folder.")
    try:
        lines = _StripLayout.model_validate_json(layout).rows
    except ValidationError as error:
        problem = f"tells its rows wrongly ({error.errors()[0]['msg']})"
        raise UserError(f"{source} {problem}. Take it from the run again.") from None
    for problem in _find_misplaced(lines, width, height):
        raise UserError(f"{source}: {problem}. Take it from the run again.")
    return [Row(line.title, tuple(pixels[t : t + h, x : x + w] for x, t, w, h in line.boxes)) for line in lines]


def _find_misplaced(lines: Sequence[_RowLayout], width: int, height: int) -> Iterator[str]:
    """Yield problems: rows without images or of unequal heights, and boxes that leave the image or overlap.

    Overlap is detected only if the total area of the boxes exceeds that of the image.
    """
    area = 0
    for line in lines:
        if not line.boxes or len({box[3] for box in line.boxes}) > 1:
            yield f"its row '{line.title}' has no images of one height"
        for x, y, w, h in line.boxes:
            area += w * h
            if x + w > width or y + h > height or area > width * height:
                yield f"its row '{line.title}' is outside the image"


def _to_ascii(text: str) -> str:
    """Replace non-ASCII characters, which the default font may lack."""
    return text.encode("ascii", "replace").decode()
