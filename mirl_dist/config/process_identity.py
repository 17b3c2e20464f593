"""Identifies processes of this machine, so that a number in use again is not taken for the process that had it before.

Read from /proc: psutil tells start times by the machine's clock, which may be set while a process runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import psutil


class Machine(NamedTuple):
    """Identifies where process numbers mean the same: the kernel's start, and the namespace of numbers."""

    boot: str
    pid_namespace: int


def this_machine() -> Machine | None:
    """Where this process runs; None where /proc does not tell, or shows another namespace than this process's."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Machine(boot, os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return None


class ProcessState(NamedTuple):
    """letter: 'R', 'S', 'Z', ...; started: in ticks since the machine's boot."""

    letter: str
    started: int


def process_state(pid: int) -> ProcessState | None:
    """The state of a process; None where there is none, or /proc hides it."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return ProcessState(after_name[0].decode(), int(after_name[19]))
    except (OSError, IndexError, ValueError):
        return None


def has_exited(pid: int, started: int) -> bool:
    """Whether the process of this machine that had this number and start is dead."""
    state = process_state(pid)
    if state is None:
        return pid < 2**31 and not psutil.pid_exists(pid)
    return state.letter in "ZX" or state.started != started
