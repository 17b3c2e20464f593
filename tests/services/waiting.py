"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(holds: Callable[[], object], seconds: float = 90.0) -> None:
    last = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < last, f"it did not happen in {seconds:g} s"
        time.sleep(0.01)
