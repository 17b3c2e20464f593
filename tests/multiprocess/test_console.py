"""A log that cannot be written does not end a run, and does not keep one alive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

SIGNALLED = """
import os, signal, time
from mirl_dist.distributed.signals import StopSignal

stop = StopSignal()
stop.deadline_seconds, stop.graceful = 0.3, True
stop.listen()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_run_whose_log_lies_on_a_full_disk_ends_with_its_tickets(lab: Any, reference: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mirl_dist", *lab.train(tmp_path, {"batch.forward": 2})]
    with open("/dev/full", "wb", buffering=0) as full:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=full, timeout=120, env=os.environ | lab.env({}), check=False
        )
    assert done.returncode == 0
    assert len(lab.tickets(tmp_path / "run")) == 3


def test_a_deadline_is_kept_by_a_process_that_cannot_say_so() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        done = subprocess.run([sys.executable, "-c", SIGNALLED], stderr=full, timeout=30, check=False)
    assert done.returncode == 75


def test_a_signal_in_the_first_moments_of_a_command_ends_it_with_75(lab: Any, tmp_path: Path) -> None:
    launch = lab.cold("python", "-u", "-c", EARLY, *lab.train(tmp_path), cwd=tmp_path)
    ended = launch.wait()
    assert ended.codes == (75,), ended.said()
    assert ended.err.count("\n") == 1 and "stopped on request" in ended.err
    assert json.loads((tmp_path / "tiny.yaml").read_text()) and not (tmp_path / "run").exists()


EARLY = f"""
import os, sys
from mirl_dist.cli import app as cli

class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == "mirl_dist.training.run":
            os.kill(os.getpid(), {int(signal.SIGTERM)})

sys.meta_path.insert(0, Importing())
sys.argv[0] = "mirl-dist"
cli.main()
"""
