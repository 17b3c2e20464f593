"""Draw the pictures of docs/degradations.md: one strip per family, from photographs of scikit-image's wheel.

python docs/make_degradations.py [FOLDER]        default: docs/degradations
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from mirl_dist.config.seeding import rng
from mirl_dist.config.tasks import Task
from mirl_dist.data.building import demo_photos
from mirl_dist.data.degradations.degrade import Pixels, degrade_for_test, haze, rain, snow

GAP, TITLE, QUALITY = 4, 18, 88


class Place(NamedTuple):
    """A part of a photograph, in pixels."""

    name: str
    top: int
    left: int
    height: int
    width: int

    def cut(self, whole: Pixels) -> Pixels:
        return whole[self.top : self.top + self.height, self.left : self.left + self.width]


FACE = Place("astronaut", 30, 110, 190, 190)
CAT = Place("chelsea", 70, 100, 190, 190)
CUP = Place("coffee", 60, 190, 230, 230)
STREET = Place("motorcycle_left", 60, 90, 300, 300)
ON_READING = {
    "noise": (FACE, ("denoise_15", "denoise_25", "denoise_50", "denoise_mild", "denoise_hard")),
    "blur": (CAT, ("deblur_easy", "deblur_mild", "deblur_hard", "deblur_k19s4", "deblur_k21s5")),
    "lost_resolution": (CAT, ("superres_easy", "superres_2", "superres_4", "superres_mild", "superres_hard")),
    "jpeg": (FACE, ("dejpeg_mild", "dejpeg_40", "dejpeg_hard", "dejpeg_20", "dejpeg_10")),
    "low_light": (CUP, ("enlighten_mild", "enlighten_hard")),
}
HAZE = ((0.8, 0.5), (0.9, 1.5), (1.0, 2.5))  # airlight, beta: the ends and the middle of MiOIR's ranges


def whole(name: str) -> Pixels:
    with Image.open(demo_photos.locate(name)[0]) as image:
        return np.array(image.convert("RGB"))


def made_on_reading(place: Place, words: tuple[str, ...]) -> dict[str, Pixels]:
    """Degraded whole, then cut, as in evaluation."""
    image = whole(place.name)
    row = {word: place.cut(degrade_for_test(Task.of(word), image, rng("picture", word))) for word in words}
    return {"clean": place.cut(image), **row}


def weather() -> dict[str, dict[str, Pixels]]:
    """What recipes make: rain, snow, and haze with the true depth of its scene."""
    cat, street = whole("chelsea"), whole(STREET.name)
    part = Place("chelsea", 10, 60, 280, 280)
    height, width = street.shape[:2]
    far = demo_photos.depth(height, width, demo_photos.locate(STREET.name)[1])
    depth = np.repeat(np.rint(255 * far).astype(np.uint8)[..., None], 3, axis=2)
    hazy = {f"A {a}, B {b}": STREET.cut(haze(street, far, a, b)) for a, b in HAZE}
    return {
        "rain": {"clean": part.cut(cat)} | {f"rain, draw {i}": part.cut(rain(cat, rng(i))) for i in (1, 2, 3)},
        "snow": {"clean": part.cut(cat)} | {f"snow, draw {i}": part.cut(snow(cat, rng(i))) for i in (1, 2, 3)},
        "haze": {"clean": STREET.cut(street), "depth (white: far)": STREET.cut(depth), **hazy},
    }


def strip(row: dict[str, Pixels]) -> Image.Image:
    """Images of one size side by side, each under its title."""
    height, width = next(iter(row.values())).shape[:2]
    sheet = Image.new("RGB", (len(row) * (width + GAP) - GAP, TITLE + height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, image) in enumerate(row.items()):
        pen.text((i * (width + GAP) + 2, 2), title, fill="black")
        sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (i * (width + GAP), TITLE))
    return sheet


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: made_on_reading(*what) for name, what in ON_READING.items()} | weather()
    for name, row in rows.items():
        path = folder / f"{name}.jpg"
        strip(row).save(path, "JPEG", quality=QUALITY, subsampling="4:4:4", optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "degradations")
