"""Images as cameras and programs write them: through `restore` and `shards build`, to the pixel."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.test_image_files import CASES, PIXELS, oriented, save, tiff
from tests.services.lab import PROGRAMS


def restored(lab: Any, reference: Path, file: Path, out: Path, *more: str) -> Any:
    ended = lab.mirl("restore", str(file), "--ticket", str(reference), "--out", str(out), *more).ok()
    return np.asarray(Image.open(out / f"{file.stem}.png")), ended.out


def test_a_photograph_that_lies_on_its_side_is_restored_upright(lab: Any, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "side.png").write_bytes(oriented(6, format="PNG"))
    (tmp_path / "plain.png").write_bytes(save(format="PNG"))
    upright, out = restored(lab, reference, tmp_path / "side.png", tmp_path / "a")
    plain, silent = restored(lab, reference, tmp_path / "plain.png", tmp_path / "b")
    assert np.array_equal(upright, plain) and "turned upright (images: 1)" in out and "turned" not in silent
    assert Image.open(tmp_path / "a" / "side.png").getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_restored_image_has_the_bits_of_the_evaluated_one(lab: Any, precision: str, tmp_path: Path) -> None:
    short = {"train.epochs": 1, "schedule.warmup_epochs": 0, "prune.rounds": 0, "evaluate.precision": precision}
    lab.play(tmp_path, short, world=1).ok()
    script, folders = str(PROGRAMS / "pixels.py"), [tmp_path / "evaluated", tmp_path / "restored"]
    for folder in folders:
        folder.mkdir()

    def run(folder: Path, *arguments: str) -> None:
        lab.start(*arguments, cwd=tmp_path, script=script, env={"MIRL_PIXELS": str(folder)}).wait().ok()

    run(folders[0], "evaluate", "run")
    inputs = sorted(folders[0].glob("*-in.npy"))
    assert [np.load(path).dtype for path in inputs] == [np.uint8] * 3, "noise, rain and haze"
    images = [tmp_path / f"{path.stem}.png" for path in inputs]
    for path, image in zip(inputs, images, strict=True):
        Image.fromarray(np.load(path)).save(image)
    run(folders[1], "restore", *map(str, images), "--ticket", "run", "--out", str(tmp_path / "out"))
    for number, path in enumerate(inputs):
        evaluated, restored = np.load(f"{path}".replace("-in", "-out")), np.load(folders[1] / f"{number:02d}-out.npy")
        assert evaluated.tobytes() == restored.tobytes()
    switches = [json.loads((folder / "switches.json").read_text()) for folder in folders]
    exact = {"tf32": [False, False], "deterministic": True, "fill": False, "workspace": ":4096:8"}
    assert switches == [exact, exact]


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases of the field lie beside MIRL_DATA, which is not set")
@pytest.mark.parametrize("name", ["exif6.jpg", "exif3.jpg", "icc.png", "bigtext.png", "anim.png"])
def test_files_of_the_field_are_restored_as_a_viewer_shows_them(
    lab: Any, reference: Path, name: str, tmp_path: Path
) -> None:
    viewer = CASES / f"{Path(name).stem}_viewer.png"
    expected, _ = restored(lab, reference, viewer if viewer.exists() else CASES / "plain.png", tmp_path / "viewer")
    found, _ = restored(lab, reference, CASES / name, tmp_path / "file")
    assert np.array_equal(found, expected)


def test_a_deep_image_is_refused_in_one_line_before_any_is_restored(lab: Any, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(save(format="PNG"))
    (tmp_path / "deep.tif").write_bytes(tiff(16, planar=True))
    images = [str(tmp_path / name) for name in ("good.png", "deep.tif")]
    ended = lab.mirl("restore", *images, "--ticket", str(reference), "--out", str(tmp_path / "out"))
    assert ended.rc == 2 and "deep.tif has 16 bits per channel" in ended.err, ended.said()
    assert len(ended.err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_names_that_steer_a_terminal_are_shown_escaped(lab: Any, reference: Path, tmp_path: Path) -> None:
    name = "a\x1b[31m\nb.png"
    (tmp_path / name).write_bytes(b"no image")
    ended = lab.mirl("restore", str(tmp_path / name), "--ticket", str(reference), "--out", str(tmp_path / "out"))
    assert ended.rc == 2 and "\x1b" not in ended.err and len(ended.err.splitlines()) == 1, ended.said()
    assert r"a\x1b[31m\nb.png" in ended.err


@pytest.mark.parametrize("tile, text", [("63", "Give 64 or more"), ("big", "Use auto, none or"), ("-1", "Use auto")])
def test_a_tile_that_is_none_is_refused(lab: Any, reference: Path, tile: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(save(format="PNG"))
    arguments = [str(tmp_path / "x.png"), "--ticket", str(reference), "--out", str(tmp_path / "out")]
    ended = lab.mirl("restore", *arguments, f"--tile={tile}")
    assert ended.rc == 2 and "--tile: found" in ended.err and text in ended.err, ended.said()


@pytest.mark.long
def test_an_image_that_does_not_fit_into_memory_is_restored_in_tiles_or_named(reference: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (1400, 1400, 3), dtype=np.uint8)).save(tmp_path / "large.png")
    Image.fromarray(PIXELS).save(tmp_path / "a_small.png")
    images = [str(tmp_path / name) for name in ("a_small.png", "large.png")]

    def run(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mirl_dist", "restore", *images, "--ticket", str(reference)]
        return subprocess.run(
            [*command, "--out", str(tmp_path / out), *more],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
            check=False,
        )

    whole = run("whole", "--tile", "none")
    assert whole.returncode == 2 and "Traceback" not in whole.stderr, whole.stderr
    assert "large.png (1400x1400 pixels) does not fit into the memory" in whole.stderr and "--tile" in whole.stderr
    assert [p.name for p in (tmp_path / "whole").iterdir()] == ["a_small.png"], "what was restored before stays"
    tiled = run("tiled")
    assert tiled.returncode == 0, tiled.stderr
    assert "large.png (1400x1400) is restored in tiles of" in tiled.stdout
    with Image.open(tmp_path / "tiled" / "large.png") as image:
        assert image.size == (1400, 1400)


@pytest.mark.long
def test_an_evaluation_that_does_not_fit_into_memory_names_image_and_tile(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for folder, side in (("train", 64), ("evaluate", 1400)):
        (tmp_path / folder).mkdir()
        pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / f"{folder}.png")
    sets = {f: [{"set": "big", "kind": "clean", "clean": {"folder": str(tmp_path / f)}}] for f in ("train", "evaluate")}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "big", "least_pixels": 16} | sets))
    shards = str(tmp_path / "shards")
    lab.mirl("shards", "build", str(tmp_path / "recipe.yaml"), "--out", shards, "--workers", "1").ok()

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mirl_dist", "evaluate", str(reference), "--shards", shards, *more],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2300 << 20, 2300 << 20)),
            check=False,
        )

    whole = run()
    assert whole.returncode == 2 and "Traceback" not in whole.stderr, whole.stderr
    assert "denoise_25/big, image 'evaluate-big-" in whole.stderr, whole.stderr
    assert "its 1392x1392 pixels do not fit into the memory" in whole.stderr and "(or --tile) 512" in whole.stderr
    assert run("--tile", "512").returncode == 0


def recipe(tmp_path: Path, **changes: Any) -> str:
    one = {"set": "mine", "kind": "derain"} | changes
    tree = {"name": "mine", "least_pixels": 16, "train": [one]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    return str(tmp_path / "recipe.yaml")


def folders(tmp_path: Path) -> tuple[Path, Path]:
    pair = tmp_path / "clean", tmp_path / "rainy"
    for folder in pair:
        folder.mkdir()
    return pair


def build(lab: Any, tmp_path: Path, **changes: Any) -> Any:
    clean, rainy = (str(tmp_path / name) for name in ("clean", "rainy"))
    sides = {"clean": {"folder": clean}, "degraded": {"folder": rainy}}
    command = ["shards", "build", recipe(tmp_path, **(sides | changes)), "--out", str(tmp_path / "shards")]
    return lab.mirl(*command, "--workers", "1")


def test_a_pair_of_which_one_side_is_turned_is_built_aligned(lab: Any, tmp_path: Path) -> None:
    clean, rainy = folders(tmp_path)
    (clean / "1.png").write_bytes(oriented(3, format="PNG"))
    (rainy / "1.png").write_bytes(save(format="PNG"))
    ended = build(lab, tmp_path).ok()
    assert "train mine: turned upright (images: 1)" in ended.err
    assert "degraded image equal to its clean partner (images: 1)" in ended.err, "both show the same"


def test_what_is_not_used_is_counted_by_reason(lab: Any, tmp_path: Path) -> None:
    clean, rainy = folders(tmp_path)
    for name, form in (("1.png", "PNG"), ("2.jfif", "JPEG"), ("3.JPE", "JPEG"), ("4.ppm", "PPM"), ("5.avif", "AVIF")):
        for folder in (clean, rainy):
            (folder / name).write_bytes(save(format=form))
    for name in ("notes.txt", "more.txt", ".hidden.png", "old_6.png"):
        (clean / name).write_bytes(save(format="PNG"))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(clean / "1.png", tmp_path / "elsewhere" / "7.png")
    (clean / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    side = {"folder": str(clean), "include": ["**/*"], "exclude": ["old_*"]}
    ended = build(lab, tmp_path, clean=side).ok()
    (line,) = (line for line in ended.err.splitlines() if "not used in" in line)
    assert f"not used in {clean}: " in line
    for reason in ("2 files of the ending '.txt'", "1 hidden files", "1 linked folders", "1 images that no 'include'"):
        assert reason in line, line
    assert '"samples": 5' in (tmp_path / "shards" / "manifest.json").read_text()


def test_a_glob_that_nothing_fits_is_refused(lab: Any, tmp_path: Path) -> None:
    clean, rainy = folders(tmp_path)
    for folder in (clean, rainy):
        (folder / "1.png").write_bytes(save(format="PNG"))
    side = {"folder": str(clean), "include": ["*.png", "*.jpg"]}
    ended = build(lab, tmp_path, clean=side)
    assert ended.rc == 2 and "fits '*.jpg'" in ended.err, ended.said()
    build(lab, tmp_path, clean=side, expect=1).ok()


def test_two_forms_of_one_name_are_one_pair(lab: Any, tmp_path: Path) -> None:
    clean, rainy = folders(tmp_path)
    (clean / "u\u0308ber.png").write_bytes(save(format="PNG"))
    (rainy / "\u00fcber.png").write_bytes(save(PIXELS[::-1], format="PNG"))
    build(lab, tmp_path).ok()


def test_grey_images_that_are_scored_as_rgb_are_named_by_set_with_the_scores(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for name, modes in {"old": ("L", "L"), "mixed": ("RGB", "L"), "colour": ("RGB", "RGB")}.items():
        (tmp_path / name).mkdir()
        for number, mode in enumerate(modes):
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(tmp_path / name / f"{name}-{number}.png")
    sets = [{"set": n, "kind": "clean", "clean": {"folder": str(tmp_path / n)}} for n in ("old", "mixed", "colour")]
    tree = {"name": "grey", "least_pixels": 16, "train": sets[:1], "evaluate": sets, "allow_overlap": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    shards = str(tmp_path / "shards")
    lab.mirl("shards", "build", str(tmp_path / "recipe.yaml"), "--out", shards, "--workers", "1").ok()
    command = ["evaluate", str(reference), "--shards", shards, "--protocol", "promptir", "--protocol", "basicsr_y"]
    said = [line for line in lab.mirl(*command).ok().out.splitlines() if "grey" in line]
    text = "grey images, scored as RGB with three equal channels by promptir"
    assert said == [f"mixed: {text} (images: 1)", f"old: {text} (images: 2)"]
    assert json.loads(lab.mirl(*command, "--json").ok().out)["grey_images"] == {"mixed": 1, "old": 2}
    assert "grey" not in lab.mirl(*command[:4], "--protocol", "basicsr_y").ok().out, "Y of grey is what it is"
