"""One line for people. A log on a full disk, or a terminal that is gone, must not end a run."""

from __future__ import annotations

import contextlib
import sys


def say(line: str) -> None:
    """One plain line on standard output, at once."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        print(line, flush=True)


def warn(line: str) -> None:
    """One plain line on standard error, at once."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
