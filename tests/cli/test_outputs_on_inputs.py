"""No command that writes files lets one land on what it reads, or on a file of a run, however the path is spelled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_outputs import contents
from tests.services.lab import recipe_of

Spell = Callable[[Path], Path]


def dotted(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


def linked(path: Path) -> Path:
    link = path.with_name(f"link-to-{path.name}")
    link.symlink_to(path)
    return link


def hard(path: Path) -> Path:
    link = path.with_name(f"hard-{path.name}")
    os.link(path, link)
    return link


def through_a_linked_folder(path: Path) -> Path:
    link = path.parent.with_name(f"link-to-{path.parent.name}")
    link.symlink_to(path.parent, target_is_directory=True)
    return link / path.name


SPELLINGS: dict[str, Spell] = {
    "itself": lambda path: path,
    "..": dotted,
    "link": linked,
    "hard link": hard,
    "linked folder": through_a_linked_folder,
}
COMMANDS: dict[str, tuple[str, Callable[[str, str, str], list[str]]]] = {
    # the name of an input, and the command that is to write there; run: a run with shards beside it
    "import": ("in/m.ckpt", lambda here, _, out: ["import", f"{here}/in/m.ckpt", "--out", out]),
    "pack": ("run/run.json", lambda here, _, out: ["tickets", "pack", f"{here}/run", "--out", out]),
    "pictures": ("run/initial.safetensors", lambda here, _, out: ["tickets", "pictures", f"{here}/run", "--out", out]),
    "export": (
        "in/t.safetensors",
        lambda here, _, out: ["tickets", "export", f"{here}/in/t.safetensors", "--out", out],
    ),
    "table on a ticket": (
        "in/t.safetensors",
        lambda here, shards, out: ["evaluate", f"{here}/in/t.safetensors", "--shards", shards, "--table", out],
    ),
    "table on shards": (
        "shards/manifest.json",
        lambda here, _, out: ["evaluate", f"{here}/run", "--shards", f"{here}/shards", "--table", out],
    ),
}


@pytest.fixture
def here(lab: Any, reference: Path, packed: Path, tmp_path: Path) -> Path:
    """A run, shards, and a folder with a packed ticket and a checkpoint, none of which may change."""
    shutil.copytree(reference, tmp_path / "run")
    shutil.copytree(lab.shards, tmp_path / "shards")
    (tmp_path / "in").mkdir()
    shutil.copy(packed, tmp_path / "in" / "t.safetensors")
    shutil.copy(reference / "initial.safetensors", tmp_path / "in" / "m.ckpt")
    return tmp_path


@pytest.fixture(scope="module")
def packed(lab: Any, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "a.ticket"
    lab.mirl("tickets", "pack", str(reference), "--out", str(out)).ok()
    return out


def refused(ended: Any, *texts: str) -> None:
    assert ended.codes == (2,) and len(ended.err.splitlines()) == 1, ended.said()
    assert not texts or any(text in ended.err for text in texts), ended.said()


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_never_replaces_an_input(lab: Any, here: Path, name: str, spelling: str) -> None:
    target, command = COMMANDS[name]
    out = SPELLINGS[spelling](here / target)
    before = contents(here)
    ended = lab.mirl(*command(str(here), str(here / "shards"), str(out)), "--overwrite")
    refused(ended, "which this command reads", "is a file of the run", "names no format")
    assert contents(here) == before


def test_a_comparison_or_a_restored_image_never_replaces_its_ticket(lab: Any, here: Path) -> None:
    folder = here / "in"
    shutil.copy(folder / "t.safetensors", folder / "tickets.csv")
    shutil.copy(folder / "t.safetensors", folder / "x.png")
    shutil.copy(lab.folder / "images" / "evaluate" / "chelsea.png", here / "x.png")
    outs = folder, dotted(folder), linked(folder)
    before = contents(here)
    for out in outs:
        command = ["tickets", "compare", str(folder / "tickets.csv"), "--out", str(out), "--no-pictures"]
        refused(lab.mirl(*command, "--overwrite"), "which this command reads")
        command = ["restore", str(here / "x.png"), "--ticket", str(folder / "x.png"), "--out", str(out)]
        refused(lab.mirl(*command, "--overwrite"), "which this command reads")
    assert contents(here) == before


@pytest.mark.parametrize("out", ["run", "run/rounds", "run/rounds/../rounds/00", "link"])
def test_shards_are_not_built_into_a_run(lab: Any, here: Path, out: str) -> None:
    (here / "link").symlink_to(here / "run", target_is_directory=True)
    before = contents(here)
    ended = lab.mirl("shards", "build", str(lab.folder / "recipe.yaml"), "--out", str(here / out), "--workers", "1")
    refused(ended)
    assert contents(here) == before


@pytest.mark.parametrize("name", ["manifest.json", "contact_sheet.png"])
def test_shards_never_replace_their_recipe(lab: Any, name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "d" / name
    recipe.parent.mkdir()
    recipe.write_text(json.dumps(recipe_of(lab.folder / "images")))
    before = contents(tmp_path)
    refused(lab.mirl("shards", "build", str(recipe), "--out", str(linked(recipe.parent)), "--workers", "1"))
    assert contents(tmp_path) == before


def test_a_run_never_replaces_its_config(lab: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = Path(shutil.move(lab.config(tmp_path), folder / "run.json"))
    before = config.read_bytes()
    refused(lab.mirl("train", str(config), "--set", f"run.folder={linked(folder)}"), "run.json")
    assert config.read_bytes() == before


@pytest.mark.parametrize("spelling", ["itself", "linked folder"])
def test_a_run_never_replaces_the_weights_that_it_starts_from(
    lab: Any, reference: Path, spelling: str, tmp_path: Path
) -> None:
    file = tmp_path / "run" / "initial.safetensors"
    file.parent.mkdir()
    shutil.copy(reference / file.name, file)
    weights = SPELLINGS[spelling](file)
    for launch in ([], ["--launch", "auto"]):
        arguments = lab.train(tmp_path, {"model.weights": str(weights)}, *launch)
        before = contents(tmp_path)
        refused(lab.start(*arguments, cwd=tmp_path).wait(), "model.weights: found ", "in run.folder")
        assert contents(tmp_path) == before
