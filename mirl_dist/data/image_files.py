"""A file of a data set as 8-bit RGB pixels, or why it cannot be: nothing is repaired or guessed."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from mirl_dist.data.degradations.degrade import Pixels

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr")
# What Pillow raises for damaged files, found by cutting and overwriting images of every known ending.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


class ImageRefused(Exception):
    """The text says why the bytes are no image that can be used."""


class ImageInfo(NamedTuple):
    """One image file, examined: hex SHA-256 of its bytes and its pixels, size, or why it is no use."""

    sha256: str
    pixels_sha256: str
    height: int
    width: int
    problem: str | None = None


def decode(data: bytes) -> Pixels:
    """Decode a whole image file to uint8 (H, W, 3) RGB. Raises ImageRefused with the reason.

    Grey, palette and fully opaque images with alpha become RGB. Refused are 16 bits and more, CMYK and
    transparency, whose 8-bit RGB would be a guess. EXIF orientation is ignored: pixels stay as stored.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if any(";16" in repr(tile[3]) for tile in image.tile):  # Pillow drops the low bytes of 48-bit RGB
                raise ImageRefused("has 16 bits per channel; save it with 8")
            if image.mode not in MODES:
                raise ImageRefused(f"has Pillow's mode '{image.mode}'; save it as 8-bit RGB")
            image.load()
            if image.has_transparency_data:
                rgba = np.array(image.convert("RGBA"))
                if rgba[..., 3].min() != 255:
                    raise ImageRefused("has transparent pixels; save it as RGB without alpha")
                return rgba[..., :3]
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ImageRefused("is empty" if not data else "is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ImageRefused("has more pixels than Pillow takes for safe") from None
    except DAMAGE as error:
        raise ImageRefused(f"is damaged ({str(error) or type(error).__name__})") from None


def examine(path: Path) -> ImageInfo:
    """Read and decode a whole file once; problems are returned, not raised."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return ImageInfo("", "", 0, 0, f"cannot be read ({error.strerror})")
    try:
        image = decode(data)
    except ImageRefused as refused:
        return ImageInfo("", "", 0, 0, str(refused))
    pixels = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    return ImageInfo(hashlib.sha256(data).hexdigest(), pixels, *image.shape[:2])
