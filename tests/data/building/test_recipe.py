"""Laws of the shipped recipes: official layouts are paired rightly, and what is missing is told with its source.

Small trees in the official layouts are made of parts of real photographs; where MIRL_DATA is set, real images of the
data sets go through the recipes that they can feed, up to built shards.
"""

from __future__ import annotations

import io
import json
import os
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mirl_dist.data.building import demo_photos, discovery
from mirl_dist.data.building.build import build
from mirl_dist.data.building.planning import inspect_images
from mirl_dist.data.building.recipe import ImageSet, Recipe, read
from mirl_dist.data.manifest import CLEAN, DEGRADED, Part, StoredImage, read_index
from mirl_dist.data.parallel import SingleProcess
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder
from tests.data.loaders import quiet

RECIPES = Path(__file__).resolve().parents[3] / "shards"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
OFFICIAL = [name for name in NAMES if "${MIRL_SETS}" in (RECIPES / f"{name}.yaml").read_text()]
Pairs = Mapping[str, str | None]
"""Files of a set below MIRL_SETS: the degraded (else the clean) one to its clean one (None: there is but one)."""


def shipped(name: str) -> Recipe:
    return read(RECIPES / f"{name}.yaml")


def clean(*files: str) -> Pairs:
    return dict.fromkeys(files)


def changed(recipe: Recipe, change: Callable[[str, ImageSet], dict[str, Any] | None], **more: Any) -> Recipe:
    """A recipe whose sets are changed by what `change(label, set)` returns; None leaves the set out."""
    roles: dict[str, list[ImageSet]] = {"train": [], "evaluate": []}
    for role, one in recipe.sets():
        update = change(f"{role} {one.set}", one)
        if update is not None:
            roles[role].append(one.model_copy(update=update))
    return recipe.model_copy(update={role: tuple(held) for role, held in roles.items()} | more)


def expecting(recipe: Recipe, counts: Mapping[str, int]) -> Recipe:
    """The recipe with other counts, and without the sets that have none."""
    nothing_drawn = {"fraction": None, "draw_seed": None}
    return changed(recipe, lambda label, _: {"expect": counts[label], **nothing_drawn} if label in counts else None)


BSD: Pairs = clean("BSDS500/data/images/train/100075.jpg", "BSDS500/data/images/test/100007.jpg")
WED = clean("WED/pristine_images/00001.bmp", "WED/pristine_images/04744.bmp")
CBSD68 = clean("CBSD68/0000.png", "CBSD68/original_png/0001.png")
URBAN = clean("Urban100/img_001.png", "Urban100/HR/img_002.png")
SR_TESTS = {
    "evaluate set5": clean("Set5/HR/baby.png", "Set5/bird.bmp"),
    "evaluate set14": clean("Set14/HR/baboon.png"),
    "evaluate b100": clean("B100/HR/101085.png", "B100/102061.jpg"),
}
DIV2K = {
    "train div2k": clean("DIV2K/DIV2K_train_HR/0001.png", "DIV2K/DIV2K_train_HR/0800.png"),
    "evaluate div2k_valid": clean("DIV2K/DIV2K_valid_HR/0801.png"),
}


def rain100(letter: str) -> dict[str, Pairs]:
    train, test = f"RainTrain{letter}", f"Rain100{letter}"
    return {
        f"train rain100{letter.lower()}": {
            f"{train}/rain-1.png": f"{train}/norain-1.png",
            f"{train}/rain-10.png": f"{train}/norain-10.jpg",
        },
        f"evaluate rain100{letter.lower()}": {
            f"{test}/rain-001.png": f"{test}/norain-001.png",
            f"{test}/rainy/rain-010.png": f"{test}/norain-010.png",
        },
    }


SOTS_IN = {
    "evaluate sots_indoor": {
        "SOTS/indoor/hazy/1400_1.png": "SOTS/indoor/gt/1400.png",
        "SOTS/indoor/hazy/1400_10.png": "SOTS/indoor/gt/1400.png",
        "SOTS/indoor/nyuhaze500/hazy/1401_10.png": "SOTS/indoor/nyuhaze500/gt/1401.png",
        "SOTS/indoor/hazy/140_1.png": "SOTS/indoor/clear/140.png",
    }
}
SOTS_OUT = {
    "evaluate sots_outdoor": {
        "SOTS/outdoor/hazy/0001_0.8_0.2.jpg": "SOTS/outdoor/gt/0001.png",
        "SOTS/outdoor/hazy/0001_0.9_0.16.jpg": "SOTS/outdoor/gt/0001.png",
        "SOTS/outdoor/hazy/0002_0.8_0.08.jpg": "SOTS/outdoor/clear/0002.png",
    }
}
TEST1 = {"evaluate test1": {"Test1/input/im_0301_s80_a04.png": "Test1/gt/im_0301_s80_a04.png"}}
DROPS = "raindrop_data"
RAINDROP_A = {"evaluate raindrop_a": {f"{DROPS}/test_a/data/0_rain.png": f"{DROPS}/test_a/gt/0_clean.png"}}


def snow(size: str) -> dict[str, Pairs]:
    folder = f"Snow100K/test/Snow100K-{size}"
    one = "beautiful_smile_00003.jpg"
    return {f"evaluate snow100k_{size.lower()}": {f"{folder}/synthetic/{one}": f"{folder}/gt/{one}"}}


def frames(part: str, *names: str) -> Pairs:
    root = f"GOPRO_Large/{part}"
    return {f"{root}/{n.replace('/', '/blur/')}": f"{root}/{n.replace('/', '/sharp/')}" for n in names}


def scenes(part: str, *names: str) -> Pairs:
    paths = [f"GT-RAIN_{part}/{n.partition('-Webcam')[0]}/{n}.png" for n in names]
    return {path: f"{path.partition('-R-')[0]}-C-000.png" for path in paths}


FAMILY: dict[str, Pairs] = {
    "train wed": clean("data/Train/Denoise/00001.bmp", "data/Train/Denoise/00007.bmp"),
    "train bsd400": clean("data/Train/Denoise/100075.jpg"),
    "train rain100l": {"data/Train/Derain/rainy/rain-12.png": "data/Train/Derain/gt/norain-12.png"},
    "train ots": {
        "data/Train/Dehaze/synthetic/part1/0025_0.8_0.04.jpg": "data/Train/Dehaze/original/0025.jpg",
        "data/Train/Dehaze/synthetic/part4/0025_1_0.2.jpg": "data/Train/Dehaze/original/0025.jpg",
        "data/Train/Dehaze/synthetic/0039_0.95_0.16.jpg": "data/Train/Dehaze/original/0039.png",
    },
    "evaluate bsd68": clean("data/test/denoise/bsd68/3096.jpg"),
    "evaluate urban100": clean("data/test/denoise/urban100/img_001.png"),
    "evaluate rain100l": {"data/test/derain/Rain100L/input/1.png": "data/test/derain/Rain100L/target/1.png"},
    "evaluate sots_outdoor": {
        "data/test/dehaze/input/0001_0.8_0.2.jpg": "data/test/dehaze/target/0001.png",
        "data/test/dehaze/input/0001_0.9_0.2.jpg": "data/test/dehaze/target/0001.png",
    },
}
DEBLUR, ENHANCE, GOPRO = "data/Train/Deblur", "data/Train/Enhance", "data/test/deblur/gopro"
FIVE: dict[str, Pairs] = FAMILY | {
    "train gopro": {f"{DEBLUR}/blur/GOPR0372_07_00_000047.png": f"{DEBLUR}/sharp/GOPR0372_07_00_000047.png"},
    "train lol": {f"{ENHANCE}/low/2.png": f"{ENHANCE}/gt/2.png"},
    "evaluate kodak24": clean("data/test/denoise/kodak24/kodim01.png"),
    "evaluate gopro": {f"{GOPRO}/input/GOPR0384_11_00_000001.png": f"{GOPRO}/target/GOPR0384_11_00_000001.png"},
    "evaluate lol": {"data/test/enhance/lol/input/1.png": "data/test/enhance/lol/target/1.png"},
}
OWN, OWN_TEST = "datasets/train", "datasets/test"
ALLWEATHER = ("beautiful_smile_00003.jpg", "0_rain.png", "im_0001_s80_a04.png")
# name of recipe: set: files; "": files which the recipe leaves alone
LAYOUTS: dict[str, Mapping[str, Pairs]] = {
    "bsd400": {"train bsd400": BSD, "evaluate cbsd68": CBSD68}
    | {"": clean("BSDS500/data/images/val/101085.jpg", "CBSD68/noisy25/0000.png")},
    "wed": {"train wed": WED},
    "denoise_tests": {"evaluate cbsd68": CBSD68, "evaluate urban100": URBAN}
    | {"evaluate kodak24": clean("Kodak24/kodim01.png"), "evaluate mcmaster": clean("McMaster/1.tif")},
    "sr_tests": SR_TESTS | {"evaluate urban100": URBAN, "": clean("Set5/LR_bicubic/X2/babyx2.png")},
    "rain100l": rain100("L") | {"": clean("RainTrainL/rainstreak-1.png")},
    "rain100h": rain100("H"),
    "ots_sots": {
        "train ots": {
            "OTS/part1/0025_0.8_0.04.jpg": "OTS/clear/0025.jpg",
            "OTS/part4/0025_1_0.2.jpg": "OTS/clear/0025.jpg",
            "OTS/part2/3068_0.85_0.1.jpg": "OTS/clear/3068.png",
        },
        "": clean("OTS/clear/7777.jpg"),
    }
    | SOTS_OUT,
    "its_sots": {
        "train its": {
            "ITS/hazy/1_1_0.90179.png": "ITS/clear/1.png",
            "ITS/hazy/1_10_0.98796.png": "ITS/clear/1.png",
            "ITS/hazy/10_1_0.85.png": "ITS/clear/10.png",
        }
    }
    | SOTS_IN,
    "sots": SOTS_IN | SOTS_OUT,
    "div2k": DIV2K,
    "df2k": DIV2K | {"train flickr2k": clean("Flickr2K/Flickr2K_HR/000001.png")},
    "snow100k": {
        "train snow100k": {"Snow100K/train/synthetic/a_00001.jpg": "Snow100K/train/gt/a_00001.jpg"},
        "": clean("Snow100K/train/mask/a_00001.jpg"),
    }
    | snow("S")
    | snow("M")
    | snow("L"),
    "raindrop": {
        "train raindrop": {f"{DROPS}/train/data/860_rain.png": f"{DROPS}/train/gt/860_clean.png"},
        "evaluate raindrop_b": {f"{DROPS}/test_b/data/0_rain.jpg": f"{DROPS}/test_b/gt/0_clean.jpg"},
    }
    | RAINDROP_A,
    "outdoor_rain": {
        "train outdoor_rain": {
            f"CVPR19RainTrain/train/in/im_{n}_s{s}_a04.png": f"CVPR19RainTrain/train/gt/im_{n}.png"
            for n, s in (("0001", 80), ("0001", 100), ("0300", 80), ("0351", 85))
        },
        "": {
            f"CVPR19RainTrain/train/in/im_{n}_s80_a04.png": f"CVPR19RainTrain/train/gt/im_{n}.png"
            for n in ("0301", "0309", "0310", "0349", "0350")
        },
    }
    | TEST1,
    "allweather": {
        f"train {label}": {f"allweather/input/{name}": f"allweather/gt/{name}"}
        for label, name in zip(("snow", "raindrop", "rain"), ALLWEATHER, strict=True)
    }
    | TEST1
    | RAINDROP_A
    | snow("L"),
    "gopro": {
        "train gopro": frames("train", "GOPR0372_07_00/000047.png", "GOPR0372_07_01/000047.png"),
        "evaluate gopro": frames("test", "GOPR0384_11_00/000001.png"),
        "": clean("GOPRO_Large/train/GOPR0372_07_00/blur_gamma/000047.png"),
    },
    "lol": {
        "train lol": {"LOLdataset/our485/low/2.png": "LOLdataset/our485/high/2.png"},
        "evaluate lol": {"LOLdataset/eval15/low/1.png": "LOLdataset/eval15/high/1.png"},
    },
    "gt_rain": {
        "train gt_rain": scenes(
            "train", "Stick_0-1-Webcam-R-000", "Stick_0-1-Webcam-R-288", "North_Cape_0-0-Webcam-R-003"
        ),
        "evaluate gt_rain": scenes("test", "Gurutto_0-0-Webcam-R-040"),
    },
    "mirl": FAMILY | {"": clean("data/Train/Dehaze/original/7777.jpg")},
    "three_tasks": FAMILY,
    "five_tasks": FIVE,
    "mirl_download": {
        "train wed": clean(f"{OWN}/denoise/WED/00007.bmp"),
        "train bsd400": clean(f"{OWN}/denoise/BSD400/100080.jpg"),
        "train rain100l": {
            f"{OWN}/derain/Rain100L/input/rain-101_rainy.png": f"{OWN}/derain/Rain100L/target/rain-101_gt.png"
        },
        "train ots": {
            f"{OWN}/dehaze/OTS/input/0025_{n}_hazy.jpg": f"{OWN}/dehaze/OTS/target/0025_{n}_gt.jpg"
            for n in ("0.9_0.2", "0.95_0.2")
        },
        "evaluate bsd68": clean(f"{OWN_TEST}/denoise/BSD68/101085.jpg"),
        "evaluate urban100": clean(f"{OWN_TEST}/denoise/Urban100/img_001.png"),
        "evaluate rain100l": {
            f"{OWN_TEST}/derain/Rain100L/input/rain-001_rainy.png": f"{OWN_TEST}/derain/Rain100L/target/rain-001_gt.png"
        },
        "evaluate sots_outdoor": {
            f"{OWN_TEST}/dehaze/SOTS/input/0001_0.8_0.2_hazy.jpg": f"{OWN_TEST}/dehaze/SOTS/target/0001_0.8_0.2_gt.png"
        },
    },
}
for letter, pairs in (("e", rain100("L")), ("h", rain100("H"))):
    others = {"train wed": WED, "train bsd400": BSD, "evaluate cbsd68": CBSD68, "evaluate urban100": URBAN}
    LAYOUTS[f"adair_{letter}"] = pairs | SR_TESTS | others | {"train div2k": DIV2K["train div2k"]}
PAIRED = [name for name in sorted(LAYOUTS) if any(c for held in LAYOUTS[name].values() for c in held.values())]


def photo(file: str) -> Image.Image:
    """64 x 72 pixels of a real photograph, another part of it for every name."""
    with Image.open(demo_photos.locate("coffee")[0]) as whole:
        place = zlib.crc32(file.encode())
        x, y = place % (whole.width - 72), place // 1000 % (whole.height - 64)
        return whole.convert("RGB").crop((x, y, x + 72, y + 64))


def lay_out(root: Path, layout: Mapping[str, Pairs]) -> None:
    for file in sorted({f for held in layout.values() for pair in held.items() for f in pair if f}):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        photo(file).save(root / file)


def sizes(layout: Mapping[str, Pairs]) -> dict[str, int]:
    return {label: len(held) for label, held in layout.items() if label}


def found_in(root: Path, pictures: Sequence[discovery.SourceImage]) -> dict[str, Pairs]:
    """What pairing found, as a layout."""
    held: dict[str, dict[str, str | None]] = defaultdict(dict)
    for one in pictures:
        clean, *degraded = (path.relative_to(root).as_posix() for path in one.files)
        held[one.label] |= {degraded[0]: clean} if degraded else {clean: None}
    return dict(held)


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "sets"
    root.mkdir()
    monkeypatch.setenv("MIRL_SETS", str(root))
    return root


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_what_it_is_what_it_expects_and_where_to_get_it(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert shipped(name).name == name
    assert f"# Run: {'' if name == 'demo' else 'export '}" in text
    assert f"mirl-dist shards build shards/{name}.yaml --out shards/{name}" in text
    first = text[: text.index("\nname:")].splitlines()
    assert all(line.startswith("# ") and len(line) <= 121 for line in first), "one block of comment stands first"
    assert any(line.startswith("# Expected: ") for line in first) and first[-1].startswith("# Run: ")
    if name in OFFICIAL:
        assert any(line.startswith("# Layout below MIRL_SETS") for line in first)
        assert any(line.startswith(("# Verified", "# Paper")) for line in first)
    for role, one in shipped(name).sets():
        if one.clean is not None and (name in OFFICIAL or name == "local_data"):
            assert one.expect and one.get, f"{role} {one.set} lacks expect or get"


def test_every_official_recipe_is_tested_here_and_every_recipe_is_in_the_table() -> None:
    assert sorted(LAYOUTS) == OFFICIAL
    table = [line.split("`")[1] for line in (RECIPES / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(name for name in table if not name.startswith("<")) == NAMES
    for name, layout in LAYOUTS.items():
        assert {f"{role} {one.set}" for role, one in shipped(name).sets()} == {label for label in layout if label}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_layouts_are_paired_rightly(name: str, sets: Path) -> None:
    layout = LAYOUTS[name]
    lay_out(sets, layout)
    recipe = expecting(shipped(name), sizes(layout))
    pictures, complaints = discovery.find_images(recipe)
    assert not complaints
    assert found_in(sets, pictures) == {label: held for label, held in layout.items() if label}
    surveyed = inspect_images(recipe, 1, quiet, SingleProcess())
    assert surveyed.images == tuple(pictures) and not surveyed.skipped, "and their pixels can be used"


def told(recipe: Recipe) -> Iterator[tuple[str, str, ImageSet]]:
    """What is said of every set that cannot be found as expected: its role, the sentence, and the set itself."""
    with pytest.raises(UserError) as fault:
        discovery.find_images(recipe)
    said = str(fault.value).splitlines()
    for (role, one), sentence, source in zip(recipe.sets(), said[::2], said[1::2], strict=True):
        assert source == f"  available from: {one.get}"
        yield role, sentence, one


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_missing_folder_or_another_count_is_told_for_every_set_with_its_source(name: str, sets: Path) -> None:
    for role, sentence, one in told(shipped(name)):
        assert sentence.startswith(f"the set '{one.set}' ({role}): no folder at {sets}/")
    lay_out(sets, LAYOUTS[name])
    for role, sentence, one in told(shipped(name)):
        count = len(LAYOUTS[name][f"{role} {one.set}"])
        found = f"found {count} {'images' if one.degraded is None else 'pairs'}, expected {one.expect:,}"
        assert sentence.startswith(f"the set '{one.set}' ({role}): {found}, in {sets}")


@pytest.mark.parametrize("name", PAIRED)
def test_a_missing_partner_is_told_by_name_count_and_source(name: str, sets: Path) -> None:
    layout = LAYOUTS[name]
    lay_out(sets, layout)
    label, degraded, partner = next((lb, d, c) for lb, held in layout.items() if lb for d, c in held.items() if c)
    (sets / partner).unlink()
    total, lonely = len(layout[label]), list(layout[label].values()).count(partner)
    ((role, sentence, one),) = told(expecting(shipped(name), {label: total}))
    assert sentence.startswith(f"the set '{one.set}' ({role}): ")
    if len(set(layout[label].values())) == 1:
        assert "no image in" in sentence, "it was the only clean image"
    else:
        assert f"found {total - lonely} pairs, expected {total}" in sentence
        assert degraded.rpartition("/")[2] in sentence and "no clean partner" in sentence


def test_frames_of_one_name_in_two_sequences_are_two_pairs(sets: Path) -> None:
    lay_out(sets, LAYOUTS["gopro"])
    recipe = changed(shipped("gopro"), lambda label, _: {"expect": None} if label == "train gopro" else None)
    pictures, _ = discovery.find_images(recipe)
    assert [p.name for p in pictures] == ["GOPR0372_07_00/blur/000047.png", "GOPR0372_07_01/blur/000047.png"]
    (sets / "GOPRO_Large/train/GOPR0372_07_01/sharp/000047.png").unlink()
    _, complaints = discovery.find_images(recipe)
    assert [c.portable() for c in complaints] == [
        "train gopro: GOPR0372_07_01/blur/000047.png: no clean partner 'GOPR0372_07_01/sharp/000047'"
    ]


def test_a_path_template_takes_an_id_between_slashes_and_both_sides_the_same_number(tmp_path: Path) -> None:
    folder = {"folder": str(tmp_path), "names": "{id}/blur/{id}"}
    one = {"set": "s", "kind": "deblur", "degraded": folder, "clean": {**folder, "names": "{id}/sharp"}}
    for wrong in ("{id}_{id}/sharp_{id}", "sharp/{any}"):
        found = ImageSet.model_validate({**one, "clean": {**folder, "names": wrong}}).inconsistencies()
        assert any(f"has clean.names '{wrong}'; it must hold {{id}} exactly once" in text for text in found)
    (text,) = ImageSet.model_validate(one).inconsistencies()
    assert text == "pairs '{id}/blur/{id}' with '{id}/sharp'; write {id} as often in both"
    assert discovery.compile_template("{id}/blur/{id}").fullmatch("a/b/blur/c") is None, "an id never spans folders"


def test_a_scene_with_a_clean_frame_for_every_rainy_one_is_told(sets: Path) -> None:
    layout = {"train gt_rain": scenes("train", "Gurutto_1-2-Webcam-R-000", "Gurutto_1-2-Webcam-R-001")}
    lay_out(sets, layout | {"": clean("GT-RAIN_train/Gurutto_1-2/Gurutto_1-2-Webcam-C-001.png")})
    _, complaints = discovery.find_images(expecting(shipped("gt_rain"), {"train gt_rain": 2}))
    assert [c.portable() for c in complaints] == [
        "train gt_rain: Gurutto_1-2/Gurutto_1-2-Webcam-C-001.png: its name does not fit '{id}-C-000'"
    ]


HAZY = 2 * 2061
"""Hazy images of OTS laid out here: two of each clean one instead of 35."""


def training_names() -> Iterator[str]:
    """As many names as the full training sets of the three tasks hold, but for OTS."""
    yield from (f"Denoise/{n:05d}.bmp" for n in range(1, 4745))
    yield from (f"Denoise/{n}.jpg" for n in range(100000, 100400))
    yield from (f"Derain/{part}-{n}.png" for n in range(1, 201) for part in ("rainy/rain", "gt/norain"))
    yield from (f"Dehaze/original/{n:04d}.jpg" for n in range(2061))
    yield from (f"Dehaze/synthetic/part{n % 4 + 1}/{n // 2:04d}_0.{8 + n % 2}_0.04.jpg" for n in range(HAZY))


@pytest.mark.long
def test_mirls_shares_have_their_exact_counts_and_depend_on_seed_and_names_alone(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in training_names():
        (sets / "data/Train" / name).parent.mkdir(parents=True, exist_ok=True)
        (sets / "data/Train" / name).touch()
    wanted = {"train wed": 237, "train bsd400": 20, "train rain100l": 20, "train ots": 2164}
    shipped_shares = {
        f"{role} {one.set}": discovery.count_kept(one.fraction, one.expect)
        for role, one in shipped("mirl").sets()
        if one.fraction and one.expect
    }
    assert shipped_shares == wanted

    def shares(**more: Any) -> dict[str, list[str]]:
        def here(label: str, one: ImageSet) -> dict[str, Any] | None:
            if one.fraction is None:
                return None
            return {"expect": HAZY if label == "train ots" else one.expect} | more

        recipe = changed(shipped("mirl"), here, seed=random.randrange(100))
        pictures, complaints = discovery.find_images(recipe)
        assert not complaints
        held: dict[str, list[str]] = defaultdict(list)
        for one in pictures:
            held[one.label].append(one.name)
        return dict(held)

    drawn = shares()
    counts = {label: len(names) for label, names in drawn.items()}
    assert counts == wanted | {"train ots": discovery.count_kept(0.03, HAZY)}

    glob = Path.glob

    def in_another_order(folder: Path, pattern: str) -> list[Path]:
        return random.sample(found := list(glob(folder, pattern)), len(found))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "glob", in_another_order)
        assert shares() == drawn, "neither the disk's order nor the recipe's seed draws, but draw_seed"
    redrawn = shares(draw_seed=1)
    for label, count in counts.items():
        assert len(redrawn[label]) == count
        assert len(set(redrawn[label]) & set(drawn[label])) < count / 2, f"{label}: another seed, another share"


class Real:
    """Real images of MIRL_DATA in the official layouts, as links. `pairs`: link to (degraded source, clean source)."""

    def __init__(self, data: Path, root: Path) -> None:
        self.root, self.data = root, data
        self.pairs: dict[str, tuple[Path | None, Path]] = {}
        for number, path in enumerate(sorted((data / "train/denoise/BSD400").iterdir())):
            self._images(path, f"BSDS500/data/images/{'train' if number < 200 else 'test'}", "data/Train/Denoise")
        for path in (data / "test/denoise/CBSD68").iterdir():
            self._images(path, "CBSD68", "data/test/denoise/bsd68")
        for path in (data / "test/denoise/Set5").iterdir():
            self._images(path, "Set5")
        for part in ("train", "test"):
            self._rain(data / part / "derain", part)
            for hazy, clear in _sources(data / part / "dehaze/SOTS-indoor", lambda stem: stem.partition("_")[0]):
                self._pair(f"SOTS/indoor/hazy/{hazy.name}", hazy, f"SOTS/indoor/gt/{clear.name}", clear)
        for rainy, clear in _sources(data / "train/derain/GT-RAIN", lambda stem: stem.rpartition("_")[0]):
            scene, _, frame = rainy.stem.rpartition("_")
            folder = f"GT-RAIN_{'test' if scene.startswith('Taitung') else 'train'}/{scene}/{scene}-Webcam"
            self._pair(f"{folder}-R-{frame}.png", rainy, f"{folder}-C-000.png", clear)

    def _link(self, name: str, source: Path) -> None:
        link = self.root / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(source)

    def _images(self, source: Path, *folders: str) -> None:
        for name in (f"{folder}/{source.name}" for folder in folders):
            self._link(name, source)
            self.pairs[name] = (None, source)

    def _pair(self, name: str, degraded: Path, clean_name: str, clean: Path) -> None:
        self._link(name, degraded)
        self._link(clean_name, clean)
        self.pairs[name] = (degraded, clean)

    def _rain(self, data: Path, part: str) -> None:
        for letter in "LH":
            folder = f"RainTrain{letter}" if part == "train" else f"Rain100{letter}"
            for rainy, clear in _sources(data / f"Rain100{letter}", lambda stem: stem):
                number = str(int(rainy.stem)) if part == "train" else rainy.stem
                names = f"rain-{number}{rainy.suffix}", f"norain-{number}{clear.suffix}"
                self._pair(f"{folder}/{names[0]}", rainy, f"{folder}/{names[1]}", clear)
                if letter == "L":
                    test = "data/test/derain/Rain100L"
                    self._pair(
                        f"{test}/input/{int(rainy.stem)}.png", rainy, f"{test}/target/{int(rainy.stem)}.jpg", clear
                    )
                if letter == "L" and part == "train":
                    train = "data/Train/Derain"
                    self._pair(f"{train}/rainy/{names[0]}", rainy, f"{train}/gt/{names[1]}", clear)


def _sources(folder: Path, clean_stem: Callable[[str], str]) -> Iterator[tuple[Path, Path]]:
    """Degraded and clean files of a folder of MIRL_DATA, as its readme says they belong together."""
    targets = {path.stem: path for path in (folder / "target").iterdir()}
    for path in sorted((folder / "input").iterdir()):
        yield path, targets[clean_stem(path.stem)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    data = os.environ.get("MIRL_DATA")
    if not data:
        pytest.skip("MIRL_DATA is not set: no real images of the data sets")
    return Real(Path(data).resolve(), tmp_path_factory.mktemp("real"))


BSD_REAL = {"train bsd400": 400}
FAMILY_REAL = BSD_REAL | {"train rain100l": 75, "evaluate bsd68": 11, "evaluate rain100l": 81}
REAL = {
    "bsd400": BSD_REAL | {"evaluate cbsd68": 11},
    "sr_tests": {"evaluate set5": 5},
    "rain100l": {"train rain100l": 75, "evaluate rain100l": 6},
    "rain100h": {"train rain100h": 15, "evaluate rain100h": 4},
    "gt_rain": {"train gt_rain": 8, "evaluate gt_rain": 2},
    "sots": {"evaluate sots_indoor": 55},
    "mirl": FAMILY_REAL,
}
MOST_BUILT = 12


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def place_of(recipe: Recipe, role: str, name: str) -> str:
    """The folder of a set below MIRL_SETS that holds the files by which its samples are named."""
    one = next(s for r, s in recipe.sets() if (r, s.set) == (role, name))
    folder = one.degraded or one.clean
    assert folder is not None
    return folder.folder.removeprefix("${MIRL_SETS}/")


@pytest.mark.parametrize("name", REAL)
def test_real_images_are_built_into_the_right_pairs(
    name: str, real: Real, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MIRL_SETS", str(real.root))

    def some(label: str, one: ImageSet) -> dict[str, Any] | None:
        if label not in REAL[name]:
            return None
        return {"expect": REAL[name][label]} | ({} if one.fraction else {"limit": MOST_BUILT, "draw_seed": 0})

    recipe = changed(shipped(name), some)
    manifest = build(recipe, Folder(tmp_path / "shards"), 1, quiet)
    sources: list[Path] = []
    for shard in manifest.shards:
        tar = (tmp_path / "shards" / shard.name).read_bytes()
        index = read_index((tmp_path / "shards" / shard.index_name).read_bytes(), shard, shard.name)
        folder = place_of(recipe, shard.role, shard.set)
        for entry in index.entries:
            notes = json.loads(_bytes(tar, entry.parts["json"]))
            degraded, source = real.pairs[f"{folder}/{notes['source']}"]
            sources.append(source)
            for which, file in ((CLEAN, source), (DEGRADED, degraded)):
                held = entry.image(which)
                assert (held is None) == (file is None)
                if held is not None and file is not None:
                    assert held.format == ("ppm" if shard.role == "train" else "png")
                    stored, wanted = _bytes(tar, held), pixels(file)
                    assert np.array_equal(np.array(Image.open(io.BytesIO(stored))), wanted), (name, notes["source"])
                    assert held.format == "png" or stored.endswith(wanted.tobytes()), "raw pixels"
    drawn = {"train bsd400": 20, "train rain100l": 8} if name == "mirl" else {}
    assert len(sources) == sum(drawn.get(label, min(count, MOST_BUILT)) for label, count in REAL[name].items())
    if name in ("sots", "gt_rain"):
        assert len(set(sources)) < len(sources), "several degraded images of one clean one are among them"


def _bytes(tar: bytes, part: Part | StoredImage) -> bytes:
    return tar[part.offset : part.offset + part.size]


def test_published_tests_of_rain_show_images_of_bsd400(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/datasets.md says of Rain100L and Rain100H; the build refuses it where it is not allowed."""
    monkeypatch.setenv("MIRL_SETS", str(real.root))
    counts = {label: FAMILY_REAL[label] for label in ("train bsd400", "evaluate rain100l")}
    recipe = expecting(shipped("three_tasks"), counts)
    assert recipe.allow_overlap
    with pytest.raises(UserError, match="67 images serve both training and evaluation"):
        inspect_images(recipe.model_copy(update={"allow_overlap": False}), 1, quiet, SingleProcess())
    for part in ("train", "test"):
        for path in (real.data / part / "derain/Rain100H/target").iterdir():
            heavy, light = pixels(path), pixels(real.data / part / f"derain/Rain100L/target/{path.stem}.jpg")
            assert np.array_equal(light[: heavy.shape[0], : heavy.shape[1]], heavy), "the upper left of the same image"


@pytest.mark.long
def test_local_data_holds_all_it_can_and_training_shares_nothing_with_evaluation(real: Real) -> None:
    recipe = shipped("local_data")
    assert not recipe.allow_overlap
    wanted = {"bsd400": 400, "rain100l": 75, "rain100h": 15, "gt_rain": 10, "sots_indoor": 48}
    scored = {"cbsd68": 11, "set5": 5, "rain100l": 6, "rain100h": 4, "sots_indoor": 7}
    assert {one.set: one.expect for one in recipe.train} == wanted
    assert {one.set: one.expect for one in recipe.evaluate} == scored
    found = inspect_images(recipe, 1, quiet, SingleProcess())
    assert len(found.images) == sum(wanted.values()) + sum(scored.values()) and not found.skipped
    webcams = [p for p in found.images if p.set == "gt_rain"]
    assert len({p.clean for p in webcams}) == 5
