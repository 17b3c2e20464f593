"""Decodes image files to 8-bit RGB, or reports why they cannot be used; nothing is repaired or guessed."""

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
# Exceptions that Pillow raises for damaged files; found by truncating and overwriting files of every supported format.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


class ImageRefused(Exception):
    """The bytes are not a usable image; the message says why."""


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Pixels) -> Pixels:
        """Return a view of this part of an image (H, W, 3)."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def centre_box(height: int, width: int, side: int | None) -> Box:
    """Return the centre of an image, at most `side` x `side` pixels; the whole image if `side` is None."""
    h, w = (height, width) if side is None else (min(height, side), min(width, side))
    return Box((height - h) // 2, (width - w) // 2, h, w)


class ImageInfo(NamedTuple):
    """Result of examining an image file: hex SHA-256 of its bytes and of its pixels, height and width, or a problem."""

    sha256: str
    pixels_sha256: str
    height: int
    width: int
    problem: str | None = None


def decode(data: bytes) -> Pixels:
    """Decode an image file to uint8 (H, W, 3) RGB. Raises ImageRefused with the reason.

    Greyscale, palette and fully opaque alpha images are converted to RGB. Images with 16 bits or more per channel,
    CMYK or transparency are refused, because their 8-bit RGB is ambiguous. EXIF orientation is ignored.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if any(";16" in repr(tile[3]) for tile in image.tile):  # Pillow silently drops the low bytes of 48-bit RGB
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
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"has more pixels than Pillow takes for safe ({error})") from None
    except DAMAGE as error:
        raise ImageRefused(f"is damaged ({str(error) or type(error).__name__})") from None


def examine(path: Path) -> ImageInfo:
    """Read and decode a file; problems are returned, not raised."""
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
