"""An output never lands on an input, on a file of a run, or, without --overwrite, on any file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.services.lab import recipe_of


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and the digest of its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in ("x.png", "q.jpg", "q.png"):
        Image.fromarray(draw.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(folder / name)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    os.link(folder / "x.png", folder / "hard.png")
    return folder


@pytest.mark.parametrize(
    "image, out, text",
    [
        ("x.png", "photos", "x.png, which this command reads"),
        ("x.png", "link", "x.png, which this command reads"),
        ("x.png", "photos/../link", "x.png, which this command reads"),
        ("q.jpg", "photos", "q.png exists already. Choose another name, or add --overwrite"),
    ],
)
def test_a_restored_image_never_replaces_a_photograph(
    lab: Any, reference: Path, photos: Path, image: str, out: str, text: str
) -> None:
    before = contents(photos)
    command = ["restore", str(photos / image), "--ticket", str(reference), "--out", str(photos.parent / out)]
    ended = lab.mirl(*command)
    assert ended.rc == 2 and text in ended.err and len(ended.err.splitlines()) == 1, ended.said()
    assert contents(photos) == before
    ended = lab.mirl(*command, "--overwrite")
    if "reads" in text:
        assert ended.rc == 2 and contents(photos) == before, ended.said()
    else:
        assert ended.rc == 0, ended.said()
        assert {name for name, digest in contents(photos).items() if before[name] != digest} == {"q.png"}


def test_two_spellings_of_one_output_are_refused(lab: Any, reference: Path, photos: Path, tmp_path: Path) -> None:
    images = [str(photos / "q.jpg"), str(photos / "q.png")]
    ended = lab.mirl("restore", *images, "--ticket", str(reference), "--out", str(tmp_path / "out"))
    assert ended.rc == 2 and "two images are named 'q'" in ended.err, ended.said()
    assert not (tmp_path / "out").exists()


COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "pack": lambda run, out: ["tickets", "pack", run, "--out", out],
    "pictures": lambda run, out: ["tickets", "pictures", run, "--out", out],
    "export": lambda run, out: ["tickets", "export", run, "--out", out],
    "evaluate": lambda run, out: ["evaluate", run, "--table", out],
    "import": lambda run, out: ["import", f"{run}/initial.safetensors", "--out", out],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("target", ["run.json", "initial.safetensors"])
def test_no_file_of_a_run_is_ever_replaced(lab: Any, reference: Path, name: str, target: str, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(reference, run)
    before = contents(run)
    ended = lab.mirl(*COMMANDS[name](str(run), str(run / target)), "--overwrite")
    assert ended.rc == 2 and len(ended.err.splitlines()) == 1, ended.said()
    assert "is a file of the run" in ended.err or "which this command reads" in ended.err or "extension" in ended.err
    assert contents(run) == before


@pytest.mark.parametrize("name", ["pack", "pictures", "export"])
def test_an_existing_output_needs_overwrite(lab: Any, reference: Path, name: str, tmp_path: Path) -> None:
    out = tmp_path / "x.ckpt"
    out.write_bytes(b"mine")
    command = COMMANDS[name](str(reference), str(out))
    ended = lab.mirl(*command)
    assert ended.rc == 2 and f"{out} exists already" in ended.err and out.read_bytes() == b"mine", ended.said()
    if name == "export":  # the tiny network has no official size; its refusal leaves the file too
        return
    assert lab.mirl(*command, "--overwrite").rc == 0 and out.read_bytes() != b"mine"


def test_a_checkpoint_is_not_converted_onto_itself(lab: Any, reference: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    shutil.copy(reference / "initial.safetensors", file)
    before = file.read_bytes()
    ended = lab.mirl("import", str(file), "--out", str(file), "--overwrite")
    assert ended.rc == 2 and "which this command reads" in ended.err, ended.said()
    assert file.read_bytes() == before


def test_a_comparison_replaces_its_files_only_when_asked(lab: Any, reference: Path, tmp_path: Path) -> None:
    command = ["tickets", "compare", str(reference), "--out", str(tmp_path / "report"), "--no-pictures"]
    assert lab.mirl(*command).rc == 0
    before = contents(tmp_path / "report")
    ended = lab.mirl(*command)
    assert ended.rc == 2 and "tickets.csv exists already" in ended.err and contents(tmp_path / "report") == before
    assert lab.mirl(*command, "--overwrite").rc == 0


@pytest.mark.parametrize(
    "glob, out, refused",
    [("*", "images/train", True), ("**/*", "images/train/deep/shards", True), ("*", "images/train/shards", False)],
)
def test_shards_are_not_built_among_the_images(lab: Any, glob: str, out: str, refused: bool, tmp_path: Path) -> None:
    shutil.copytree(lab.folder / "images", tmp_path / "images")
    recipe = recipe_of(tmp_path / "images")
    for one in recipe["train"]:
        one["clean"]["include"] = [glob]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    before = contents(tmp_path / "images")
    ended = lab.mirl("shards", "build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / out), "--workers", "1")
    if refused:
        assert ended.rc == 2 and "among the images of the set" in ended.err, ended.said()
        assert contents(tmp_path / "images") == before
    else:
        assert ended.rc == 0, ended.said()


def test_a_contact_sheet_of_somebody_else_stays(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "contact_sheet.png").write_bytes(b"mine")
    recipe = str(lab.folder / "recipe.yaml")
    ended = lab.mirl("shards", "build", recipe, "--out", str(tmp_path / "shards"), "--workers", "1")
    assert ended.rc == 2 and "contact_sheet.png" in ended.err, ended.said()
    assert (tmp_path / "shards" / "contact_sheet.png").read_bytes() == b"mine"
