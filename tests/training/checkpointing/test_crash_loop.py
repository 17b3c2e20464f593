"""Launches that die in one and the same step are counted, over SIGKILL, and refused when they were too many."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.errors import Stopped, UserError
from mirl_dist.training.checkpointing.crash_loop import CrashLoopGuard, read_record

RUN = "s3://bucket/run"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"mirl-dist-{os.getuid()}"


def launch_that_dies(*steps: tuple[int, int], run: str = RUN, then: str = "") -> CrashLoopGuard:
    """A launch that goes through those steps and is gone, as after SIGKILL: what it has mapped is all that is left."""
    footprint = CrashLoopGuard.open(run, 3)
    for round_, updates in steps:
        footprint.begin_step(round_, updates)
    if then:
        getattr(footprint, then)()
    return footprint


def file_of(place: Path) -> Path:
    (path,) = (place / "footprints").iterdir()
    return path


def test_as_many_deaths_in_a_step_as_allowed_lead_to_a_refusal_that_says_where() -> None:
    for _ in range(3):
        assert launch_that_dies((2, 130), (2, 136)).repeated is None
    refused = CrashLoopGuard.open(RUN, 3)
    assert refused.repeated == (2, 136)
    text = refused.describe(["derain:a", "dehaze:b"])
    assert text.startswith("3 launches in a row died in step 137 of round 2 on this machine")
    assert "Its samples as task:key: derain:a, dehaze:b." in text
    assert "guard.same_step_failures" in text and str(refused._path) in text
    text = refused.describe([f"k{i}" for i in range(40)])
    assert "k15 and 24 more." in text and "k16" not in text, "long batches are not listed to the end"


def test_after_a_refusal_the_next_start_tries_once_more() -> None:
    for _ in range(3):
        launch_that_dies((2, 136))
    assert CrashLoopGuard.open(RUN, 3).repeated
    assert launch_that_dies((2, 136)).repeated is None, "whoever starts again may have put something right"
    refused = CrashLoopGuard.open(RUN, 3)
    assert refused.repeated == (2, 136) and refused.describe([]).startswith("4 launches")
    assert launch_that_dies().repeated is None
    assert CrashLoopGuard.open(RUN, 3).repeated is None, "the launch between died in start-up: not of the step"


def test_deaths_elsewhere_are_not_counted_together() -> None:
    for updates in (136, 136, 140, 136, 136):
        assert launch_that_dies((2, updates)).repeated is None
    assert CrashLoopGuard.open(RUN, 3).repeated is None
    assert launch_that_dies((1, 136)).repeated is None, "the same step of another round is another step"
    assert CrashLoopGuard.open(RUN, 3).repeated is None


@pytest.mark.parametrize(("steps", "repeated"), [([136, 137], None), ([100], (2, 136))])
def test_a_clean_end_forgets_deaths_only_when_it_is_past_their_step(steps: list[int], repeated: Any) -> None:
    for _ in range(2):
        launch_that_dies((2, 136))
    launch_that_dies(*[(2, step) for step in steps], then="close")
    launch_that_dies((2, 136))
    assert CrashLoopGuard.open(RUN, 3).repeated == repeated


@pytest.mark.parametrize("then", ["end_step", "close"])
def test_who_dies_outside_a_step_or_leaves_with_a_word_has_not_died_of_it(then: str) -> None:
    for _ in range(5):
        assert launch_that_dies((0, 3), then=then).repeated is None
    for _ in range(5):
        assert launch_that_dies().repeated is None, "in start-up"
    assert CrashLoopGuard.open(RUN, 1).repeated is None


@pytest.mark.parametrize("end", [UserError("x"), Stopped("x"), SystemExit(75), RuntimeError("x"), OSError()])
def test_ends_that_explain_themselves_are_no_deaths(end: BaseException) -> None:
    with pytest.raises(type(end)), CrashLoopGuard.open(RUN, 1) as footprint:
        footprint.begin_step(0, 3)
        raise end
    assert (CrashLoopGuard.open(RUN, 1).repeated == (0, 3)) is isinstance(end, (RuntimeError, OSError))


def test_a_run_that_is_not_this_one_has_its_own_footprint(place: Path) -> None:
    launch_that_dies((0, 3), run="s3://bucket/other")
    assert CrashLoopGuard.open(RUN, 1).repeated is None
    names = [p.name for p in (place / "footprints").iterdir()]
    assert len(names) == 2 and all(len(name) == 16 for name in names)


def test_a_kill_at_any_moment_leaves_a_whole_record_of_the_newest_step(place: Path) -> None:
    code = (
        "from mirl_dist.training.checkpointing.crash_loop import CrashLoopGuard\n"
        f"f = CrashLoopGuard.open({RUN!r}, 1)\nf.begin_step(0, 1)\nprint(flush=True)\nstep = 1\n"
        "while True:\n    step += 1\n    f.begin_step(0, step)"
    )
    for wait in (0.0, 0.003, 0.02, 0.1):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline() == b"\n"
            while wait and read_record(file_of(place).read_bytes()).updates < 2:
                time.sleep(0.001)  # a busy machine may take any time
            time.sleep(wait)
            process.kill()
        record = read_record(file_of(place).read_bytes())
        assert record.inside == 1 and record.updates >= 1 + bool(wait)
        assert CrashLoopGuard.open(RUN, 1).repeated == (0, record.updates)
        file_of(place).unlink()


@pytest.mark.parametrize("damage", [b"", b"x", b'[1, 2, "3"]', b"{}", bytes(200), b"\xff" * 200, b"x" * 5000])
def test_a_damaged_footprint_is_made_anew(place: Path, damage: bytes) -> None:
    for _ in range(3):
        launch_that_dies((0, 3))
    file_of(place).write_bytes(damage)
    assert launch_that_dies((0, 3)).repeated is None
    assert CrashLoopGuard.open(RUN, 1).repeated == (0, 3)


def test_without_a_place_to_leave_it_a_run_goes_on(place: Path) -> None:
    place.write_text("a file where the folder would be")
    footprint = launch_that_dies((0, 3), then="close")
    assert footprint.repeated is None and CrashLoopGuard.open(RUN, 1).repeated is None
    silent = CrashLoopGuard()
    silent.begin_step(0, 3)
    silent.end_step()
    silent.close()
    assert silent.repeated is None and place.read_text().startswith("a file")


def test_a_clean_end_leaves_a_file_only_where_there_are_deaths_to_remember(place: Path) -> None:
    launch_that_dies((0, 3), then="close").close()
    assert list((place / "footprints").iterdir()) == []
    launch_that_dies((0, 3))
    launch_that_dies((0, 2), then="close")
    assert file_of(place).stat().st_size < 200
    launch_that_dies((0, 4), then="close")
    assert list((place / "footprints").iterdir()) == []
