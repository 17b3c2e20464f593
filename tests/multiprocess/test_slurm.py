"""Jobs of a real SLURM with two emulated nodes: preempted, requeued, resumed to the tickets of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.services.lab import ROOT, Lab
from tests.services.processes import free_port, wait_until
from tests.services.slurm_cluster import MISSING, Job, SlurmCluster

FILES = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
Batch = tuple[list[str], dict[str, str]]
SETS = {"train.epochs": 6, "prune.rounds": 1}
"""18 steps a round: enough for a request that comes in the middle of one."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    if not SlurmCluster.runs_here():
        pytest.skip(MISSING)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tickets of a run on two ranks without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    lab.play(folder, SETS).ok()
    return lab.digests(folder / "run")


def environment(lab: Lab, more: Mapping[str, str] = {}) -> dict[str, str]:
    """That of a user in whose shell `mirl-dist` is to be found."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | lab.env({"PATH": path, "PYTHONPATH": str(ROOT)} | dict(more))


def files(lab: Lab, folder: Path, batch: str = "one_node.sbatch", launch: str = "cpu_two.yaml") -> tuple[str, ...]:
    return str(ROOT / "launch/slurm" / batch), str(lab.config(folder)), str(ROOT / "launch" / launch)


def sets(tree: Mapping[str, Any] = SETS) -> list[str]:
    return [word for key, value in tree.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def trains(run: Path) -> bool:
    """Whether its first round has a commit, from its middle."""
    return any(run.glob("rounds/00/steps/*/COMPLETE.json"))


def finished_after_a_requeue(job: Job) -> str:
    """What a job said that is requeued now, once it was let go on."""
    job.until(job.requeued)
    assert "stopped on request in round " in job.said(), job.said()
    job.start_now()
    job.until(job.ended)
    assert (job.field("JobState"), job.field("Restarts")) == ("COMPLETED", "1"), job.said()
    return job.said()


def test_a_job_that_is_asked_to_stop_is_requeued_to_the_same_tickets(
    lab: Lab, slurm: SlurmCluster, undisturbed: list[str], tmp_path: Path
) -> None:
    job = slurm.submit("--cpus-per-task=2", *files(lab, tmp_path), *sets(), cwd=tmp_path, env=environment(lab))
    job.until(lambda: trains(tmp_path / "run"))
    slurm.run("scancel", "--batch", "--signal=TERM", job.number)
    said = finished_after_a_requeue(job)
    assert "Exited with exit code 75" in said and "resuming: round " in said
    assert lab.digests(tmp_path / "run") == undisturbed


def test_a_job_on_two_nodes_makes_way_for_an_urgent_one_and_has_the_same_tickets(
    lab: Lab, slurm: SlurmCluster, undisturbed: list[str], tmp_path: Path
) -> None:
    meeting = {"MIRL_MASTER_ADDR": "127.0.0.1", "MIRL_MASTER_PORT": str(free_port()), "MIRL_RANKS_PER_NODE": "1"}
    meeting["MIRL_REQUEUES"] = "0"  # which is for stops that nobody asks for
    two = ("--nodes=2", "--exclusive")
    given = (*two, *files(lab, tmp_path, "nodes.sbatch", "nodes_static.yaml"), *sets())
    job = slurm.submit(*given, cwd=tmp_path, env=environment(lab, meeting))
    job.until(lambda: trains(tmp_path / "run"))
    (tmp_path / "urgent").mkdir()
    urgent = slurm.submit("--partition=urgent", *two, "--wrap=true", cwd=tmp_path / "urgent", env=os.environ)
    job.until(job.requeued)
    urgent.until(urgent.ended)
    said = finished_after_a_requeue(job)
    assert "2 ranks x " in said and "resuming: round " in said
    assert lab.digests(tmp_path / "run") == undisturbed
    assert job.field("PreemptTime") == "None", "the next stop that nobody asks for is told from this one"


def test_a_users_mistake_ends_a_job_for_good_and_its_last_words_say_what_it_was(
    lab: Lab, slurm: SlurmCluster, tmp_path: Path
) -> None:
    job = slurm.submit(*files(lab, tmp_path), *sets({"train.epoch": 3}), cwd=tmp_path, env=environment(lab))
    job.until(job.ended)
    ended = [job.field(name) for name in ("JobState", "ExitCode", "Restarts")]
    assert ended == ["FAILED", "2:0", "0"], job.said()
    lines = [line for line in job.said().splitlines() if not line.startswith("srun: ")]
    assert "train.epoch" in lines[-1] and "Traceback" not in job.said(), job.said()


def test_an_array_runs_lines_of_a_file_and_requeues_the_stopped_not_the_cancelled(
    lab: Lab, slurm: SlurmCluster, tmp_path: Path
) -> None:
    (tmp_path / "stops.sh").write_text("trap 'exit 75' TERM\ntouch waits\nwhile true; do sleep 0.05; done\n")
    (tmp_path / "again.sh").write_text('echo start ${SLURM_RESTART_COUNT:-0}\n[ -n "$SLURM_RESTART_COUNT" ] || exit 75')
    lines = ["echo 'two  words' \"$SECRET\"", "bash again.sh", "bash stops.sh", "false"]
    (tmp_path / "runs.txt").write_text("\n".join(lines))
    (tmp_path / "keys").write_text("SECRET='of a file'\n")
    (tmp_path / "keys").chmod(0o600)
    first = slurm.submit(
        *("--array=1-5", f"--output={tmp_path}/%a.out", str(ROOT / "launch/slurm/array.sbatch"), "runs.txt"),
        cwd=tmp_path,
        env=environment(lab, {"MIRL_ENV": "keys"}),
    )
    one, two, three, four, five = (Job(slurm, f"{first.number}_{n}", tmp_path / f"{n}.out") for n in range(1, 6))
    three.until((tmp_path / "waits").exists)
    slurm.run("scancel", three.number)
    two.until(two.requeued)
    two.start_now()
    states = ("COMPLETED", "COMPLETED", "CANCELLED", "FAILED", "FAILED")
    for job, state in zip((one, two, three, four, five), states, strict=True):
        job.until(job.ended)
        assert job.field("JobState") == state, job.said()
    assert one.said() == "two  words of a file\n"
    assert "start 0" in two.said() and two.said().endswith("start 1\n")
    assert "Exited with exit code 75" in three.said()
    assert five.said().startswith("runs.txt: line 5 is empty or missing.")


def test_a_file_of_secrets_that_others_can_read_is_refused(lab: Lab, slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("SECRET=1\n")
    (tmp_path / "keys").chmod(0o640)
    job = slurm.submit(*files(lab, tmp_path), cwd=tmp_path, env=environment(lab, {"MIRL_ENV": "keys"}))
    job.until(job.ended)
    assert job.field("ExitCode") == "2:0" and job.said().startswith("MIRL_ENV: keys can be read by others"), job.said()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_sound_bash_and_begins_with_what_it_is_for(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True, timeout=60)
    lines = file.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and f"launch/slurm/{file.name} " in "".join(lines[1:5])


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def batch(request: Any, tmp_path: Path) -> Batch:
    """A batch file as SLURM would call it, with stand-ins for SLURM's commands: srun ends as CODE says, or waits to be
    asked, and writes its environment to `seen`; scontrol writes what it is asked to `told`."""
    stand_ins = {
        "srun": 'trap "exit $CODE" TERM\nenv >seen\n[ -z "$WAITS" ] || while :; do sleep 0.05; done\nexit $CODE',
        "scancel": 'kill -TERM "$(cat pid)"',
        "squeue": "echo RUNNING",
        "scontrol": 'case "$*" in show*names*) echo n1 ;; show*) echo " PreemptTime=$PREEMPTED " ;;\n'
        '*) echo "$@" >>told ;; esac',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{'echo $$ >pid' if name == 'srun' else ''}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "runs.txt").write_text("true\n")
    arguments = ["runs.txt"] if request.param.stem == "array" else ["config", "launch"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "CODE": "75"}
    env |= {"SLURM_JOB_NUM_NODES": "1", "PREEMPTED": "None", "WAITS": ""}
    env |= {"SLURM_ARRAY_TASK_ID": "1"} if request.param.stem == "array" else {}
    return ["bash", str(request.param), *arguments], env


def ended(command: list[str], folder: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """Exit code and standard error of a batch file that prints nothing else."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_run_that_stops_early_unasked_is_requeued_so_many_times_and_then_left(batch: Batch, tmp_path: Path) -> None:
    command, env = batch

    def play(**more: str) -> tuple[bool, str]:
        (tmp_path / "told").unlink(missing_ok=True)
        code, said = ended(command, tmp_path, env | more)
        assert code == 75, said
        return (tmp_path / "told").exists(), said

    assert play() == play(SLURM_RESTART_COUNT="9") == play(SLURM_RESTART_COUNT="10", MIRL_REQUEUES="11") == (True, "")
    for more in ({"SLURM_RESTART_COUNT": "10"}, {"MIRL_REQUEUES": "0"}):
        again, said = play(**more)
        assert not again and said.startswith("Stopped early, unasked, after ") and said.count("\n") == 1, said
    assert play(SLURM_RESTART_COUNT="10", PREEMPTED="2026-01-02T03:04:05") == (True, "")


def test_a_script_that_is_asked_to_stop_is_requeued_however_often_it_was(batch: Batch, tmp_path: Path) -> None:
    command, env = batch
    with subprocess.Popen(command, cwd=tmp_path, env=env | {"WAITS": "yes", "SLURM_RESTART_COUNT": "99"}) as script:
        try:
            wait_until((tmp_path / "seen").exists, hopeless=lambda: script.poll() is not None)
            script.send_signal(signal.SIGTERM)
            assert script.wait(60) == 75
        finally:
            script.kill()
    assert (tmp_path / "told").read_text().startswith("requeue ")


def test_a_file_of_secrets_may_hold_what_bash_frowns_on_and_none_of_it_is_printed(batch: Batch, tmp_path: Path) -> None:
    command, env = batch
    (tmp_path / "keys").write_text("ONE=pa$sword\nfalse\nTWO='it is $that'\n")
    (tmp_path / "keys").chmod(0o600)
    env |= {"CODE": "0", "MIRL_ENV": "keys"}
    assert ended(command, tmp_path, env) == (0, "")
    assert {"ONE=pa", "TWO=it is $that"} <= set((tmp_path / "seen").read_text().splitlines())
    (tmp_path / "keys").write_text("ONE=pa(ssword\n")
    assert ended(command, tmp_path, env) == (2, "MIRL_ENV: keys is no sound bash. Quote values: '...'\n")


def test_all_files_end_alike() -> None:
    ends = {file.read_text().partition("# ---- What follows is the same ")[2] for file in FILES}
    assert len(FILES) == 3 and len(ends) == 1 and "" not in ends
