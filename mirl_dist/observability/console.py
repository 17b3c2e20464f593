"""Lines for people and records for logs, all through the logger `mirl_dist` of Python's logging.

A handler here prints on the terminal; rank_log.py adds one for the log of this rank. Neither holds a lock: a process
must be able to report its end while another of its threads waits for a disk or a terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys

LOGGER = logging.getLogger("mirl_dist")
NOTE, FAULT = logging.DEBUG + 5, logging.WARNING + 5
"""Levels: what only logs hear, and a user's mistake."""


class LockFreeHandler(logging.Handler):
    """A handler whose `emit` may run in several threads at once, and in a signal handler. `emit` must not raise."""

    def createLock(self) -> None:
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return True


class _TerminalHandler(LockFreeHandler):
    """Prints a record on the stream that it names; warnings of modules that name none on standard error.

    A log on a full disk, or a terminal that is gone, must not end a run.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = getattr(record, "stream", "stderr" if record.levelno >= logging.WARNING else "")
        if stream:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
                print(record.getMessage(), file=getattr(sys, stream), flush=True)


logging.addLevelName(NOTE, "NOTE")
logging.addLevelName(FAULT, "FAULT")
LOGGER.setLevel(NOTE)
LOGGER.propagate = False  # a library that calls logging.warning would have every line printed twice
LOGGER.addHandler(_TerminalHandler())


def rank_label(rank: int | str | None = None) -> str:
    """How messages call this process, one of a launch: 'rank 3 (node-7)'. rank: None is what its launcher said."""
    return f"rank {os.environ.get('RANK', '0') if rank is None else rank} ({platform.node()})"


def say(line: str, level: int = logging.INFO) -> None:
    """Print one plain line on standard output, at once; at level WARNING in logs if it begins with 'warning: '."""
    LOGGER.log(logging.WARNING if line.startswith("warning: ") else level, "%s", line, extra={"stream": "stdout"})


def warn(line: str, level: int = logging.WARNING) -> None:
    """Print one plain line on standard error, at once. level: FAULT for a user's mistake."""
    LOGGER.log(level, "%s", line, extra={"stream": "stderr"})


def note(text: str, level: int = NOTE, **numbers: float) -> None:
    """Write to the log of this rank alone: nothing on the terminal."""
    LOGGER.log(level, "%s", text, extra={"stream": "", "numbers": numbers})
