"""One line for people. A log on a full disk, or a terminal that is gone, must not end a run.

Whoever listens hears all that is said, and what is only noted: the log of this rank does (rank_log.py).
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable
from typing import TypeAlias

Listener: TypeAlias = Callable[[str, str, dict[str, float]], None]
"""Takes the level ('note', 'info', 'warning', 'fault' or 'error'), the text, and numbers by name. Must not raise."""

_listeners: list[Listener] = []


def listen(hear: Listener) -> Callable[[], None]:
    """Have `hear` called for each line from now on, in whatever thread it is said; returns what ends that."""
    _listeners.append(hear)
    return lambda: _listeners.remove(hear)


def rank_label(rank: int | str | None = None) -> str:
    """How messages call this process, one of a launch: 'rank 3 (node-7)'. rank: None is what its launcher said."""
    return f"rank {os.environ.get('RANK', '0') if rank is None else rank} ({platform.node()})"


def say(line: str) -> None:
    """One plain line on standard output, at once."""
    _notify("warning" if line.startswith("warning: ") else "info", line)
    show(line)


def warn(line: str, level: str = "warning") -> None:
    """One plain line on standard error, at once. level: 'fault' for a user's mistake."""
    _notify(level, line)
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def note(text: str, level: str = "note", **numbers: float) -> None:
    """For those who listen alone: nothing on the terminal."""
    _notify(level, text, numbers)


def show(line: str) -> None:
    """For the terminal alone."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        print(line, flush=True)


def _notify(level: str, text: str, numbers: dict[str, float] | None = None) -> None:
    for hear in tuple(_listeners):
        hear(level, text, numbers or {})
