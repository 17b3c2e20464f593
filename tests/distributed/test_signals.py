"""Laws of signals: graceful while there is something to commit, at once before that, and never half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time
from mirl_dist.distributed.signals import StopSignal

stop = StopSignal().listen()
stop.graceful = "graceful" in sys.argv
try:
    for number in map(int, sys.argv[1].split(",")):
        try:
            os.kill(os.getpid(), number)
        except Exception:
            print("taken for an error")  # as libraries do, which then try again
    print("goes on", stop())
finally:
    if "twice" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    print("cleared up")
"""


def ended(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60, env=os.environ
    )
    return done.returncode, done.stdout.replace("\n", "; ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_training_a_signal_ends_the_process_whatever_library_it_meets(number: int) -> None:
    assert ended(str(int(number))) == (75, "cleared up; ")


def test_a_second_signal_does_not_break_the_clearing_up_of_the_first() -> None:
    assert ended(str(int(signal.SIGTERM)), "twice") == (75, "cleared up; ")


def test_while_training_a_signal_is_noted() -> None:
    assert ended("15", "graceful") == (0, "goes on True; cleared up; ")
    assert ended("2,15", "graceful") == (0, "goes on True; cleared up; ")


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    assert ended("2,2", "graceful") == (130, "")
