"""`train --launch`: ranks that die are started again, a stop is a stop, and nobody is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.services.lab import ROOT
from tests.services.processes import runs, wait_until

pytestmark = pytest.mark.long

DRIVER = """
import sys, tempfile
from mirl_dist.distributed.launch import launcher
tempfile.tempdir = None  # that of the process that this one was forked from
restarts, deadline, launcher._GRACE_SECONDS, script, deed = sys.argv[1:]
launcher._GRACE_SECONDS = float(launcher._GRACE_SECONDS)
options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
options += ["--dynamo_backend", "no", "--main_process_port", "0", "--monitor_interval", "0.05"]
options += ["--max_restarts", restarts, script, deed]
sys.exit(launcher.attend(options, int(restarts), float(deadline)))
"""

WORKER = """
import os, signal, sys, time
from mirl_dist.distributed.launch.control import ControlChannel
channel = ControlChannel.of_worker()
code = channel.exit_code()
if code is not None:
    os._exit(code)
rank, again = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def serve(until=lambda: False):
    while not until():
        time.sleep(0.02)
        channel.leave_if_orphaned(channel.stop_requested)

print(f"rank {rank}, start {again}, process {os.getpid()}", flush=True)
exec(sys.argv[1])
"""
"""A rank without torch: what it does is its argument."""


def wait_for_end_of(pids: list[int]) -> None:
    wait_until(lambda: not any(map(runs, pids)), seconds=120)


def workers(launch: Any) -> dict[int, int]:
    """Rank -> process of the ranks that run now."""
    found = {}
    for child in psutil.Process(launch.pids[0]).children():
        with contextlib.suppress(psutil.Error, KeyError):
            found[int(child.environ()["RANK"])] = child.pid
    return found


class Play:
    """Starts ranks that only do as they are told, under the real launcher."""

    def __init__(self, lab: Any, folder: Path) -> None:
        self._lab, self._folder = lab, folder
        self.place = folder / f"mirl-dist-{os.getuid()}"
        (folder / "driver.py").write_text(DRIVER)
        (folder / "worker.py").write_text(WORKER)

    def __call__(self, deed: str, *, restarts: int = 2, deadline: float = 60, grace: float = 60) -> Any:
        script = str(self._folder / "worker.py")
        return self._lab.start(
            *(str(restarts), str(deadline), str(grace), script, deed),
            cwd=self._folder,
            script=str(self._folder / "driver.py"),
            env={"TMPDIR": str(self._folder), "PYTHONPATH": str(ROOT)},
        )

    def running(self, deed: str, **how: Any) -> Any:
        """The launch, once both ranks run."""
        launch = self(deed, **how)
        launch.until(lambda: launch.text("out").count("process") == (4 if "fork" in deed else 2))
        return launch


@pytest.fixture
def play(lab: Any, tmp_path: Path) -> Play:
    return Play(lab, tmp_path)


def test_ranks_of_which_one_died_are_started_again_and_it_is_said_who_and_how_often(play: Play) -> None:
    deed = "os.kill(os.getpid(), 9) if (rank, again) == (1, 0) else sys.exit(again == 1 and rank == 0)"
    ended = play(deed).wait().ok()
    assert ended.err.splitlines() == [
        "mirl-dist: rank 1 was killed by signal 9; starting the ranks again (1 of 2).",
        "mirl-dist: rank 0 failed (code 1); starting the ranks again (2 of 2).",
    ]
    assert list(play.place.iterdir()) == [], "nothing is left of a launch that has ended"


def test_the_rank_that_died_is_named_and_not_the_one_that_only_missed_it(play: Play, tmp_path: Path) -> None:
    died = str(tmp_path / "died")
    one = f"if rank:\n open({died!r}, 'w').close()\n os.kill(os.getpid(), 9)"
    two = f"while not os.path.exists({died!r}):\n time.sleep(0.001)\nchannel.wait_before_exit()\nsys.exit(1)"
    ended = play(f"{one}\n{two}", restarts=0).wait()
    assert ended.err == "mirl-dist: rank 1 was killed by signal 9.\n", ended.said()


def test_ranks_that_always_die_end_the_launch_with_their_code(play: Play) -> None:
    ended = play("sys.exit(3) if rank == 1 else serve()", restarts=1).wait()
    assert ended.rc == 3, ended.said()
    assert ended.out.count("rank 1") == 2
    assert "rank 1 failed (code 3), and the ranks were started again 1 times" in ended.err


def test_after_a_last_word_no_rank_works_again_though_restarts_are_left(play: Play) -> None:
    ended = play("if rank:\n print('a fault', file=sys.stderr)\n channel.report_exit(2)\n sys.exit(2)\nserve()").wait()
    assert ended.rc == 2, ended.said()
    assert ended.err == "a fault\n", "said once, and nothing by the launcher"
    assert ended.out.count("start 1") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_each_signal_asks_the_ranks_to_stop_and_none_is_started_again(play: Play, number: signal.Signals) -> None:
    launch = play.running("serve(channel.stop_requested); print('committed', flush=True); sys.exit(75)")
    os.kill(launch.pids[0], number)
    ended = launch.wait()
    assert ended.rc == 75, ended.said()
    assert "committed" in ended.out and "start 1" not in ended.out
    more = "again" if number == signal.SIGINT else "twice"
    assert ended.err.splitlines() == [
        f"mirl-dist: {number.name}: the ranks were asked to stop; press Ctrl-C {more} to kill them."
    ]


@pytest.mark.parametrize(("end", "code"), [("", 0), ("; sys.exit(1)", 75)])
def test_ranks_asked_to_stop_may_finish_and_if_they_fail_can_be_gone_on_with(play: Play, end: str, code: int) -> None:
    launch = play.running(f"serve(channel.stop_requested){end}", restarts=0)
    os.kill(launch.pids[0], signal.SIGTERM)
    assert launch.wait().rc == code


DEAF = """
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if not os.fork():
    print(f"child, process {os.getpid()}", flush=True)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(
    ("numbers", "grace", "code"),
    [((signal.SIGINT, signal.SIGINT), 60.0, 130), ((signal.SIGTERM, signal.SIGUSR1), 0.2, 75)],
)
def test_ranks_that_hear_nothing_are_killed_by_a_second_ctrl_c_or_at_the_deadline(
    play: Play, numbers: tuple[int, int], grace: float, code: int
) -> None:
    launch = play.running(DEAF, deadline=0.2, grace=grace)
    pids = launch.everyone()
    assert len(pids) >= 5
    for number in numbers:
        os.kill(launch.pids[0], number)
        launch.until(lambda: "the ranks were asked to stop" in launch.text("err"))
    ended = launch.wait()
    assert ended.rc == code, ended.said()
    assert ("the ranks have not left in time (preempt.deadline_seconds)" in ended.err) == (code == 75)
    wait_for_end_of(pids)  # what the ranks have started ends with them
    assert ended.out.count("start") == 2 and "Traceback" not in ended.err


def test_a_launcher_that_is_killed_leaves_no_ranks_behind(play: Play) -> None:
    launch = play.running("serve()")
    pids = launch.everyone()
    os.kill(launch.pids[0], signal.SIGKILL)
    assert launch.wait().rc == -9
    wait_for_end_of(pids)


# -- the whole program ------------------------------------------------------------------------------------------


def test_a_launched_run_survives_a_killed_rank_and_a_stop(lab: Any, reference: Path, tmp_path: Path) -> None:
    run, sets = tmp_path / "run", {"store.lease_seconds": 5}
    first = lab.cold("python", "-m", "mirl_dist", *lab.train(tmp_path, sets, "--launch", "auto"), cwd=tmp_path)
    first.until(lambda: list(run.glob("rounds/00/steps/*/COMPLETE.json")))
    os.kill(workers(first)[1], signal.SIGKILL)
    first.until(lambda: "resuming: round" in first.text("out"))
    first.until(lambda: list(run.glob("rounds/00/ticket-*/COMPLETE.json")))
    os.kill(first.pids[0], signal.SIGUSR1)
    ended = first.wait()
    assert ended.rc == 75, ended.said()
    assert "mirl-dist: rank 1 was killed by signal 9; starting the ranks again (1 of 3)." in ended.err
    assert ended.err.count("stopped on request") == 1, ended.said()
    assert "(2 of 3)" not in ended.err and "Traceback" not in ended.err, ended.said()

    lab.play(tmp_path, sets).ok()
    assert lab.digests(run) == lab.digests(reference)


def test_a_step_that_always_kills_its_ranks_is_given_up_and_can_be_tried_again(lab: Any, tmp_path: Path) -> None:
    sets = {"guard.same_step_failures": 2, "prune.rounds": 0, "store.lease_seconds": 5}
    for _ in range(2):
        ended = lab.play(tmp_path, sets, fatal={"rank": 1, "step": [0, 3]})
        assert ended.codes == (1, -9), ended.said()
    ended = lab.play(tmp_path, sets)
    assert ended.codes == (2, 2), ended.said()
    assert ended.err.startswith("mirl-dist: 2 launches in a row died in step ") and ended.err.count("\n") == 1
    assert " of round 0 on this machine" in ended.err and "Its samples as task:key: d" in ended.err
    lab.play(tmp_path, sets).ok()


def test_a_fault_of_a_rank_is_said_once_though_a_restart_is_left(lab: Any, tmp_path: Path) -> None:
    fatal = {"MIRL_FATAL": json.dumps({"rank": 1, "step": [0, 1], "do": "fault"})}
    arguments = ["--nproc-per-node", "2", "--max-restarts", "1", lab.fatal, *lab.train(tmp_path)]
    ended = lab.cold("torchrun", *arguments, cwd=tmp_path, env=fatal).wait()
    assert ended.rc == 1, ended.said()  # torchrun's own code
    assert ended.err.count(f"mirl-dist, rank 1 ({platform.node()}): found a planned fault") == 1, ended.said()
    assert "started again" not in ended.err
