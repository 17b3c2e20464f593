"""Laws of building shards, on real photographs."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from mirl_dist import yaml_tree
from mirl_dist.data import photographs
from mirl_dist.data.build import build
from mirl_dist.data.check import check
from mirl_dist.data.degrade import Pixels, generator, rain
from mirl_dist.data.manifest import Index, Manifest, ppm_header, read_index, read_manifest
from mirl_dist.data.recipe import Recipe, read
from mirl_dist.data.source_image import examine
from mirl_dist.data.unfinished import LOCK, MARKER
from mirl_dist.faults import Fault
from mirl_dist.storage import Folder, open_store

RECIPES = Path(__file__).parent.parent / "shards"
SMALL: dict[str, Any] = {
    "name": "small",
    "shard_megabytes": 0.6,
    "train": [
        {"set": "clean", "kind": "clean", "photographs": ["chelsea", "coffee"]},
        {"set": "rain", "kind": "derain", "photographs": ["chelsea", "coffee"], "make": "rain"},
    ],
    "evaluate": [
        {"set": "haze", "kind": "dehaze", "photographs": ["rocket"], "make": "haze", "centre_pixels": 100},
        {"set": "clean", "kind": "clean", "photographs": ["motorcycle_left"]},
    ],
}


def quiet(done: int, total: int, what: str) -> None:
    pass


def recipe(tree: dict[str, Any], **more: Any) -> Recipe:
    return yaml_tree.build(Recipe, {**tree, **more}, "the test")


def contents(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def indices(out: Path, manifest: Manifest) -> dict[str, Index]:
    return {s.name: read_index((out / s.index_name).read_bytes(), s, s.index_name) for s in manifest.shards}


def photo(name: str) -> Pixels:
    return np.array(Image.open(photographs.locate(name)[0]).convert("RGB"))


def plainly(tar: Path) -> list[dict[str, Any]]:
    """What webdataset reads without a word from us. It leaves the file to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        held = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode("pil"))
        gc.collect()
    return held


def folder(path: Path, count: int = 2, side: int = 40) -> dict[str, Any]:
    """A set of real crops in PNG files under `path`."""
    path.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.fromarray(photo("coffee")[n * side : (n + 1) * side, 200 : 200 + side]).save(path / f"{n}.png")
    return {"set": "s", "kind": "clean", "clean": {"folder": str(path)}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("shards") / "small"
    return out, build(recipe(SMALL), Folder(out), 1, quiet)


def test_plain_webdataset_reads_the_shards(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    shard = next(s for s in manifest.shards if s.set == "rain")
    held = plainly(out / shard.name)
    assert len(held) == shard.samples
    for sample in held:
        assert sample["clean.png"].size == sample["degraded.png"].size == (96, 96)
        notes = sample["json"]
        clean = photo(notes["source"].removesuffix(".png"))
        tile = clean[notes["y"] : notes["y"] + 96, notes["x"] : notes["x"] + 96]
        assert np.array_equal(np.array(sample["clean.png"]), tile), "the pixels of the source, exactly"
        assert (notes["set"], notes["kind"]) == ("rain", "derain")


def test_plain_tar_lists_the_shards(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    shard = next(s for s in manifest.shards if s.set == "clean" and s.role == "train")
    listed = subprocess.run(
        ["tar", "tf", str(out / shard.name)], capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = [f"{e.key}.{part}" for e in indices(out, manifest)[shard.name].entries for part in sorted(e.parts)]
    assert listed == wanted
    assert {name.partition(".")[2] for name in listed} == {"clean.png", "json"}, "noise is not stored"


def test_the_index_leads_to_every_member_without_the_tar_headers(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    for name, index in indices(out, manifest).items():
        data = (out / name).read_bytes()
        for entry in index.entries:
            for part, place in entry.parts.items():
                held = data[place.offset : place.offset + place.size]
                assert hashlib.sha256(held).hexdigest() == place.sha256
                if part.endswith(".png"):
                    assert Image.open(io.BytesIO(held)).size == (entry.width, entry.height)


def test_the_manifest_counts_what_is_there(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    assert manifest == read_manifest((out / "manifest.json").read_bytes(), "")
    tiles = 4 * 5 + 5 * 7  # chelsea 451x300, coffee 600x400
    assert manifest.samples("train") == {"clean": tiles, "derain": tiles}
    assert manifest.samples("evaluate") == {"dehaze": 1, "clean": 1}
    entries = [e for index in indices(out, manifest).values() for e in index.entries]
    assert len({e.key for e in entries}) == len(entries) == 2 * tiles + 2
    assert {(e.height, e.width) for e in entries} == {(96, 96), (100, 100), (500, 741)}
    assert len([s for s in manifest.shards if s.set == "clean" and s.role == "train"]) == 2


def test_a_whole_build_checks_clean(built: tuple[Path, Manifest]) -> None:
    assert check(Folder(built[0]), 1, quiet) == []


def test_the_number_of_workers_does_not_change_a_byte(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    build(recipe(SMALL), Folder(tmp_path / "two"), 2, quiet)
    assert contents(tmp_path / "two") == contents(built[0])


def test_a_made_degradation_does_not_depend_on_the_other_images(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    alone = {**SMALL, "evaluate": [], "train": [{**SMALL["train"][1], "photographs": ["coffee"]}]}
    manifest = build(recipe(alone), Folder(tmp_path / "alone"), 1, quiet)

    def rain(out: Path, of: Manifest) -> dict[str, str]:
        entries = [e for index in indices(out, of).values() for e in index.entries]
        return {e.key: e.parts["degraded.png"].sha256 for e in entries if e.key.startswith("train-rain-coffee")}

    assert rain(tmp_path / "alone", manifest) == rain(*built)
    assert len(set(rain(*built).values())) == 35, "every tile has its own rain"


def test_building_again_keeps_what_is_whole_and_mends_what_is_not(tmp_path: Path) -> None:
    small = recipe({"name": "s", "least_pixels": 32, "train": [folder(tmp_path / "in")]})
    said: list[str] = []
    first = build(small, Folder(tmp_path / "out"), 1, quiet)
    before = contents(tmp_path / "out")
    assert build(small, Folder(tmp_path / "out"), 1, lambda d, t, what: said.append(what)) == first
    assert said[-1] == "already built" and "writing shards" not in said
    tar = tmp_path / "out" / first.shards[0].name
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    (tmp_path / "out" / ".partial-1-train-s-00000.tar").write_bytes(b"half")
    assert build(small, Folder(tmp_path / "out"), 1, quiet) == first
    assert contents(tmp_path / "out") == before


def test_the_place_of_the_images_does_not_change_a_byte(tmp_path: Path) -> None:
    for place in ("here", "there"):
        small = recipe({"name": "s", "least_pixels": 32, "train": [folder(tmp_path / place / "in")]})
        build(small, Folder(tmp_path / place / "out"), 1, quiet)
    assert contents(tmp_path / "here/out") == contents(tmp_path / "there/out")


def test_shards_of_another_recipe_are_not_overwritten(tmp_path: Path) -> None:
    tree = {"name": "s", "least_pixels": 32, "train": [folder(tmp_path / "in")]}
    build(recipe(tree), Folder(tmp_path / "out"), 1, quiet)
    before = contents(tmp_path / "out")
    with pytest.raises(Fault, match="holds shards of another recipe or other images .* Choose another --out"):
        build(recipe(tree, seed=1), Folder(tmp_path / "out"), 1, quiet)
    Image.fromarray(photo("chelsea")[:40, :40]).save(tmp_path / "in/0.png")
    with pytest.raises(Fault, match="other images"):
        build(recipe(tree), Folder(tmp_path / "out"), 1, quiet)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/manifest.json").write_text("{}")
    with pytest.raises(Fault, match="says format None.*Choose another --out, or remove that folder"):
        build(recipe(tree), Folder(tmp_path / "out"), 1, quiet)


def test_shards_that_no_build_of_ours_left_are_not_removed(tmp_path: Path) -> None:
    tree = {"name": "s", "least_pixels": 32, "train": [folder(tmp_path / "in")]}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-imagenet-00000.tar").write_bytes(b"precious")
    with pytest.raises(Fault, match="train-imagenet-00000.tar.*without a manifest"):
        build(recipe(tree), Folder(tmp_path / "out"), 1, quiet)
    assert os.listdir(tmp_path / "out") == ["train-imagenet-00000.tar"]


def test_two_builds_do_not_write_into_one_folder(tmp_path: Path) -> None:
    tree = {"name": "s", "least_pixels": 32, "train": [folder(tmp_path / "in")]}
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / MARKER).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Fault, match="another build is writing into"):
            build(recipe(tree), Folder(tmp_path / "out"), 1, quiet)
    build(recipe(tree), Folder(tmp_path / "out"), 1, quiet)
    assert not (tmp_path / "out" / MARKER).exists()


def test_a_build_killed_in_the_middle_is_replaced_by_the_same_bytes(tmp_path: Path) -> None:
    tree = {**SMALL, "shard_megabytes": 0.01, "evaluate": [], "tile_pixels": 128}
    tree["train"] = [
        {"set": name, "kind": "derain", "make": "rain", "photographs": ["chelsea", "coffee", "ihc"]}
        for name in ("a", "b", "c")
    ]
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(json.dumps(tree))
    code = (
        "import sys, time; from pathlib import Path\n"
        "from mirl_dist.data.build import build; from mirl_dist.data.recipe import read\n"
        "def report(done, total, what):\n"
        "    print(done, what, flush=True)\n"
        "    if (done, what) == (2, 'writing shards'): time.sleep(60)\n"
        "if __name__ == '__main__': build(read(Path(sys.argv[1])), Path(sys.argv[2]), 2, report)\n"
    )
    (tmp_path / "run.py").write_text(code)
    root = str(Path(__file__).parent.parent)
    killed = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(path), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert killed.stdout is not None
    for line in killed.stdout:
        if line == "2 writing shards\n":
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait()
    killed.stdout.close()
    left = os.listdir(out)
    assert any(name.endswith(".tar") for name in left) and "manifest.json" not in left and MARKER in left
    manifest = build(read(path), Folder(out), 1, quiet)
    assert len(manifest.shards) == 9
    before = contents(out)
    time.sleep(0.2)  # a worker that outlived its parent would still write
    build(read(path), Folder(tmp_path / "undisturbed"), 1, quiet)
    assert contents(out) == before == contents(tmp_path / "undisturbed")


def test_a_full_disk_is_named_and_leaves_no_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond this
    try:
        with pytest.raises(Fault, match=rf"cannot write {out}/train-clean-00000.tar: File too large. Make room"):
            build(recipe(SMALL), Folder(out), 1, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(out) == [MARKER], "nothing but the mark of a build that died"
    build(recipe(SMALL), Folder(out), 1, quiet)
    assert check(Folder(out), 1, quiet) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tree = {"name": "s", "least_pixels": 32, "train": [folder(tmp_path / "in")]}
    with pytest.raises(Fault, match=rf"cannot write {tmp_path}/file/out: Not a directory"):
        build(recipe(tree), Folder(tmp_path / "file/out"), 1, quiet)


def encoded(image: Image.Image, ending: str) -> bytes:
    held = io.BytesIO()
    image.save(held, ending)
    return held.getvalue()


def png_of_16_bits() -> bytes:
    """A 1x1 RGB PNG of 16 bits per channel, which Pillow would read as 8 without a word."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 7)) + chunk(b"IEND", b"")


def test_every_image_that_cannot_be_used_is_named_with_its_reason(tmp_path: Path) -> None:
    image = Image.fromarray(photo("coffee")[:64, :64])
    glassy = image.copy()
    glassy.putalpha(100)
    bad = {
        "cut.jpg": (encoded(image, "JPEG")[:-400], "is damaged"),
        "cut.png": (encoded(image, "PNG")[:-400], "is damaged"),
        "empty.png": (b"", "is empty"),
        "text.png": (b"<html>404</html>", "is not an image that Pillow can read"),
        "deep.png": (
            encoded(Image.fromarray(np.zeros((64, 64), np.uint16)), "PNG"),
            "has 16 bits per channel",
        ),
        "deep_rgb.png": (png_of_16_bits(), "has 16 bits per channel"),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG"), "has Pillow's mode 'CMYK'"),
        "glassy.png": (encoded(glassy, "PNG"), "has transparent pixels"),
        "small.png": (
            encoded(image.crop((0, 0, 64, 20)), "PNG"),
            "is 64x20, smaller than a training tile of 32",
        ),
    }
    one = folder(tmp_path / "in")
    for name, (data, _) in bad.items():
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in/gone.png").symlink_to("nowhere")
    tree = {"name": "s", "least_pixels": 32, "train": [one]}
    with pytest.raises(Fault) as fault:
        build(recipe(tree), Folder(tmp_path / "out"), 1, quiet)
    text = str(fault.value)
    assert text.startswith("10 things in the images of recipe 's' are wrong:")
    for name, (_, reason) in bad.items():
        assert f"{tmp_path}/in/{name}: {reason}" in text
    assert f"{tmp_path}/in/gone.png: cannot be read (No such file or directory)" in text
    assert "broken: skip" in text and not (tmp_path / "out").exists()
    manifest = build(recipe(tree, broken="skip"), Folder(tmp_path / "out"), 2, quiet)
    assert manifest.samples("train") == {"clean": 8}
    assert len(manifest.skipped) == 10 and str(tmp_path) not in manifest.dump().decode()
    assert any(line.startswith("train s: cut.jpg: is damaged") for line in manifest.skipped)


def test_at_most_twenty_faults_are_listed_and_all_counted(tmp_path: Path) -> None:
    one = folder(tmp_path / "in")
    for n in range(30):
        (tmp_path / f"in/bad{n}.png").write_bytes(b"")
    with pytest.raises(Fault) as fault:
        build(recipe({"name": "s", "least_pixels": 32, "train": [one]}), Folder(tmp_path / "out"), 1, quiet)
    assert str(fault.value).count("is empty") == 20
    assert str(fault.value).startswith("30 things") and "and 10 more" in str(fault.value)


def test_a_set_without_any_usable_image_stops_also_when_skipping(tmp_path: Path) -> None:
    one = folder(tmp_path / "in", side=20)
    with pytest.raises(Fault, match=r"no usable image is left in: train s\.\n.*0.png: is 20x20, smaller"):
        build(recipe({"name": "s", "least_pixels": 32, "broken": "skip", "train": [one]}), Folder(tmp_path), 1, quiet)


def test_pairs_of_different_sizes_are_named(tmp_path: Path) -> None:
    one = {**folder(tmp_path / "a", side=40), "kind": "derain"}
    folder(tmp_path / "b", side=50)
    one["degraded"] = {"folder": str(tmp_path / "b")}
    with pytest.raises(Fault, match=rf"{tmp_path}/b/0.png: is 50x50, its clean partner 0.png 40x40"):
        build(recipe({"name": "s", "least_pixels": 32, "train": [one]}), Folder(tmp_path / "out"), 1, quiet)


def test_an_image_in_training_and_evaluation_is_refused_in_any_format(tmp_path: Path) -> None:
    train, evaluate = folder(tmp_path / "train"), folder(tmp_path / "test", count=1)
    (tmp_path / "test/0.png").unlink()
    Image.open(tmp_path / "train/0.png").save(tmp_path / "test/other.bmp")
    tree = {"name": "s", "least_pixels": 32, "train": [train], "evaluate": [evaluate]}
    with pytest.raises(Fault, match=r"1 images serve both training and evaluation:\n.*0.png = .*other.bmp"):
        build(recipe(tree), Folder(tmp_path / "out"), 1, quiet)
    assert build(recipe(tree, allow_overlap=True), Folder(tmp_path / "out"), 1, quiet).samples("evaluate") == {"clean": 1}


def test_grey_palette_and_opaque_alpha_become_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(photo("coffee")[:40, :40])
    (tmp_path / "in").mkdir()
    image.convert("L").save(tmp_path / "in/grey.png")
    image.convert("P").save(tmp_path / "in/palette.png")
    image.convert("RGBA").save(tmp_path / "in/opaque.png")
    image.convert("1").save(tmp_path / "in/bits.tif")
    one = {"set": "s", "kind": "clean", "clean": {"folder": str(tmp_path / "in")}}
    out = tmp_path / "out"
    manifest = build(recipe({"name": "s", "evaluate": [one]}), Folder(out), 1, quiet)
    shard = manifest.shards[0]
    for sample in plainly(out / shard.name):
        with Image.open(tmp_path / "in" / sample["json"]["source"]) as source:
            assert np.array_equal(np.array(sample["clean.png"]), np.array(source.convert("RGB")))


def test_an_image_that_changes_during_the_build_is_named(tmp_path: Path) -> None:
    one = folder(tmp_path / "in")

    def spoil(done: int, total: int, what: str) -> None:
        if what == "writing shards" and done == 0:
            (tmp_path / "in/1.png").write_bytes((tmp_path / "in/0.png").read_bytes())

    with pytest.raises(Fault, match="1.png changed while the shards were built"):
        build(recipe({"name": "s", "least_pixels": 32, "train": [one]}), Folder(tmp_path / "out"), 1, spoil)
    assert not (tmp_path / "out/manifest.json").exists()


def test_real_benchmark_images_become_shards(tmp_path: Path) -> None:
    if not os.environ.get("MIRL_DATA"):
        pytest.skip("MIRL_DATA does not name a folder of real benchmark images")
    tree = read(RECIPES / "local_data.yaml").model_dump(exclude_none=True)
    for one in [*tree["train"], *tree["evaluate"]]:
        one["limit"] = 2
    out = tmp_path / "out"
    manifest = build(recipe(tree), Folder(out), 1, quiet)
    assert manifest.samples("train") == {"clean": 24, "derain": 24, "dehaze": 40}
    assert manifest.samples("evaluate") == {"clean": 2, "derain": 2, "dehaze": 2}
    assert manifest.skipped == () and check(Folder(out), 1, quiet) == []


def test_no_real_image_is_refused() -> None:
    if not os.environ.get("MIRL_DATA"):
        pytest.skip("MIRL_DATA does not name a folder of real benchmark images")
    files = sorted(Path(os.environ["MIRL_DATA"]).glob("test/**/*.*"))
    images = [f for f in files if f.suffix != ".md"]
    assert len(images) > 50
    assert [f for f in images if examine(f).problem is not None] == []
