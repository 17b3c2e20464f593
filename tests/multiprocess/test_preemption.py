"""Runs that are asked to stop, in each phase: committed, exit code 75, resumed to the tickets of an undisturbed run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.services.lab import PROGRAMS
from tests.services.outcomes import expect

ASKED = str(PROGRAMS / "stop_in_phase.py")
# In the order in which a run comes through them.
PHASES: dict[str, tuple[dict[str, Any], str]] = {
    "training": ({"rank": 1, "phase": "training"}, "stopped on request in round 0 after 1 steps; committed"),
    "evaluating": ({"rank": 1, "phase": "evaluating"}, "stopped on request while evaluating; the round's training is"),
    "selecting": ({"rank": 1, "phase": "selecting"}, "stopped on request before pruning; all rounds that"),
    "counting": ({"rank": 0, "phase": "counting"}, "stopped on request before pruning; all rounds that"),
    "pruning": ({"rank": 0, "phase": "pruning"}, "stopped on request before the next round; all rounds that"),
    "rewinding": ({"rank": 1, "phase": "rewinding"}, "stopped on request before the next round; all rounds that"),
    "training-later": ({"rank": 0, "phase": "training"}, "stopped on request in round 1 after 1 steps; committed"),
    "committing": ({"rank": 0, "phase": "committing"}, "stopped on request"),
    "uploading": ({"rank": 0, "phase": "uploading"}, "stopped on request"),
}


def asked(lab: Any, folder: Path, plan: dict[str, Any], number: int, **sets: Any) -> Any:
    env = {"MIRL_ASKED": json.dumps(plan | {"signal": number})}
    return lab.start(*lab.train(folder, sets), cwd=folder, world=2, script=ASKED, env=env).wait()


def assert_stopped(lab: Any, folder: Path, phase: str, reference: Path) -> None:
    plan, words = PHASES[phase]
    number = signal.SIGUSR1 if phase in ("evaluating", "pruning") else signal.SIGTERM
    ended = expect((75, 75), asked(lab, folder, plan, number))
    assert ended.err.startswith(f"mirl-dist: {words}"), f"{phase}: {ended.said()}"
    assert ended.err.endswith("Go on with --resume auto.\n") and ended.err.count("\n") == 1, "one rank says it, once"
    assert lab.digests(folder / "run") == lab.digests(reference)[: len(lab.digests(folder / "run"))], phase


def assert_goes_on(lab: Any, folder: Path, reference: Path) -> None:
    expect(0, lab.play(folder), "resuming: round ")
    assert lab.digests(folder / "run") == lab.digests(reference)


def test_a_run_that_is_asked_to_stop_commits_and_goes_on_to_the_same_tickets(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    assert_stopped(lab, tmp_path, "training", reference)
    assert_goes_on(lab, tmp_path, reference)


@pytest.mark.long
def test_a_run_that_is_asked_to_stop_in_every_phase_has_the_same_tickets(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    for phase in PHASES:
        assert_stopped(lab, tmp_path, phase, reference)
    assert_goes_on(lab, tmp_path, reference)


@pytest.mark.long
def test_a_run_that_is_asked_before_it_trains_leaves_and_begins_again(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    ended = asked(lab, tmp_path, {"rank": 0, "phase": "starting"}, signal.SIGTERM)
    assert 75 in ended.codes and set(ended.codes) <= {75, 1}, ended.said()
    assert lab.play(tmp_path).rc == 0
    assert lab.digests(tmp_path / "run") == lab.digests(reference)


@pytest.mark.long
def test_a_run_that_cannot_stop_in_time_says_why_and_leaves_at_the_deadline(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    ended = asked(lab, tmp_path, {"rank": 0, "phase": "uploading"}, signal.SIGTERM, **{"preempt.deadline_seconds": 0.3})
    assert 75 in ended.codes, ended.said()
    assert "asked to stop 0.3 s ago (preempt.deadline_seconds), and still in " in ended.err, ended.said()
    expect(0, lab.play(tmp_path))
    assert lab.digests(tmp_path / "run") == lab.digests(reference)


def test_a_build_that_is_asked_to_stop_goes_on_from_there(lab: Any, tmp_path: Path) -> None:
    build = ("shards", "build", str(lab.folder / "recipe.yaml"), "--out", str(tmp_path / "shards"), "--workers", "1")
    env = {"MIRL_ASKED": json.dumps({"rank": 0, "phase": "shards", "times": 2, "signal": signal.SIGTERM})}
    ended = expect((75,), lab.start(*build, cwd=lab.folder, script=ASKED, env=env).wait(), "stopped on request")
    assert "Traceback" not in ended.err
    assert not (tmp_path / "shards/manifest.json").exists()
    assert lab.mirl(*build, cwd=lab.folder).rc == 0
    assert (tmp_path / "shards/manifest.json").read_bytes() == (lab.shards / "manifest.json").read_bytes()
