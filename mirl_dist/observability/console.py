"""Terminal output and log records, both through Python's logger `mirl_dist`.

A handler here prints on the terminal; rank_log.py adds a handler for this rank's log. Neither uses a lock, so a process
can report its exit while another thread blocks on a disk or a terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import unicodedata

LOGGER = logging.getLogger("mirl_dist")
NOTE, FAULT = logging.DEBUG + 5, logging.WARNING + 5
"""Log levels. NOTE: records for log files only; FAULT: a user's mistake."""


class LockFreeHandler(logging.Handler):
    """Handler whose `emit` may run concurrently in several threads and in signal handlers. `emit` must not raise."""

    def createLock(self) -> None:
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return True


class _TerminalHandler(LockFreeHandler):
    """Handler that prints a record on its `stream`; warnings without a stream go to standard error.

    Write errors, such as a full disk or a closed terminal, are ignored: they must not end a run.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = getattr(record, "stream", "stderr" if record.levelno >= logging.WARNING else "")
        if stream:
            with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
                print(printable(record.getMessage()), file=getattr(sys, stream), flush=True)


def printable(text: str) -> str:
    """Escape what would steer a terminal, and line ends inside the words of this command line (names of files)."""
    for word in sys.argv[1:]:
        if word.strip() and not word.isprintable():
            for name in (word, os.path.basename(word), os.path.splitext(os.path.basename(word))[0]):
                text = text.replace(name, _escape(name)) if name.strip() else text
    return "".join(c if c in "\n\t" else _escape(c) for c in text)


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text)


logging.addLevelName(NOTE, "NOTE")
logging.addLevelName(FAULT, "FAULT")
LOGGER.setLevel(NOTE)
LOGGER.propagate = False  # logging.warning, if a library calls it, adds a root handler that would print lines twice
LOGGER.addHandler(_TerminalHandler())


def rank_label(rank: int | str | None = None) -> str:
    """Return this process's name in messages: 'rank 3 (node-7)'. rank: None reads the launcher's RANK variable."""
    return f"rank {os.environ.get('RANK', '0') if rank is None else rank} ({platform.node()})"


def say(line: str, level: int = logging.INFO) -> None:
    """Print one line on standard output and flush. Lines starting with 'warning: ' are logged at level WARNING."""
    LOGGER.log(logging.WARNING if line.startswith("warning: ") else level, "%s", line, extra={"stream": "stdout"})


def warn(line: str, level: int = logging.WARNING) -> None:
    """Print one line on standard error and flush. level: FAULT for a user's mistake."""
    LOGGER.log(level, "%s", line, extra={"stream": "stderr"})


def note(text: str, level: int = NOTE, **numbers: float) -> None:
    """Write to this rank's log only, not to the terminal. numbers: extra fields of the record."""
    LOGGER.log(level, "%s", text, extra={"stream": "", "numbers": numbers})
