"""Identifies local processes by process id and start time, so that a reused id is not mistaken for the old process.

Start times come from /proc, because psutil's depend on the wall clock, which may be set while a process runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import psutil


class Machine(NamedTuple):
    """Scope in which process ids are unique: one boot of the kernel and one pid namespace."""

    boot: str
    pid_namespace: int


def this_machine() -> Machine | None:
    """Return the scope of this process's id; None if /proc is unavailable or belongs to another pid namespace."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Machine(boot, os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return None


class ProcessState(NamedTuple):
    """State of a process. letter: 'R', 'S', 'Z', ...; started: start time in clock ticks since boot."""

    letter: str
    started: int


def process_state(pid: int) -> ProcessState | None:
    """Return the state of a process; None if it does not exist or /proc hides it."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return ProcessState(after_name[0].decode(), int(after_name[19]))
    except (OSError, IndexError, ValueError):
        return None


def has_exited(pid: int, started: int) -> bool:
    """Whether the local process with this id and start time has exited (zombies included)."""
    state = process_state(pid)
    if state is None:
        return pid < 2**31 and not psutil.pid_exists(pid)
    return state.letter in "ZX" or state.started != started
