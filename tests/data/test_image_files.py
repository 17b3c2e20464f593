"""Image files decode to what a viewer shows, or are refused; never to other pixels in silence."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mirl_dist.data.image_files import ImageRefused, decode

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
CASES = Path(os.environ.get("MIRL_DATA", "")).parent / "cases"


def save(pixels=PIXELS, **options):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, **options)
    return data.getvalue()


def tiff(bits, planar, pixels=PIXELS):
    """Return an uncompressed RGB TIFF file, which Pillow itself cannot write in these forms."""
    raw = (pixels.astype("<u2") * 257 if bits == 16 else pixels).astype(f"<u{bits // 8}")
    planes = [raw[..., c].tobytes() for c in range(3)] if planar else [raw.tobytes()]
    height, width = pixels.shape[:2]
    entries = 12
    data = 8 + 2 + 12 * entries + 4
    at = data + 6 + 6 + 4 * len(planes) * 2
    offsets = [at + sum(map(len, planes[:i])) for i in range(len(planes))]

    def tag(number, kind, count, value):
        return struct.pack("<HHI", number, kind, count) + (
            struct.pack("<HH", value, 0) if kind == 3 and count == 1 else struct.pack("<I", value)
        )

    n = len(planes)
    lists = data + 12
    head = b"II*\0" + struct.pack("<IH", 8, entries)
    head += (
        tag(256, 3, 1, width) + tag(257, 3, 1, height) + tag(258, 3, 3, data) + tag(259, 3, 1, 1) + tag(262, 3, 1, 2)
    )
    head += tag(273, 4, n, lists if n > 1 else offsets[0]) + tag(277, 3, 1, 3) + tag(278, 3, 1, height)
    head += tag(279, 4, n, lists + 4 * n if n > 1 else len(planes[0])) + tag(284, 3, 1, 2 if planar else 1)
    head += tag(317, 3, 1, 1) + tag(339, 3, 3, data + 6) + struct.pack("<I", 0)
    head += struct.pack("<3H", *[bits] * 3) + struct.pack("<3H", 1, 1, 1)
    head += struct.pack(f"<{n}I", *offsets) + struct.pack(f"<{n}I", *map(len, planes))
    return head + b"".join(planes)


def ppm(maximum, pixels=PIXELS, comment=b""):
    samples = (pixels.astype(np.uint32) * maximum // 255).astype(">u2" if maximum > 255 else "u1")
    return b"P6\n" + comment + b"%d %d\n%d\n" % (pixels.shape[1], pixels.shape[0], maximum) + samples.tobytes()


def bmp565(pixels=PIXELS):
    r, g, b = (pixels[::-1, :, c].astype("<u2") for c in range(3))
    body = ((r >> 3 << 11) | (g >> 2 << 5) | b >> 3).astype("<u2").tobytes()
    height, width = pixels.shape[:2]
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 3, len(body), 0, 0, 0, 0)
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    return struct.pack("<2sIHHI", b"BM", 66 + len(body), 0, 0, 66) + info + masks + body


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks):
    """Return PIXELS as PNG with chunks after its header."""
    data = save(format="PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def oriented(orientation, **options):
    """Return a file whose stored pixels show PIXELS once its orientation is applied."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored, exif = Image.fromarray(PIXELS).transpose(inverse[orientation]), Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    stored.save(data, exif=exif, **options)
    return data.getvalue()


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_in_every_format(form, orientation):
    pixels, notes = decode(oriented(orientation, format=form, **({"lossless": True} if form == "WEBP" else {})))
    assert np.array_equal(pixels, PIXELS)
    assert notes == ("turned upright",)


@pytest.mark.parametrize(
    "data",
    [
        tiff(16, planar=True),
        tiff(16, planar=False),
        ppm(65535),
        ppm(256),
        ppm(1023, comment=b"# 8 8 8\n"),
        save(np.full((8, 8), 40000, np.uint16), format="PNG"),
        save(np.full((8, 8), 40000, np.uint16), format="JPEG2000"),
    ],
)
def test_more_than_eight_bits_a_channel_are_refused(data):
    with pytest.raises(ImageRefused, match="16 bits per channel; save it with 8"):
        decode(data)


def test_signed_samples_are_refused():
    data = save(PIXELS[..., 0], format="TIFF", tiffinfo={339: 2})
    with pytest.raises(ImageRefused, match="signed"):
        decode(data)


@pytest.mark.parametrize(
    "data, expected",
    [
        (tiff(8, planar=True), PIXELS),
        (tiff(8, planar=False), PIXELS),
        (ppm(255, comment=b"# 1000 1000 65535\n"), PIXELS),
        (save(format="BMP"), PIXELS),
        (png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000))), PIXELS),
        (png_with(chunk(b"gAMA", struct.pack(">I", 45455))), PIXELS),
        (png_with(chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100000))), PIXELS),
    ],
)
def test_eight_bit_files_keep_their_pixels(data, expected):
    pixels, notes = decode(data)
    assert np.array_equal(pixels, expected) and notes == ()


def test_a_bitmap_of_five_and_six_bits_is_read():
    pixels, _ = decode(bmp565())
    assert np.abs(pixels.astype(int) - PIXELS).max() <= 8


def test_a_gamma_is_converted():
    pixels, notes = decode(png_with(chunk(b"gAMA", struct.pack(">I", 100000))))
    assert np.array_equal(pixels, np.round(255 * (PIXELS / 255) ** (1 / 2.2)).astype(np.uint8))
    assert notes == ("gamma converted to sRGB",)


def test_primaries_of_another_colour_space_are_refused():
    wide = struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600)
    with pytest.raises(ImageRefused, match="primaries"):
        decode(png_with(chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"cHRM", wide)))


def test_an_srgb_profile_leaves_the_pixels_alone():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, notes = decode(save(format="PNG", icc_profile=profile))
    assert np.array_equal(pixels, PIXELS) and notes == ()


def test_a_damaged_profile_is_refused():
    with pytest.raises(ImageRefused, match="colour profile"):
        decode(save(format="PNG", icc_profile=b"no profile"))


@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF", "WEBP"])
def test_the_first_of_several_frames_is_taken_and_noted(form):
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 255)]
    data = io.BytesIO()
    frames[0].save(data, form, save_all=True, append_images=frames[1:])
    pixels, notes = decode(data.getvalue())
    assert pixels.max() <= 2 and notes == ("first of several frames or pages",)


def test_a_format_that_starts_another_program_is_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageRefused, match="not an image"):
        decode(postscript)


def test_large_images_do_not_leak_the_decoders_warning():
    program = (
        "import io, numpy; from PIL import Image; from mirl_dist.data.image_files import decode; data = io.BytesIO();"
        "Image.fromarray(numpy.zeros((9, 9), 'u1')).save(data, 'PNG'); Image.MAX_IMAGE_PIXELS = 80;"
        "print(decode(data.getvalue()).pixels.shape)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("(9, 9, 3)\n", "")


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases of the field lie beside MIRL_DATA, which is not set")
@pytest.mark.parametrize("name", ["exif6.jpg", "exif3.jpg", "icc.png", "bigtext.png", "anim.png"])
def test_files_of_the_field_are_what_a_viewer_shows(name):
    viewer = CASES / f"{Path(name).stem}_viewer.png"
    shown = Image.open(viewer if viewer.exists() else CASES / "plain.png").convert("RGB")
    assert np.array_equal(decode((CASES / name).read_bytes()).pixels, np.asarray(shown))


def test_a_profile_for_grey_in_a_colour_image_is_refused() -> None:
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    with pytest.raises(ImageRefused, match="colour profile that cannot be applied .it is for XYZ and the image is RGB"):
        decode(save(format="PNG", icc_profile=grey))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_damaged_files_decode_or_are_refused_and_nothing_else(form: str) -> None:
    data, draw = save(format=form), np.random.default_rng(0)
    for _ in range(60):
        spoilt = bytearray(data)
        for place in draw.integers(0, len(data), 4):
            spoilt[place] = draw.integers(0, 256)
        with contextlib.suppress(ImageRefused):
            decode(bytes(spoilt))


def test_an_opaque_grey_image_with_alpha_is_grey() -> None:
    levels = np.full((8, 8), 128, np.uint8)
    data, opaque = (
        io.BytesIO(),
        Image.merge("LA", (Image.fromarray(levels), Image.fromarray(np.full_like(levels, 255)))),
    )
    opaque.save(data, "PNG")
    pixels, notes = decode(data.getvalue())
    assert np.array_equal(pixels, np.repeat(levels[..., None], 3, axis=2)) and notes == ("grey, used as RGB",)
