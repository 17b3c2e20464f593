"""Decodes image files to upright 8-bit sRGB, or reports why they cannot be used; nothing is repaired or guessed.

Whether a file fits in 8 bits is read from the file's own header: Pillow reduces many deeper files without a sign.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from mirl_dist.data.degradations.degrade import Pixels

# Pixel formats that Pillow decodes itself (for EPS it starts Ghostscript), and the endings of their files.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
ENDINGS = (
    *(
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
    ),
    *(".ppm", ".tif", ".tiff", ".webp"),
)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
# Exceptions that Pillow raises for damaged files; found by truncating and overwriting files of every supported format.
DAMAGE = (
    *(
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        LookupError,
        ArithmeticError,
        TypeError,
        AttributeError,
        RuntimeError,
    ),
    *(struct.error, zlib.error),
)
_TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
SAME_COLOUR = 2  # levels of 255: a profile that moves no colour of a grid further is sRGB in all but name
SAME_GAMMA = 0.05  # relative: libpng's own threshold for leaving pixels alone
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)

# Large photographs are decoded on purpose; beyond twice this limit Pillow raises an error, which is reported.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about tags of files; pixels are checked


class ImageRefused(Exception):
    """The bytes are not a usable image; the message says why."""


class Decoded(NamedTuple):
    """Pixels, uint8 (H, W, 3) in sRGB, and what was done to the file's own pixels: one phrase for each conversion."""

    pixels: Pixels
    notes: tuple[str, ...] = ()


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
    notes: tuple[str, ...] = ()


def decode(data: bytes) -> Decoded:
    """Decode an image file as a viewer shows it. Raises ImageRefused with the reason.

    Orientation is applied, colours are converted to sRGB, and of several frames or pages the first is taken; each is
    noted. Greyscale, palette and fully opaque alpha images are converted to RGB. Images with more than 8 bits per
    channel, CMYK or transparency are refused, because their 8-bit RGB is ambiguous.
    """
    try:
        Image.init()  # an older Pillow, or one built without a library, lacks some of FORMATS
        plain = _without_text(data)
        with Image.open(io.BytesIO(plain), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            bits = _bits_per_channel(image, plain)
            if bits > 8:
                raise ImageRefused(f"has {bits} bits per channel; save it with 8")
            if image.mode not in MODES:
                raise ImageRefused(f"has Pillow's mode '{image.mode}'; save it as 8-bit RGB")
            turn = _TURNS.get(image.getexif().get(0x0112, 1))
            notes = [] if turn is None else ["turned upright"]
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                notes.append("first of several frames or pages")
            image.load()
            if image.mode in ("1", "L", "LA"):
                notes.append("grey, used as RGB")
            is_turned = image.format == "TIFF"  # by Pillow, on loading
            pixels, note = _to_srgb(image if turn is None or is_turned else image.transpose(turn))
            return Decoded(pixels, (*notes, *note))
    except UnidentifiedImageError:
        raise ImageRefused("is empty" if not data else "is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"has more pixels than Pillow takes for safe ({error})") from None
    except DAMAGE as error:
        raise ImageRefused(f"is damaged ({str(error) or type(error).__name__})") from None


def _without_text(data: bytes) -> bytes:
    """Return a PNG file without its text chunks, whose size Pillow limits; other files are returned as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or not any(kind in data for kind in _PNG_TEXT):
        return data
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in _PNG_TEXT:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _bits_per_channel(image: Image.Image, data: bytes) -> int:
    """Return the number of bits per channel that the file's header states. Raises ImageRefused for signed samples."""
    match image.format:
        case "PNG":
            return data[24]
        case "TIFF":
            tags = getattr(image, "tag_v2", {})
            if any(kind != 1 for kind in tags.get(339, (1,))):
                raise ImageRefused("has signed or floating-point samples; save it as unsigned 8-bit RGB")
            return int(max(tags.get(258, (1,))))
        case "PPM":
            return _ppm_bits(data)
        case "JPEG2000":
            siz = data.find(b"\xff\x4f\xff\x51")
            channels = int.from_bytes(data[siz + 40 : siz + 42], "big")
            depths = data[siz + 42 : siz + 42 + 3 * channels : 3]
            if any(depth & 0x80 for depth in depths):
                raise ImageRefused("has signed samples; save it as unsigned 8-bit RGB")
            return max(depths, default=7) + 1
        case "AVIF":
            settings = data.find(b"av1C")
            flags = data[settings + 6]
            return (12 if flags & 0x20 else 10) if flags & 0x40 else 8
    return 8


def _ppm_bits(data: bytes) -> int:
    """Return the bits per channel of a PBM, PGM, PPM or PAM file by its largest value; Pillow scales all to 8."""
    words: list[bytes] = []
    for line in data[:65536].split(b"\n"):
        words += line.split(b"#")[0].split()
        if len(words) >= 4:
            break
    if words[0] in (b"P1", b"P4") or len(words) < 4 or not words[3].isdigit():
        return 8
    return 16 if int(words[3]) > 255 else 8


def _to_srgb(image: Image.Image) -> tuple[Pixels, tuple[str, ...]]:
    """Return the pixels in sRGB, and a note if a colour profile or a gamma changed them. Raises ImageRefused."""
    info = image.info
    if image.has_transparency_data:
        rgba = np.array(image.convert("RGBA"))
        if rgba[..., 3].min() != 255:
            raise ImageRefused("has transparent pixels; save it as RGB without alpha")
        image = image.convert("L") if image.mode == "LA" else Image.fromarray(rgba[..., :3])
    if info.get("icc_profile"):
        return _apply_profile(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"), info["icc_profile"])
    pixels = np.array(image.convert("RGB"))
    if "gamma" not in info or "srgb" in info:
        return pixels, ()
    primaries = info.get("chromaticity", _SRGB_PRIMARIES)
    if not np.allclose(primaries, _SRGB_PRIMARIES, atol=0.005):
        raise ImageRefused("has the primaries of another colour space (cHRM); save it as sRGB")
    exponent = 1 / (2.2 * info["gamma"]) if info["gamma"] > 0 else 1.0
    if abs(exponent - 1) < SAME_GAMMA:
        return pixels, ()
    levels = np.round(255 * (np.arange(256) / 255) ** exponent).astype(np.uint8)
    return levels[pixels], ("gamma converted to sRGB",)


def _apply_profile(image: Image.Image, profile: bytes) -> tuple[Pixels, tuple[str, ...]]:
    """Convert from an ICC profile to sRGB; leave the pixels alone if the profile is sRGB within SAME_COLOUR levels."""
    try:
        convert = _conversion(profile, image.mode)
        if convert is None:
            return np.array(image.convert("RGB")), ()
        return np.array(convert.apply(image)), ("colour profile converted to sRGB",)
    except (ImageCms.PyCMSError, *DAMAGE) as error:
        raise ImageRefused(f"has a colour profile that cannot be applied ({error}); save it as sRGB") from None


@lru_cache(8)  # the images of a set mostly share one
def _conversion(profile: bytes, mode: str) -> Any:
    """Return the conversion of images of a mode ('L' or 'RGB') to sRGB, or None for a profile that is sRGB itself."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != {"L": "GRAY", "RGB": "RGB"}[mode]:
        raise ValueError(f"it is for {space} and the image is {mode}")
    target, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    convert: Any = ImageCms.buildTransform(source, target, mode, "RGB", intent)
    grid = _colour_grid().convert(mode)
    moved = np.array(convert.apply(grid), np.int16) - np.array(grid.convert("RGB"), np.int16)
    return None if np.abs(moved).max() <= SAME_COLOUR else convert


def _colour_grid() -> Image.Image:
    """Return an image of 17 x 17 x 17 colours that span RGB."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17 * 17, 17, 3))


def examine(path: Path) -> ImageInfo:
    """Read and decode a file; problems are returned, not raised."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return ImageInfo("", "", 0, 0, f"cannot be read ({error.strerror})")
    try:
        pixels, notes = decode(data)
    except ImageRefused as refused:
        return ImageInfo("", "", 0, 0, str(refused))
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return ImageInfo(hashlib.sha256(data).hexdigest(), digest, pixels.shape[0], pixels.shape[1], None, notes)
