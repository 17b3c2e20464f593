"""What ranks that build shards together owe each other, in real processes."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.observability.console import rank_label

pytestmark = pytest.mark.long


def contents(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def test_ranks_build_the_same_bytes_as_one_process(lab: Any, tmp_path: Path) -> None:
    arguments = ("shards", "build", str(lab.folder / "recipe.yaml"), "--workers", "1", "--out")
    ended = lab.start(*arguments, str(tmp_path / "three"), cwd=tmp_path, world=3).wait()
    assert ended.codes == (0, 0, 0) and ended.err == "", ended.said()
    assert ended.out.count("train     clean") == 1, "rank 0 alone tells"
    assert contents(tmp_path / "three") == contents(lab.shards)


def test_a_launcher_starts_ranks_that_build(lab: Any, tmp_path: Path) -> None:
    launcher = ("accelerate", "launch", "--config_file", str(Path(__file__).parents[2] / "launch/cpu_two.yaml"))
    arguments = ("-m", "mirl_dist", "shards", "build", str(lab.folder / "recipe.yaml"), "--workers", "1")
    ended = lab.cold(*launcher, *arguments, "--out", str(tmp_path / "out"), cwd=tmp_path).wait()
    assert ended.rc == 0, ended.said()
    assert contents(tmp_path / "out") == contents(lab.shards)


def recipe(lab: Any, tmp_path: Path, **more: Any) -> str:
    tree = json.loads((lab.folder / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree | more))
    return str(tmp_path / "recipe.yaml")


def test_a_missing_set_ends_all_ranks_with_one_text(lab: Any, tmp_path: Path) -> None:
    one = {"set": "s", "kind": "clean", "clean": {"folder": str(tmp_path / "no")}, "get": "from Ada, CC0"}
    path = recipe(lab, tmp_path, train=[one])
    ended = lab.start("shards", "build", path, "--out", "out", cwd=tmp_path, world=2).wait()
    assert ended.codes == (2, 2), ended.said()
    assert ended.err.startswith("mirl-dist: the set 's' (train): no folder at") and ended.err.count("from Ada") == 1


def test_an_image_that_is_damaged_ends_all_ranks_with_one_text(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"no image")
    path = recipe(lab, tmp_path, train=[{"set": "s", "kind": "clean", "clean": {"folder": str(tmp_path / "in")}}])
    ended = lab.start("shards", "build", path, "--out", "out", cwd=tmp_path, world=3).wait()
    assert ended.codes == (2, 2, 2), ended.said()
    assert ended.err.count("a.png: is not an image that Pillow can read") == 1


SPOILED = """
import os, sys
import mirl_dist.data.building.build as building
from mirl_dist.cli.app import main
from mirl_dist.errors import UserError

encode = building._write_tar

def spoiled(plan, path):
    if os.environ["RANK"] == "1":
        if os.environ["HOW"] == "fault":
            raise UserError("found a spoiled image, here, do that.")
        if os.environ["HOW"] == "error":
            raise ZeroDivisionError("unforeseen")
        open(os.environ["READY"], "w").close()
        while True: pass
    return encode(plan, path)

building._write_tar = spoiled
main()
"""


def spoil(lab: Any, tmp_path: Path, how: str) -> Any:
    (tmp_path / "spoiled.py").write_text(SPOILED)
    arguments = ("shards", "build", str(lab.folder / "recipe.yaml"), "--workers", "1", "--out", "out")
    env = {"HOW": how, "READY": str(tmp_path / "ready")}
    return lab.start(*arguments, cwd=tmp_path, world=2, script=str(tmp_path / "spoiled.py"), env=env)


def test_a_fault_of_one_rank_while_writing_ends_all_and_the_build_goes_on_later(lab: Any, tmp_path: Path) -> None:
    ended = spoil(lab, tmp_path, "fault").wait()
    assert ended.codes == (2, 2), ended.said()
    assert ended.err == f"mirl-dist: {rank_label(1)}: found a spoiled image, here, do that.\n"
    assert not (tmp_path / "out/manifest.json").exists()
    arguments = ("shards", "build", str(lab.folder / "recipe.yaml"), "--workers", "1", "--out", str(tmp_path / "out"))
    again = lab.mirl(*arguments)
    assert again.rc == 0 and contents(tmp_path / "out") == contents(lab.shards), again.said()


def test_an_unforeseen_error_of_one_rank_ends_the_others_too(lab: Any, tmp_path: Path) -> None:
    ended = spoil(lab, tmp_path, "error").wait()
    assert ended.codes == (1, 1), ended.said()
    assert "ZeroDivisionError: unforeseen" in ended.err and f"{rank_label(0)}: another rank has exited" in ended.err


def test_a_rank_that_is_killed_ends_the_others(lab: Any, tmp_path: Path) -> None:
    import os
    import signal

    started = spoil(lab, tmp_path, "hang")
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    os.kill(started.pids[1], signal.SIGKILL)
    ended = started.wait()
    assert ended.codes == (1, -9), ended.said()
    assert f"{rank_label(0)}: another rank has exited" in ended.err


APART = """
import os
from mirl_dist.cli.app import main

if os.environ["RANK"] == "1":
    os.chdir(os.environ["ELSEWHERE"])
main()
"""


def apart(lab: Any, tmp_path: Path, *arguments: str) -> Any:
    """A build by two ranks of which the second works in the folder 'elsewhere', as on a node of its own."""
    (tmp_path / "apart.py").write_text(APART)
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    env = {"ELSEWHERE": str(tmp_path / "elsewhere")}
    script = str(tmp_path / "apart.py")
    arguments = ("shards", "build", *arguments, "--workers", "1")
    return lab.start(*arguments, cwd=tmp_path, world=2, script=script, env=env).wait()


def test_a_recipe_that_only_the_first_rank_has_is_enough(lab: Any, tmp_path: Path) -> None:
    recipe(lab, tmp_path)
    ended = apart(lab, tmp_path, "recipe.yaml", "--out", str(tmp_path / "out"))
    assert ended.codes == (0, 0) and ended.err == "", ended.said()
    assert contents(tmp_path / "out") == contents(lab.shards)


def test_a_recipe_that_the_first_rank_lacks_ends_all_with_one_text(lab: Any, tmp_path: Path) -> None:
    recipe(lab, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipe.yaml").rename(tmp_path / "elsewhere/recipe.yaml")
    ended = apart(lab, tmp_path, "recipe.yaml", "--out", str(tmp_path / "out"))
    assert ended.codes == (2, 2), ended.said()
    assert ended.err.count("\n") == 1 and "recipe.yaml" in ended.err and "another rank" not in ended.err


@pytest.mark.parametrize("out", ["s3:/bucket/x", "http://127.0.0.1:9/x", "ftp://host/x"])
def test_an_address_that_cannot_be_written_ends_all_ranks_with_one_text(out: str, lab: Any, tmp_path: Path) -> None:
    path = recipe(lab, tmp_path)
    ended = lab.start("shards", "build", path, "--out", out, cwd=tmp_path, world=2).wait()
    assert ended.codes == (2, 2), ended.said()
    assert ended.err.startswith("mirl-dist: ") and ended.err.count("\n") == 1


def test_ranks_that_see_different_folders_are_told_so_before_any_image_is_read(lab: Any, tmp_path: Path) -> None:
    ended = apart(lab, tmp_path, recipe(lab, tmp_path), "--out", "out")
    assert ended.codes == (2, 2), ended.said()
    assert ended.err.startswith(f"mirl-dist: {rank_label(1)}: out is another place for rank 1 than for rank 0.")
    assert ended.err.count("\n") == 1 and "checking images" not in ended.out
    assert not (tmp_path / "out").exists()


def test_a_place_that_only_one_rank_cannot_write_is_told_before_any_image_is_read(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/out").write_text("a file")
    ended = apart(lab, tmp_path, recipe(lab, tmp_path), "--out", "out")
    assert ended.codes == (2, 2), ended.said()
    assert ended.err.startswith(f"mirl-dist: {rank_label(1)}: out/.building/probe-") and ended.err.count("\n") == 1
    assert "checking images" not in ended.out and not (tmp_path / "out").exists()
