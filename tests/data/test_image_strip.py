"""Laws of strips: what was put in comes out again, and nothing else is taken for a strip."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mirl_dist.data.image_strip import MOST_PIXELS, Row, rows, strip
from mirl_dist.errors import UserError


def some_rows() -> list[Row]:
    draw = np.random.default_rng(0)

    def image(height: int, width: int) -> Any:
        return draw.integers(0, 256, (height, width, 3), dtype=np.uint8)

    return [
        Row("denoise_25/photos astronaut", tuple(image(40, 64) for _ in range(3))),
        Row("derain/rain Regen-Stra\u00dfe \u96e8", (image(20, 30), image(20, 10))),
        Row("", (image(8, 8),)),
    ]


def written(layout: Any, size: tuple[int, int] = (100, 60), mode: str = "RGB", key: str = "mirl_dist") -> bytes:
    told, data = PngInfo(), io.BytesIO()
    told.add_text(key, layout if isinstance(layout, str) else json.dumps(layout))
    Image.new(mode, size).save(data, "PNG", pnginfo=told)
    return data.getvalue()


def a_row(*boxes: Any, title: Any = "t") -> dict[str, Any]:
    return {"rows": [{"title": title, "boxes": list(boxes)}]}


@pytest.mark.parametrize("columns", [(), ("degraded", "restored", "clean")])
def test_a_strip_is_cut_up_into_the_rows_it_was_made_of(columns: tuple[str, ...]) -> None:
    given = some_rows()
    found = rows(strip(given, columns))
    assert [row.title for row in found] == [row.title for row in given]
    for row, other in zip(found, given, strict=True):
        assert len(row.images) == len(other.images)
        assert all(np.array_equal(a, b) for a, b in zip(row.images, other.images, strict=True))
    assert strip(given, columns) == strip(given, columns), "equal rows make equal bytes"
    assert rows(strip(found, columns))[0].title == given[0].title


def test_words_above_the_columns_are_drawn_once_and_take_a_line() -> None:
    given = some_rows()
    plain, headed = (np.array(Image.open(io.BytesIO(strip(given, c)))) for c in ((), ("a", "b", "c")))
    grown = len(headed) - len(plain)
    assert grown > 0
    assert (headed[:grown] < 128).any(), "letters"
    assert np.array_equal(headed[grown + 4 :], plain[4:])


WRONG_BOXES = ([0, 0, 9], [0, 0, 9, 9.5], [-1, 0, 9, 9], [0, 0, 0, 9])
OUTSIDE = ([92, 0, 9, 9], [0, 52, 9, 9], [0, 0, 10**30, 9])


@pytest.mark.parametrize(
    ("png", "said"),
    [
        (b"", "is no PNG file"),
        (b"GIF89a" + bytes(60), "is no PNG file"),
        (written("{}", key="other"), "is a PNG file, but no strip of pictures"),
        (written(a_row([0, 0, 9, 9]), mode="L"), "no strip of pictures"),
        *((written(a_row(box)), "tells its rows wrongly") for box in WRONG_BOXES),
        (written("{"), "tells its rows wrongly"),
        (written([1]), "tells its rows wrongly"),
        (written(a_row([0, 0, 9, 9], title=7)), "tells its rows wrongly"),
        (written(a_row([0, 0, 9, 9]) | {"more": 1}), "tells its rows wrongly"),
        *((written(a_row(box)), "its row 't' is outside the image") for box in OUTSIDE),
        (written(a_row([0, 0, 100, 60], [0, 0, 1, 60])), "its row 't' is outside the image"),
        (written(a_row([0, 0, 9, 9], [20, 0, 9, 8])), "has no images of one height"),
        (written(a_row()), "has no images of one height"),
        (strip(some_rows())[:-400], "is damaged"),
        (strip(some_rows())[:40], "is (damaged|a PNG file)"),
    ],
)
def test_other_bytes_than_a_strips_are_refused(png: bytes, said: str) -> None:
    with pytest.raises(UserError, match=f"round 3: .*{said}|round 3.* {said}"):
        rows(png, "round 3")


def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    body = b"IHDR" + struct.pack(">IIBBBBB", 2**16, 2**15, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(UserError, match=f"has 65536 x 32768 pixels, more than {MOST_PIXELS:,}. Compare fewer"):
        rows(head + bytes(100), "the strip")
    assert Image.MAX_IMAGE_PIXELS is not None and MOST_PIXELS < Image.MAX_IMAGE_PIXELS, "Pillow's own limit is above"
