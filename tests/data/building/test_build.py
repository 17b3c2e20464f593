"""Laws of building shards, on real photographs."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from mirl_dist.config.seeding import rng
from mirl_dist.data import image_strip
from mirl_dist.data.building import contact_sheet
from mirl_dist.data.building.build import build
from mirl_dist.data.building.check import check
from mirl_dist.data.building.recipe import read
from mirl_dist.data.building.resume import LOCK, MARKER
from mirl_dist.data.degradations.degrade import rain
from mirl_dist.data.image_files import examine
from mirl_dist.data.manifest import Manifest, ppm_header, read_manifest
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, Rejected, Store
from mirl_dist.storage.http import HttpStore
from tests.data.loaders import flip, indices, made, photo, quiet, recipe

RECIPES = Path(__file__).resolve().parents[3] / "shards"
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


def contents(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


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


def training(*sets: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "s", "least_pixels": 32, "train": list(sets), **more}


def counts(manifest: Manifest, role: str) -> dict[str, int]:
    """Kind -> its number of samples."""
    held: Counter[str] = Counter()
    for shard in manifest.role(role):
        held[shard.kind] += shard.samples
    return dict(held)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("shards") / "small"
    return out, made(SMALL, out)


def test_plain_webdataset_reads_the_shards(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    held = [sample for s in manifest.shards if s.set == "rain" for sample in plainly(out / s.name)]
    assert len(held) == 2
    for sample in held:
        notes = sample["json"]
        clean = photo(notes["source"].removesuffix(".png"))
        assert np.array_equal(np.array(sample["clean.ppm"]), clean), "the pixels of the source, exactly"
        assert sample["degraded.ppm"].size == sample["clean.ppm"].size
        assert (notes["set"], notes["kind"], notes["y"], notes["x"]) == ("rain", "derain", 0, 0)


def test_plain_tar_lists_the_shards(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    shard = next(s for s in manifest.shards if s.set == "clean" and s.role == "train")
    ended = subprocess.run(["tar", "tf", str(out / shard.name)], capture_output=True, text=True, check=True)
    listed = ended.stdout.split()
    assert listed == [f"{e.key}.{part}" for e in indices(out, manifest)[shard.name].entries for part in sorted(e.parts)]
    stored = {name.partition(".")[2] for name in listed}
    assert stored == {"clean.ppm", "json"}, "what the reader degrades is not stored"


def test_the_index_leads_to_every_member_without_the_tar_headers(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    for name, index in indices(out, manifest).items():
        data = (out / name).read_bytes()
        for entry in index.entries:
            for part, place in entry.parts.items():
                held = data[place.offset : place.offset + place.size]
                assert hashlib.sha256(held).hexdigest() == place.sha256
                if part != "json":
                    assert Image.open(io.BytesIO(held)).size == (entry.width, entry.height)


def test_training_images_are_raw_pixels_after_a_header_that_the_size_decides(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    shard = next(s for s in manifest.shards if s.set == "clean" and s.role == "train")
    entry = indices(out, manifest)[shard.name].entries[0]
    found = entry.image("clean")
    assert found is not None and found.format == "ppm" and entry.image("degraded") is None
    held = (out / shard.name).read_bytes()[found.offset : found.offset + found.size]
    header = b"P6\n%d %d\n255\n" % (entry.width, entry.height)
    source = photo("chelsea" if entry.height == 300 else "coffee")
    assert header == ppm_header(entry.height, entry.width) and held == header + source.tobytes()


def test_png_is_stored_where_the_recipe_says_so_and_always_to_score_on(
    built: tuple[Path, Manifest], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = made(SMALL, out, train_format="png")
    entries = [e for index in indices(out, manifest).values() for e in index.entries]
    assert {e.image("clean").format for e in entries} == {"png"}  # type: ignore[union-attr]
    assert sum(s.bytes for s in manifest.shards) < 0.8 * sum(s.bytes for s in built[1].shards)
    scored = [e for s in built[1].role("evaluate") for e in indices(*built)[s.name].entries]
    assert {part for entry in scored for part in entry.parts} == {"clean.png", "degraded.png", "json"}
    assert check(Folder(out), 1, quiet) == []


def test_the_manifest_counts_what_is_there(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    assert manifest == read_manifest((out / "manifest.json").read_bytes(), "")
    assert counts(manifest, "train") == {"clean": 2, "derain": 2}
    assert counts(manifest, "evaluate") == {"dehaze": 1, "clean": 1}
    entries = [e for index in indices(out, manifest).values() for e in index.entries]
    assert len({e.key for e in entries}) == len(entries) == 6
    assert {(e.height, e.width) for e in entries} == {(300, 451), (400, 600), (100, 100), (500, 741)}
    assert sorted(s.least_pixels for s in manifest.shards) == [100, 300, 300, 400, 400, 500]


def test_shards_of_raw_pixels_have_the_size_that_was_asked_for(tmp_path: Path) -> None:
    """Nine images of 40 x 40 take 9 x (512 + 5,120 + 1,024) bytes."""
    tree = training(folder(tmp_path / "in", count=9))
    for bytes_, samples in ((9 * 6656, [9]), (9 * 6656 - 1, [5, 4]), (3 * 6656, [3, 3, 3])):
        manifest = made(tree, tmp_path / f"out{bytes_}", shard_megabytes=bytes_ / 2**20)
        assert sorted((s.samples for s in manifest.shards), reverse=True) == samples
        assert all(s.bytes <= bytes_ + 1024 + 10240 for s in manifest.shards), "a tar ends at a whole record"


def test_the_contact_sheet_has_a_row_for_every_set_and_is_always_the_same(built: tuple[Path, Manifest]) -> None:
    out, manifest = built
    rows = image_strip.rows((out / contact_sheet.NAME).read_bytes())
    assert [(row.title, len(row.images)) for row in rows] == [
        ("train clean: clean, 2 images", 2),
        ("train rain: derain, 2 pairs, degraded | clean", 4),
        ("evaluate haze: dehaze, 1 pairs, degraded | clean", 2),
        ("evaluate clean: clean, 1 images", 1),
    ]
    assert {image.shape for row in rows for image in row.images} == {(contact_sheet.SIDE, contact_sheet.SIDE, 3)}
    middle = image_strip.centre(photo("motorcycle_left"), contact_sheet.SIDE)
    assert np.array_equal(rows[-1].images[0], middle), "crops of what lies in the shards"
    assert contact_sheet.draw_sheet(Folder(out), manifest) == (out / contact_sheet.NAME).read_bytes()


def test_the_table_says_what_every_set_holds(built: tuple[Path, Manifest]) -> None:
    lines = contact_sheet.lines(Folder(built[0]), built[1])
    assert lines[1].split() == ["train", "clean", "clean", "2", "451x300", "to", "600x400", "1.1", "2"]
    assert lines[3].split()[:5] == ["evaluate", "haze", "dehaze", "1", "100x100"]
    assert lines[-1].startswith(f"6 shards, {sum(s.bytes for s in built[1].shards) / 1e6:.1f} MB, in {built[0]}")


@pytest.mark.long
def test_the_number_of_workers_does_not_change_a_byte(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    build(recipe(SMALL), Folder(tmp_path / "two"), 2, quiet)
    assert contents(tmp_path / "two") == contents(built[0])


def test_a_made_degradation_does_not_depend_on_the_other_images(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    alone = {**SMALL, "evaluate": [], "train": [{**SMALL["train"][1], "photographs": ["coffee"]}]}
    manifest = made(alone, tmp_path / "alone")

    def rainy(out: Path, of: Manifest) -> dict[str, str]:
        entries = [e for index in indices(out, of).values() for e in index.entries]
        return {e.key: e.parts["degraded.ppm"].sha256 for e in entries if e.key.startswith("train-rain-coffee")}

    assert rainy(tmp_path / "alone", manifest) == rainy(*built)
    ((key, digest),) = rainy(*built).items()
    whole = rain(photo("coffee"), rng(0, "rain", key))
    assert hashlib.sha256(ppm_header(400, 600) + whole.tobytes()).hexdigest() == digest, "made over the whole image"


def test_versions_are_pairs_of_their_own_and_the_first_is_the_one_made_without_them(tmp_path: Path) -> None:
    rainy: dict[int, dict[str, bytes]] = {}
    for versions in (1, 3):
        one = folder(tmp_path / "images") | {"kind": "derain", "make": "rain", "versions": versions}
        tree = {"name": "v", "least_pixels": 40, "train": [one]}
        manifest = made(tree, tmp_path / str(versions))
        assert manifest.shards[0].samples == 2 * versions
        held = plainly(tmp_path / str(versions) / manifest.shards[0].name)
        rainy[versions] = {sample["__key__"]: sample["degraded.ppm"].tobytes() for sample in held}
        assert {sample["json"]["source"] for sample in held} == {"0.png", "1.png"}
    assert rainy[1].items() <= rainy[3].items()
    assert len(set(rainy[3].values())) == 6, "no two are alike"


def test_snow_is_made_too(tmp_path: Path) -> None:
    one = {"set": "snow", "kind": "desnow", "photographs": ["rocket"], "make": "snow", "centre_pixels": 64}
    manifest = made({"name": "s", "evaluate": [one]}, tmp_path / "out")
    (sample,) = plainly(tmp_path / "out" / manifest.shards[0].name)
    clean, snowy = (np.array(sample[f"{which}.png"]).astype(int) for which in ("clean", "degraded"))
    assert manifest.shards[0].kind == "desnow" and clean.shape == (64, 64, 3) and (clean != snowy).any()


def test_building_again_keeps_what_is_whole_and_mends_what_is_not(tmp_path: Path) -> None:
    """Shards of different builds never mix, also after a finished one was damaged."""
    tree, out = training(folder(tmp_path / "in", count=4), shard_megabytes=0.01), tmp_path / "out"
    said: list[str] = []
    manifest = made(tree, out)
    before, (first, second, third, *_) = contents(out), manifest.shards
    assert build(recipe(tree), Folder(out), 1, lambda done, total, what: said.append(what)) == manifest
    assert said[-1] == "already built" and "writing shards" not in said
    flip(out / first.name, 700)
    (out / second.name).unlink()
    (out / ".writing-1").write_bytes(b"half")
    untouched = (out / third.name).stat().st_mtime_ns
    assert made(tree, out) == manifest
    assert contents(out) == before and (out / third.name).stat().st_mtime_ns == untouched


def test_the_place_of_the_images_does_not_change_a_byte(tmp_path: Path) -> None:
    for place in ("here", "there"):
        made(training(folder(tmp_path / place / "in")), tmp_path / place / "out")
    assert contents(tmp_path / "here/out") == contents(tmp_path / "there/out")


def test_shards_of_another_recipe_are_not_overwritten(tmp_path: Path) -> None:
    tree = training(folder(tmp_path / "in"))
    made(tree, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="holds shards of another recipe or other images .* Choose another --out"):
        made(tree, tmp_path / "out", seed=1)
    Image.fromarray(photo("chelsea")[:40, :40]).save(tmp_path / "in/0.png")
    with pytest.raises(UserError, match="other images"):
        made(tree, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="says format None.*Or choose another --out"):
        made(tree, tmp_path / "out")


def test_shards_that_no_build_of_ours_left_are_not_removed(tmp_path: Path) -> None:
    tree = training(folder(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-imagenet-00000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="train-imagenet-00000.tar.*without a manifest"):
        made(tree, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["train-imagenet-00000.tar"]


def test_two_builds_do_not_write_into_one_folder(tmp_path: Path) -> None:
    tree = training(folder(tmp_path / "in"))
    out = tmp_path / "out"
    (out / LOCK).parent.mkdir(parents=True)
    with (out / LOCK).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another build is writing into {out}. Wait for it"):
            made(tree, out)
    made(tree, out)
    tar, index = "train-s-00000.tar", "train-s-00000.index.json"
    assert sorted(os.listdir(out)) == ["contact_sheet.png", "manifest.json", index, tar]


KILLED = """
import os
import signal
import sys
import time
from pathlib import Path

import mirl_dist.data.building.build as building
from mirl_dist.data.building.recipe import read
from mirl_dist.storage import open_store

encode = building._write_tar

def slowly(plan, path):
    if plan.name.startswith("train-c"):
        time.sleep(60)
    return encode(plan, path)

def report(done, total, what):
    if (done, what) == (2, "writing shards"):
        os.kill(os.getpid(), signal.SIGKILL)

building._write_tar = slowly  # in the workers too, which import this file
if __name__ == "__main__":
    building.build(read(Path(sys.argv[1])), open_store(sys.argv[2]), 2, report)
"""


def killed_build(tmp_path: Path, out: str, env: Mapping[str, str] = {}) -> Path:
    """A build of nine shards into `out`, by two workers, ended by SIGKILL after two of them or more; its recipe."""
    tree = {**SMALL, "shard_megabytes": 0.01, "evaluate": []}
    tree["train"] = [
        {"set": name, "kind": "derain", "make": "rain", "photographs": ["chelsea", "coffee", "ihc"]}
        for name in ("a", "b", "c")
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree))
    (tmp_path / "run.py").write_text(KILLED)
    killed = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(path), out],
        env={**os.environ, "PYTHONPATH": str(RECIPES.parent), **env},
    )
    assert killed.returncode == -9
    time.sleep(0.2)  # a worker that outlived its parent would still write
    return path


def test_a_build_killed_in_the_middle_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = killed_build(tmp_path, str(out))
    assert not (out / "manifest.json").exists() and (out / MARKER).exists()
    done = [p.stem for p in (out / MARKER).parent.glob("train-*.json")]
    assert 2 <= len(done) <= 6
    before = {name: (out / f"{name}.tar").stat() for name in done}
    with pytest.raises(UserError, match=rf"{out} holds an unfinished build of another .*'small'.*Choose another --out"):
        build(read(path, ["seed=1"]), Folder(out), 1, quiet)
    said: list[str] = []
    manifest = build(read(path), Folder(out), 1, lambda done, total, what: said.append(what))
    assert len(manifest.shards) == 9 and not (out / MARKER).parent.exists()
    for name, old in before.items():
        new = (out / f"{name}.tar").stat()
        assert (new.st_ino, new.st_mtime_ns) == (old.st_ino, old.st_mtime_ns), "what was done is left as it is"
    build(read(path), Folder(tmp_path / "undisturbed"), 1, quiet)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.long
def test_a_shard_of_a_killed_build_that_was_damaged_since_is_written_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = killed_build(tmp_path, str(out))
    flip(out / f"{min(p.stem for p in (out / MARKER).parent.glob('train-*.json'))}.tar", 700)
    (out / MARKER).parent.joinpath("train-c-00002.json").write_text("{")
    build(read(path), Folder(out), 1, quiet)
    assert check(Folder(out), 1, quiet) == []


@pytest.mark.long
def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    killed_build(tmp_path, str(tmp_path / "out"), {"TMPDIR": str(tmp_path / "tmp")})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    made(SMALL, tmp_path / "other")
    assert os.listdir(tmp_path / "tmp") == []


def test_a_full_folder_for_temporary_files_is_named_and_leaves_no_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond this
    try:
        with pytest.raises(UserError, match=f"cannot write {tempfile.gettempdir()}: File too large. Every worker"):
            made(SMALL, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(out) == [".building"], "nothing but the mark of a build that died"
    made(SMALL, out)
    assert check(Folder(out), 1, quiet) == []


class Unremovable(Folder):
    """A place where things may be written, but not removed."""

    def remove(self, name: str) -> None:
        raise Rejected(f"{self.where(name)}: nothing can be removed here. Allow it.")


def another(path: Path) -> Folder:
    """A folder that holds the manifest of another recipe."""
    path.mkdir()
    (path / "manifest.json").write_bytes(Manifest(name="theirs", recipe="f" * 64, shards=()).dump())
    return Folder(path)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda path: HttpStore("http://127.0.0.1:9/shards"), "a web address can only be read. Give a folder or s3://"),
        (lambda path: Unremovable(path / "out"), "nothing can be removed here. Allow it."),
        (lambda path: another(path / "out"), r"holds shards of another recipe .*'theirs', f{12}; this is 's'\)"),
        (lambda path: Folder(path / "file"), "cannot write .*/file: (Not a directory|File exists)"),
        (lambda path: Folder(path / "file/out"), "cannot write .*/file/out: Not a directory"),
    ],
    ids=["web", "unremovable", "another", "file", "below a file"],
)
def test_a_place_that_cannot_take_shards_is_refused_before_any_image_is_read(
    place: Callable[[Path], Store], said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    heard: list[str] = []
    tree = training(folder(tmp_path / "in"))
    with pytest.raises(UserError, match=said):
        build(recipe(tree), place(tmp_path), 1, lambda done, total, what: heard.append(what))
    assert "checking images" not in heard


def test_trying_a_place_leaves_nothing_there_when_the_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    one = {"set": "s", "kind": "clean", "clean": {"folder": str(tmp_path / "in")}}
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(UserError, match=r"a\.png: is empty"):
            made({"name": "s", "train": [one]}, tmp_path / name)
    assert os.listdir(tmp_path / "there") == [] and not (tmp_path / "new").exists()


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
    deep, small = Image.fromarray(np.zeros((64, 64), np.uint16)), image.crop((0, 0, 64, 20))
    bad = {
        "cut.jpg": (encoded(image, "JPEG")[:-400], "is damaged"),
        "cut.png": (encoded(image, "PNG")[:-400], "is damaged"),
        "empty.png": (b"", "is empty"),
        "text.png": (b"<html>404</html>", "is not an image that Pillow can read"),
        "deep.png": (encoded(deep, "PNG"), "has 16 bits per channel"),
        "deep_rgb.png": (png_of_16_bits(), "has 16 bits per channel"),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG"), "has Pillow's mode 'CMYK'"),
        "glassy.png": (encoded(glassy, "PNG"), "has transparent pixels"),
        "small.png": (encoded(small, "PNG"), "is 64x20, its shorter side below least_pixels, 32"),
    }
    one = folder(tmp_path / "in")
    for name, (data, _) in bad.items():
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in/gone.png").symlink_to("nowhere")
    tree = training(one)
    with pytest.raises(UserError) as fault:
        made(tree, tmp_path / "out")
    text = str(fault.value)
    assert text.startswith("10 things in the images of recipe 's' are wrong:")
    for name, (_, reason) in bad.items():
        assert f"{tmp_path}/in/{name}: {reason}" in text
    assert f"{tmp_path}/in/gone.png: cannot be read (No such file or directory)" in text
    assert "broken: skip" in text and not (tmp_path / "out").exists()
    manifest = build(recipe(tree, broken="skip"), Folder(tmp_path / "out"), 2, quiet)
    assert counts(manifest, "train") == {"clean": 2}
    assert len(manifest.skipped) == 10 and str(tmp_path) not in manifest.dump().decode()
    assert any(line.startswith("train s: cut.jpg: is damaged") for line in manifest.skipped)


def test_at_most_twenty_faults_are_listed_and_all_counted(tmp_path: Path) -> None:
    one = folder(tmp_path / "in")
    for n in range(30):
        (tmp_path / f"in/bad{n}.png").write_bytes(b"")
    with pytest.raises(UserError) as fault:
        made(training(one), tmp_path / "out")
    assert str(fault.value).count("is empty") == 20
    assert str(fault.value).startswith("30 things") and "and 10 more" in str(fault.value)


def test_a_set_without_any_usable_image_stops_also_when_skipping(tmp_path: Path) -> None:
    one = folder(tmp_path / "in", side=20)
    with pytest.raises(UserError, match=r"no usable image is left in: train s\.\n.*0.png: is 20x20, its shorter side"):
        made(training(one, broken="skip"), tmp_path)


def test_pairs_of_different_sizes_are_named(tmp_path: Path) -> None:
    one = {**folder(tmp_path / "a", side=40), "kind": "derain"}
    folder(tmp_path / "b", side=50)
    one["degraded"] = {"folder": str(tmp_path / "b")}
    with pytest.raises(UserError, match=rf"{tmp_path}/b/0.png: is 50x50, its clean partner 0.png 40x40"):
        made(training(one), tmp_path / "out")


def test_an_image_in_training_and_evaluation_is_refused_in_any_format(tmp_path: Path) -> None:
    train, evaluate = folder(tmp_path / "train"), folder(tmp_path / "test", count=1)
    (tmp_path / "test/0.png").unlink()
    Image.open(tmp_path / "train/0.png").save(tmp_path / "test/other.bmp")
    tree = training(train, evaluate=[evaluate])
    with pytest.raises(UserError, match=r"1 images serve both training and evaluation:\n.*0.png = .*other.bmp"):
        made(tree, tmp_path / "out")
    assert counts(made(tree, tmp_path / "out", allow_overlap=True), "evaluate") == {"clean": 1}


def test_grey_palette_and_opaque_alpha_become_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(photo("coffee")[:40, :40])
    (tmp_path / "in").mkdir()
    image.convert("L").save(tmp_path / "in/grey.png")
    image.convert("P").save(tmp_path / "in/palette.png")
    image.convert("RGBA").save(tmp_path / "in/opaque.png")
    image.convert("1").save(tmp_path / "in/bits.tif")
    one = {"set": "s", "kind": "clean", "clean": {"folder": str(tmp_path / "in")}}
    out = tmp_path / "out"
    manifest = made({"name": "s", "evaluate": [one]}, out)
    shard = manifest.shards[0]
    for sample in plainly(out / shard.name):
        with Image.open(tmp_path / "in" / sample["json"]["source"]) as source:
            assert np.array_equal(np.array(sample["clean.png"]), np.array(source.convert("RGB")))


def test_an_image_that_changes_during_the_build_is_named(tmp_path: Path) -> None:
    one = folder(tmp_path / "in")

    def spoil(done: int, total: int, what: str) -> None:
        if what == "writing shards" and done == 0:
            (tmp_path / "in/1.png").write_bytes((tmp_path / "in/0.png").read_bytes())

    with pytest.raises(UserError, match="1.png changed while the shards were built"):
        build(recipe(training(one)), Folder(tmp_path / "out"), 1, spoil)
    assert not (tmp_path / "out/manifest.json").exists()


def test_no_real_image_is_refused() -> None:
    if not os.environ.get("MIRL_DATA"):
        pytest.skip("MIRL_DATA does not name a folder of real benchmark images")
    files = sorted(Path(os.environ["MIRL_DATA"]).glob("test/**/*.*"))
    images = [f for f in files if f.suffix != ".md"]
    assert len(images) > 50
    assert [f for f in images if examine(f).problem is not None] == []
