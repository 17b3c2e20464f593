"""The log of one rank: one JSON line per message, with phase, round and step, appended over all starts of a run.

    logs/rank-0003.jsonl    {"time": "2026-11-21T21:15:22.123Z", "rank": 3, "world": 8, "host": "node-7", "pid": 71,
                             "phase": "training", "round": 0, "step": 40, "level": "note", "text": ..., "loss": ...}

A rejected launch creates no log. If the log cannot be written, one warning is printed and the run continues.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mirl_dist.config import credentials
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import local_folder, log_folder
from mirl_dist.config.yaml_loader import CREDENTIALS
from mirl_dist.observability.console import LOGGER, LockFreeHandler, note, rank_label, warn

_MAX_EARLY_LINES = 200
"""Most lines buffered until the run exists."""
_EVERY_SECONDS = 5.0
_SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|PRIVATE|CREDENTIAL|(ACCESS|API)_?KEY", re.IGNORECASE)
_LEAST_SECRET = 6  # characters; shorter values may be common words, which must not be masked


class _JsonFormatter(logging.Formatter):
    """Formatter of records as one JSON line, secrets masked, with process, phase and position (round, step)."""

    def __init__(self, rank: int, phase: Callable[[], str]) -> None:
        super().__init__()
        self._process = {"rank": rank, "world": int(os.environ.get("WORLD_SIZE", "1")), "host": platform.node()}
        self.phase = phase
        values = [v for name, v in os.environ.items() if _SECRET_NAMES.search(name) and len(v) >= _LEAST_SECRET]
        self._secrets = credentials.written_forms(values)
        self.position: dict[str, float] = {}  # latest round and step

    def format(self, record: logging.LogRecord) -> str:
        now = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        fields = {"time": now.replace("+00:00", "Z"), **self._process, "pid": os.getpid(), "phase": self.phase()}
        fields |= {**self.position, "level": record.levelname.lower(), "text": self._redact(record.getMessage())}
        fields |= {key: value if math.isfinite(value) else str(value) for key, value in _numbers(record).items()}
        return json.dumps(fields, ensure_ascii=False)

    def _redact(self, text: str) -> str:
        return CREDENTIALS.sub("***", credentials.mask(text, self._secrets))


class RankLog(LockFreeHandler):
    """Handler that appends records to this rank's log, which the first write creates."""

    def __init__(self, folder: Path, phase: Callable[[], str], *, wait_for: Path | None = None) -> None:
        """folder: where the log is created. phase: returns the rank's current phase.

        wait_for: what must exist before the log is created, unless the run has left phase 'starting' or the
        record is a warning or an error.
        """
        super().__init__()
        rank = int(os.environ.get("RANK", "0"))
        self.path = folder / f"rank-{rank:04d}.jsonl"
        self._json, self._wait_for = _JsonFormatter(rank, phase), wait_for
        self._handle, self._failed, self._torn = -1, False, False
        self._early_lines: list[bytes] = []
        self._last_notes: dict[str, float] = {}  # kind of note -> monotonic time of the last one written

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; notes with numbers are limited to one per kind every five seconds."""
        numbers = _numbers(record)
        self._json.position |= {key: numbers[key] for key in ("round", "step") if key in numbers}
        if numbers and not self._is_due(record.getMessage().partition(":")[0]):
            return
        self._early_lines.append(self._json.format(record).encode(errors="replace") + b"\n")
        if self._handle < 0 and self._is_early(record.levelno):
            del self._early_lines[:-_MAX_EARLY_LINES]
            return
        lines, self._early_lines = self._early_lines, []
        if lines:  # else another thread has already written them
            self._append(b"".join(lines))

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        super().close()

    def _append(self, data: bytes) -> None:
        """Append whole lines in one system call. If it fails they are lost; the first failure prints a warning."""
        try:
            if self._handle < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            data = b"\n" * self._torn + data
            # After a partial write the rest is lost, and the next write begins on a new line.
            self._torn = os.write(self._handle, data) < len(data)
        except OSError as error:
            if not self._failed:
                self._failed = True
                warn(
                    f"mirl-dist, {rank_label()}: {self.path}: this rank's log cannot be written ({error.strerror}); "
                    "the run continues without it. Make room there, or set ranks.logs."
                )

    def _is_due(self, what: str) -> bool:
        now = time.monotonic()
        if now - self._last_notes.get(what, -math.inf) < _EVERY_SECONDS:
            return False
        self._last_notes[what] = now
        return True

    def _is_early(self, level: int) -> bool:
        if self._wait_for is None or self._wait_for.exists():
            return False
        return level not in (logging.WARNING, logging.ERROR) and self._json.phase() == "starting"


def _numbers(record: logging.LogRecord) -> dict[str, float]:
    return getattr(record, "numbers", {})


_restorers: list[Callable[[], None]] = []


def begin(config: Config, phase: Callable[[], str]) -> Path:
    """Start logging all messages and uncaught exceptions to this rank's log. Return the log's path.

    phase: returns the rank's current phase. A second call replaces the first log.
    """
    end()
    run = config.run.folder
    folder = local_folder(run) if config.ranks.logs is None else None
    log = RankLog(log_folder(run, config.ranks.logs), phase, wait_for=folder and folder / "run.json")
    in_main, in_thread = sys.excepthook, threading.excepthook

    def main_failed(*error: Any) -> None:
        note("".join(traceback.format_exception(*error)), logging.ERROR)
        in_main(*error)

    def thread_failed(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None:
            note("".join(traceback.format_exception(failure.exc_value)), logging.ERROR)
        in_thread(failure)

    def restore() -> None:
        sys.excepthook, threading.excepthook = in_main, in_thread

    sys.excepthook, threading.excepthook = main_failed, thread_failed
    LOGGER.addHandler(log)
    _restorers.extend([log.close, restore, lambda: LOGGER.removeHandler(log)])
    note(f"started ({os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} times again)", logging.INFO)
    return log.path


def end() -> None:
    """Stop writing to the log, and restore the exception hooks."""
    while _restorers:
        _restorers.pop()()
