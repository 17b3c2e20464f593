"""Encodes an image or pair as the tar members of a sample, in PPM or PNG, making the degraded image if required."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mirl_dist.config.seeding import rng
from mirl_dist.data.building import demo_photos
from mirl_dist.data.building.discovery import printable
from mirl_dist.data.building.layout import LayoutItem
from mirl_dist.data.degradations.degrade import Pixels, haze, rain, snow
from mirl_dist.data.image_files import ImageRefused, decode
from mirl_dist.data.manifest import CLEAN, DEGRADED, NOTES, ImageFormat, ppm_header
from mirl_dist.errors import UserError

PNG_LEVEL = 4  # measured on photographs: 0.7 % larger than level 9 in half the time


def encode_png(pixels: Pixels) -> bytes:
    """Encode as PNG. The bytes are deterministic for a given version of Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def encode_ppm(pixels: Pixels) -> bytes:
    """Encode as binary PPM: a header that depends only on the size, then the raw pixels."""
    return ppm_header(*pixels.shape[:2]) + pixels.tobytes()


ENCODE: dict[ImageFormat, Callable[[Pixels], bytes]] = {"ppm": encode_ppm, "png": encode_png}


def _read_unchanged(path: Path, digest: str) -> Pixels:
    """Read the pixels of a file. Raises UserError if it changed since the inspection."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == digest:
            return decode(data)
    except (OSError, ImageRefused):
        pass
    raise UserError(f"{printable(path)} changed while the shards were built. Build again when the images are at rest.")


def _make_degraded(item: LayoutItem, clean: Pixels, seed: int) -> Pixels:
    """Make the degraded version of a whole clean image with `picture.make`."""
    picture = item.picture
    assert picture.make is not None
    image_rng = rng(seed, picture.make, item.key)
    if picture.make == "rain":
        return rain(clean, image_rng)
    if picture.make == "snow":
        return snow(clean, image_rng)
    height, width = clean.shape[:2]
    depth = demo_photos.depth(height, width, picture.disparity)
    return haze(clean, depth, airlight=image_rng.uniform(0.8, 1.0), beta=image_rng.uniform(0.5, 2.5))


def encode_members(item: LayoutItem, seed: int) -> dict[str, bytes]:
    """Return the members of one sample by name without the key. Raises UserError for a file that changed.

    A synthetic degradation depends only on the seed, the sample's key and the pixels of the whole image.
    """
    picture, box = item.picture, item.box
    images = [_read_unchanged(file, digest) for file, digest in zip(picture.files, item.digests, strict=True)]
    if picture.make is not None:
        images.append(_make_degraded(item, images[0], seed))
    kept = (slice(box.y, box.y + box.height), slice(box.x, box.x + box.width))
    notes = {"set": picture.set, "kind": picture.kind, "source": printable(picture.name), "y": box.y, "x": box.x}
    members = {NOTES: json.dumps(notes, sort_keys=True).encode()}
    for which, image in zip((CLEAN, DEGRADED), images, strict=False):
        members[f"{which}.{item.form}"] = ENCODE[item.form](image[kept])
    return members
