"""Sweeps of real runs: killed, asked to stop, started again, started twice; and what is refused before any run."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from mirl_dist.storage import Folder
from mirl_dist.storage.lease import Lease
from tests.services.outcomes import expect

pytestmark = pytest.mark.long

METHODS: dict[str, Any] = {"mirl": {}, "random": {"prune.criterion": "random"}}
ALL = ("mirl-seed0", "random-seed0", "mirl-seed1", "random-seed1")


def write(lab: Any, folder: Path, **more: Any) -> Path:
    """A sweep of the tiny config: two methods, two seeds, two rounds each."""
    shared = {"prune.rounds": 1, "train.epochs": 4, "store.lease_seconds": 15}
    tree = {"config": str(lab.config(folder)), "folder": "runs", "methods": METHODS, "seeds": [0, 1], "set": shared}
    (folder / "trial.yaml").write_text(json.dumps(tree | more))
    return folder / "trial.yaml"


def sweep(lab: Any, folder: Path, *more: str, env: Mapping[str, str] = {}) -> Any:
    return lab.start("sweep", "trial.yaml", *more, cwd=folder, env=env)


def pid_of(started: Any, name: str) -> int:
    """The process of a run, once the sweep has started it."""
    found: list[str] = []
    started.until(lambda: found.extend(re.findall(rf"{name}: running \(pid (\d+)", started.text("out"))) or found)
    return int(found[0])


def commits(folder: Path, name: str) -> list[Path]:
    return sorted((folder / "runs" / name).glob("rounds/*/*/COMPLETE.json")) + sorted(
        (folder / "runs" / name).glob("rounds/00/steps/*/COMPLETE.json")
    )


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def compared(folder: Path) -> set[str]:
    with open(folder / "runs/report/tickets.csv") as file:
        return {row["run"].rpartition("/")[2] for row in csv.DictReader(file)}


class Story(NamedTuple):
    """A sweep that was started three times. killed_then_asked: its first run was killed, and it was stopped in its
    second; killed: its third run was killed; last: nothing happened. second: another sweep of the file meanwhile."""

    folder: Path
    killed_then_asked: Any
    killed: Any
    second: Any
    last: Any
    before_last: dict[str, int]


@pytest.fixture(scope="module")
def story(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    write(lab, folder)
    first = sweep(lab, folder)
    os.kill(pid_of(first, "mirl-seed0"), signal.SIGKILL)
    first.until(lambda: commits(folder, "random-seed0"))
    os.kill(first.pids[0], signal.SIGTERM)
    asked = first.wait()

    again = sweep(lab, folder)
    pid_of(again, "mirl-seed0")
    second = sweep(lab, folder).wait()
    pid, log = pid_of(again, "mirl-seed1"), folder / "runs/mirl-seed1.log"
    again.until(lambda: "global batch" in log.read_text())
    os.kill(pid, signal.SIGKILL)
    killed = again.wait()

    before = files(folder / "runs")
    held = Lease(Folder(folder / "runs/mirl-seed1"), seconds=15, status=dict)
    held.claim()
    last = sweep(lab, folder)
    last.until(lambda: "mirl-seed1 is trained by another launch" in last.text("err"))
    held.release("stopped")
    return Story(folder, asked, killed, second, last.wait(), before)


def test_a_sweep_that_is_asked_to_stop_has_its_runs_commit_and_ends_with_75(story: Story) -> None:
    stopped = "random-seed0: stopped (resumes with the next start of the sweep)\n"
    texts = ("SIGTERM: random-seed0 asked to stop", stopped, "4 runs: 1 stopped, 1 failed, 2 waiting")
    ended = expect((75,), story.killed_then_asked, *texts)
    assert "compar" not in ended.out and "Traceback" not in ended.err, ended.said()


def test_a_run_that_fails_stops_no_other_and_is_named_with_its_log(story: Story) -> None:
    expect((75,), story.killed_then_asked, "mirl-seed0: failed (killed by signal 9")
    note = "note: not in this comparison: mirl-seed1 (failed)"
    ended = expect((1,), story.killed, "random-seed1: finished", note)
    last = (story.folder / "runs/mirl-seed1.log").read_text()
    named = re.findall(r"mirl-dist: mirl-seed1 failed; its log is runs/mirl-seed1.log: (.+)\n", ended.err)
    assert len(named) == 1 and named[0].rstrip() in last, ended.said()


def test_the_same_command_goes_on_where_a_run_stood(story: Story) -> None:
    assert "resuming: round " in (story.folder / "runs/random-seed0.log").read_text()
    order = re.findall(r"(\S+): running", story.killed.out)
    assert order == list(ALL), "in their order, those that failed or stopped too"


def test_a_second_sweep_of_one_file_is_refused_while_the_first_works(story: Story) -> None:
    expect((2,), story.second, "another sweep works here, and this one has started nothing")
    assert ": running" not in story.second.out


def test_runs_that_have_finished_are_not_touched(story: Story) -> None:
    after = files(story.folder / "runs")
    mine = [name for name in story.before_last if name.startswith(tuple(n for n in ALL if n != "mirl-seed1"))]
    assert len(mine) > 20 and {name: after.get(name) for name in mine} == {n: story.before_last[n] for n in mine}
    for state in ("running", "finished"):
        assert re.findall(rf"(\S+): {state}", story.last.out) == ["mirl-seed1"], story.last.said()


def test_a_run_that_another_launch_trains_is_waited_for_and_then_taken(story: Story) -> None:
    assert story.last.err.count("mirl-seed1 is trained by another launch") == 1, story.last.said()
    assert "mirl-seed1: finished" in story.last.out


def test_a_sweep_ends_in_one_comparison_of_all_its_runs(lab: Any, story: Story) -> None:
    expect((0,), story.last)
    assert compared(story.folder) == set(ALL)
    assert {p.name for p in (story.folder / "runs/report").iterdir()} >= {"tickets.csv", "tickets.html", "tickets.tex"}
    told = lab.mirl("sweep", "trial.yaml", "--status", "--json", cwd=story.folder)
    rows = json.loads(told.out)
    assert [(row["state"], row["round"], row["rounds"]) for row in rows] == [("finished", 1, 1)] * 4, told.said()
    assert all(row["psnr"] > 5 and 0.15 < row["sparsity"] < 0.2 for row in rows)


def test_more_rounds_asked_for_later_are_seen_before_they_are_trained(lab: Any, story: Story) -> None:
    more = lab.mirl("sweep", "trial.yaml", "--status", "--json", "--set", "set={prune.rounds: 2}", cwd=story.folder)
    assert {row["state"] for row in json.loads(more.out)} == {"stopped"}, more.said()


def test_a_mistake_in_one_method_starts_nothing(lab: Any, tmp_path: Path) -> None:
    methods = METHODS | {"snow": {"data.mix": {"desnow": 1}}, "late": {"rewind": {"to": "step", "step": 500}}}
    write(lab, tmp_path, methods=methods)
    before = files(tmp_path)
    texts = (
        "2 faults in the runs of trial.yaml; nothing was started:",
        "snow-seed0, snow-seed1: data.mix: the shards hold no training samples for desnow",
        "late-seed0, late-seed1: rewind.step: found 500, but a round has 12 steps",
    )
    expect((2,), sweep(lab, tmp_path).wait(), *texts)
    assert files(tmp_path) == before


def test_a_sweep_that_is_asked_to_stop_when_all_have_finished_compares_them(lab: Any, tmp_path: Path) -> None:
    write(lab, tmp_path, seeds=[0], methods={"mirl": {}}, set={"prune.rounds": 1})
    started = sweep(lab, tmp_path)
    run = psutil.Process(pid_of(started, "mirl-seed0"))
    os.kill(started.pids[0], signal.SIGSTOP)  # it is to find the end of its run and the request together
    started.until(lambda: run.status() == psutil.STATUS_ZOMBIE)
    os.kill(started.pids[0], signal.SIGTERM)
    os.kill(started.pids[0], signal.SIGCONT)
    expect((0,), started.wait(), "asked to stop")
    assert compared(tmp_path) == {"mirl-seed0"}


def test_a_folder_that_cannot_be_made_is_named_and_nothing_is_started(lab: Any, tmp_path: Path) -> None:
    write(lab, tmp_path)
    ended = sweep(lab, tmp_path, "--set", "folder=/proc/none").wait()
    assert ended.codes == (2,) and "Traceback" not in ended.err, ended.said()
    assert re.search("folder: (found )?/proc", ended.err) and ": running" not in ended.out, ended.said()


def test_a_log_that_cannot_be_written_is_named_once_the_other_runs_have_stopped(lab: Any, tmp_path: Path) -> None:
    write(lab, tmp_path, seeds=[0], slots=2)
    (tmp_path / "runs/random-seed0.log").mkdir(parents=True)
    started = sweep(lab, tmp_path)
    pid = pid_of(started, "mirl-seed0")
    text = "folder: runs/random-seed0.log cannot be written: Is a directory"
    ended = expect((2,), started.wait(), "mirl-seed0 asked to stop", "mirl-seed0: stopped", text)
    assert "Traceback" not in ended.err, ended.said()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_second_interrupt_ends_the_runs_at_once(lab: Any, tmp_path: Path) -> None:
    write(lab, tmp_path, seeds=[0])
    started = sweep(lab, tmp_path)
    pid = pid_of(started, "mirl-seed0")
    started.until(lambda: (tmp_path / "runs/mirl-seed0/run.json").exists())
    os.kill(pid, signal.SIGSTOP)  # a run that does not answer
    os.kill(started.pids[0], signal.SIGINT)
    started.until(lambda: "asked to stop" in started.text("err"))
    os.kill(pid, signal.SIGCONT)
    os.kill(started.pids[0], signal.SIGINT)
    ended = expect((130,), started.wait())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert re.findall(r"(\S+): running", ended.out) == ["mirl-seed0"], "no other is started any more"


def test_slurm_gets_an_array_of_what_has_not_finished(lab: Any, story: Story, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >asked\necho 4711\n')
    sbatch.chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    (story.folder / "launch/slurm").mkdir(parents=True, exist_ok=True)
    (story.folder / "launch/slurm/array.sbatch").touch()
    more = ("--submit", "slurm", "--set", "seeds=[1, 2]", "--set", "slots=3", "--set", "sbatch=[--gpus-per-node=1]")
    ended = expect((0,), sweep(lab, story.folder, *more, env=env).wait())
    assert "mirl-seed1: finished, not submitted" in ended.out and "as job 4711" in ended.out, ended.said()
    *options, script, commands = (story.folder / "asked").read_text().splitlines()
    assert options[:3] == ["--parsable", "--job-name=sweep-trial", "--array=1-2%3"]
    assert options[3:] == ["--output=runs/slurm-%A_%a.out", "--gpus-per-node=1"]
    assert script == "launch/slurm/array.sbatch"
    printed = lab.mirl("sweep", "trial.yaml", "--print", "--set", "seeds=[1, 2]", cwd=story.folder).out.splitlines()
    assert (story.folder / commands).read_text().splitlines() == printed[2:]


def test_slots_that_start_at_once_share_a_new_mlflow_database(lab: Any, tmp_path: Path) -> None:
    shared = {"prune.rounds": 0, "train.epochs": 2, "tracking.enabled": True}
    write(lab, tmp_path, slots=2, seeds=[0], set=shared, compare={"pictures": False})
    ended = expect(0, sweep(lab, tmp_path).wait(300))
    assert "half-made" not in ended.err
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("SELECT name, status FROM runs WHERE name NOT LIKE '%round%'").fetchall()
        left = database.execute("SELECT name FROM sqlite_master WHERE name LIKE '%alembic_tmp%'").fetchall()
    finished = {("trial/mirl-seed0", "FINISHED"), ("trial/random-seed0", "FINISHED")}
    assert finished <= set(runs) and not left
