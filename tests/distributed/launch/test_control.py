"""What a launcher and its workers tell each other: seen by both, believed only where nobody else can write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mirl_dist.distributed.launch import control
from mirl_dist.distributed.launch.control import ControlChannel
from mirl_dist.errors import UserError
from tests.services.lab import ROOT
from tests.services.processes import runs, wait_until


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"mirl-dist-{os.getuid()}"


OPEN = """
import os
from mirl_dist.distributed.launch.control import ControlChannel
channel = ControlChannel.of_worker()
"""


def printed(code: str, **env: str) -> str:
    """What a child of this process prints that runs the code, as an elastic launcher starts it."""
    env = os.environ | {"TORCHELASTIC_RUN_ID": "none"} | env
    return subprocess.check_output([sys.executable, "-c", code], env=env, text=True, timeout=60)


def worker(code: str, **env: str) -> str:
    return printed(f"{OPEN}\n{code}", **env)


def test_launcher_and_worker_hear_each_other_without_being_told_where(place: Path) -> None:
    channel = ControlChannel.of_launcher()
    assert worker("print(channel.stop_requested(), channel.exit_code())") == "False None\n"
    channel.request_stop()
    assert worker("print(channel.stop_requested(), channel.exit_code())") == "True 75\n"
    assert worker("channel.report_exit(2)") == ""
    assert channel.exit_code() == 2
    assert place.stat().st_mode & 0o777 == 0o700
    channel.remove()
    assert list(place.iterdir()) == [] and channel.exit_code() is None and not channel.stop_requested()


def test_workers_of_a_launcher_that_opens_no_channel_hear_each_other() -> None:
    assert worker("channel.report_exit(75); print(channel.exit_code())") == "75\n"
    assert worker("print(channel.exit_code(), channel.another_failed())") == "75 False\n"
    assert worker("channel.request_stop()") == ""
    assert worker("print(channel.stop_requested())") == "True\n"


def test_a_users_mistake_is_the_last_word_and_a_new_launcher_hears_none() -> None:
    channel = ControlChannel.of_launcher()
    for code in (75, 2, 75):
        channel.report_exit(code)
    assert channel.exit_code() == 2
    assert ControlChannel.of_launcher().exit_code() is None


def test_a_process_that_nobody_launched_says_and_hears_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    channel = ControlChannel.of_worker()
    channel.report_exit(2)
    channel.request_stop()
    channel.remove()
    assert channel.exit_code() is None and channel.restart_notice() is None
    assert not channel.stop_requested() and not channel.parent_gone() and not channel.another_failed()
    assert not channel.leave_if_orphaned(lambda: False)
    assert not place.exists()


def test_what_dead_launchers_left_is_removed_and_what_living_ones_say_is_kept(place: Path) -> None:
    code = "from mirl_dist.distributed.launch.control import ControlChannel\n"
    code += "ControlChannel.of_launcher().report_exit(2)\nprint(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    living, dead = (subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2))
    for process in (living, dead):
        assert process.stdout and process.stdout.readline() == b"\n"
    dead.kill()
    dead.communicate()
    earlier = place / (control._folder_name(os.getpid()) + "0")  # this process's number, another's start
    earlier.mkdir()
    assert len(list(place.iterdir())) == 3
    ControlChannel.of_launcher()
    left = {p.name.split("-")[2] for p in place.iterdir()}
    assert left == {str(living.pid), str(os.getpid())} and not earlier.exists()
    assert len(list(place.iterdir())) == 2
    living.communicate(b"\n")


def test_a_folder_that_others_could_write_is_closed_or_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir()
    place.chmod(0o777)
    ControlChannel.of_launcher()
    assert place.stat().st_mode & 0o777 == 0o700

    monkeypatch.setattr(os, "getuid", lambda: 4711)
    foreign = place.parent / "mirl-dist-4711"
    foreign.mkdir()
    with pytest.raises(UserError, match=r"mirl-dist-4711: found what is not a folder of this user\..* set TMPDIR"):
        ControlChannel.of_launcher()
    foreign.rmdir()
    foreign.symlink_to(place)
    with pytest.raises(UserError, match="not a folder of this user"):
        ControlChannel.of_launcher()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    channel = ControlChannel.of_worker()
    channel.report_exit(2)
    assert channel.exit_code() is None, "a worker neither believes nor says anything there, and trains"


def test_a_message_that_cannot_be_written_ends_nobody(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    channel = ControlChannel.of_worker()
    place.rmdir()
    place.write_text("a file where the folder was")
    channel.report_exit(2)
    assert channel.exit_code() is None
    with pytest.raises(UserError, match=r"mirl-dist-\d+: cannot be used \(File exists\)\. Set TMPDIR"):
        ControlChannel.of_launcher()


def test_a_sigterm_means_a_request_unless_the_launcher_asks_by_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_STOP_MESSAGE_SECONDS", 0.1)
    channel = ControlChannel.of_launcher()
    assert channel.another_failed(), "it would have asked through the channel"
    channel.request_stop()
    assert not channel.another_failed()
    channel.remove()
    assert not channel.another_failed(), "torchrun passes on the SIGTERM that it got itself"


def test_a_worker_that_the_launcher_ends_does_not_wait_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.time, "sleep", lambda _: pytest.fail("it waits"))
    channel = ControlChannel.of_launcher()
    channel.announce_end(os.getpid())
    assert channel.another_failed()
    channel.request_stop()
    assert not channel.another_failed(), "a request counts more"


@pytest.mark.parametrize(("ours", "said"), [(True, "None"), (False, "started again by the launcher (1 of 3)")])
def test_a_restart_is_said_once_by_the_worker_or_by_a_launcher_of_ours(ours: bool, said: str) -> None:
    if ours:
        ControlChannel.of_launcher()
    counts = {"TORCHELASTIC_MAX_RESTARTS": "3"}
    assert worker("print(channel.restart_notice())", TORCHELASTIC_RESTART_COUNT="1", **counts) == f"{said}\n"
    assert worker("print(channel.restart_notice())", TORCHELASTIC_RESTART_COUNT="0", **counts) == "None\n"


HAS_TORCH = """
import mmap
open("libtorch.so", "w").write("x")
keep = mmap.mmap(os.open("libtorch.so", os.O_RDONLY), 0, prot=mmap.PROT_READ)
"""


@pytest.mark.parametrize(
    ("launcher", "session", "gone"), [("", True, True), ("", False, False), (HAS_TORCH, True, False)]
)
def test_a_worker_whose_launcher_ended_before_it_could_look_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, session: bool, gone: bool
) -> None:
    # Torch's launchers, which have torch in their memory, start each worker in a session of its own.
    worker = f"{OPEN}\nprint(channel.parent_gone())"
    code = f"import os, subprocess, sys{launcher}\n"
    code += f"subprocess.run([sys.executable, '-c', {worker!r}], start_new_session={session})"
    monkeypatch.chdir(tmp_path)
    assert printed(code, PYTHONPATH=str(ROOT)) == f"{gone}\n"


ORPHAN = """
import os, sys, time
from mirl_dist.distributed.launch.control import ControlChannel
channel = ControlChannel.of_worker()
print(os.getpid(), flush=True)
while not channel.parent_gone():
    time.sleep(0.01)
channel.leave_if_orphaned(lambda: False)
print("looked once", flush=True)
for _ in range(5):
    channel.leave_if_orphaned(lambda: sys.argv[1] == "asked")
print("committed", flush=True)
"""


@pytest.mark.parametrize(
    ("asked", "out", "err"),
    [("asked", "committed\n", ""), ("not asked", "", "mirl-dist: the launcher has exited; exiting too.\n")],
)
def test_a_worker_whose_launcher_has_gone_leaves_unless_it_was_asked_to_stop_before(
    asked: str, out: str, err: str
) -> None:
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {ORPHAN!r}, {asked!r}])"
    env, pipe = os.environ | {"TORCHELASTIC_RUN_ID": "none"}, subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=pipe, stderr=pipe, text=True) as launcher:
        assert launcher.stdout and launcher.stderr
        pid = int(launcher.stdout.readline())
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_until(lambda: not runs(pid))
        assert (launcher.stdout.read(), launcher.stderr.read()) == (f"looked once\n{out}", err)
