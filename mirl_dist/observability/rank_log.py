"""The log of one rank: all that it says, with where it stood, one line of JSON each, over all starts of a run.

    logs/rank-0003.jsonl    {"time": "2026-11-21T21:15:22.123Z", "rank": 3, "world": 8, "host": "node-7", "pid": 71,
                             "phase": "training", "round": 0, "step": 40, "level": "note", "text": ..., "loss": ...}

A refused launch leaves no log. A log that cannot be written is told once and costs nothing else.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import local_folder, log_folder
from mirl_dist.observability.console import listen, note, rank_label, warn

_MAX_EARLY_LINES = 200
"""Lines that are kept until the run has a folder."""
_EVERY_SECONDS = 5.0
_CREDENTIALS = re.compile(r"(?<=://)\S*@|(?<=\w)\?\S*=\S*")
_SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|PRIVATE|CREDENTIAL|(ACCESS|API)_?KEY", re.IGNORECASE)
_LEAST_SECRET = 6  # characters; shorter values are words


class _LogFile:
    """The file of one rank's log: made with the first lines, appended to by whole lines in one call."""

    def __init__(self, path: Path, rank: str) -> None:
        self.path, self._rank = path, rank
        self._handle, self._failed, self._torn = -1, False, False

    def is_open(self) -> bool:
        return self._handle >= 0

    def append(self, data: bytes) -> None:
        """Append lines. What cannot be written is lost, and the first time a warning says so."""
        if not data:  # another thread has written it
            return
        try:
            if self._handle < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            data = b"\n" * self._torn + data
            self._torn = os.write(self._handle, data) < len(data)  # the rest of a line is lost, the next begins anew
        except OSError as error:
            if not self._failed:
                self._failed = True
                warn(
                    f"mirl-dist, {self._rank}: {self.path}: this rank's log cannot be written "
                    f"({error.strerror}); the run goes on without it. Make room there, or set ranks.logs."
                )

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class RankLog:
    """Appends to the log of the rank that this process is; never raises, and holds no lock."""

    def __init__(self, folder: Path, phase: Callable[[], str], *, wait_for: Path | None = None) -> None:
        """wait_for: a folder that must be there before a log is made, unless the run has begun or something failed."""
        env = os.environ
        rank = int(env.get("RANK", "0"))
        self._process = {"rank": rank, "world": int(env.get("WORLD_SIZE", "1")), "host": platform.node()}
        self._file = _LogFile(folder / f"rank-{rank:04d}.jsonl", rank_label(str(rank)))
        self._phase, self._wait_for = phase, wait_for
        self._secrets = sorted(_secrets(env), key=len, reverse=True)
        self._position: dict[str, float] = {}  # round and step
        self._early_lines: list[bytes] = []
        self._last_notes: dict[str, float] = {}  # monotonic time by what was noted

    @property
    def path(self) -> Path:
        return self._file.path

    def write(self, level: str, text: str, numbers: dict[str, float]) -> None:
        """Write a line. round and step are remembered for the lines to come. Notes of numbers are taken at most every
        five seconds."""
        self._position.update({key: numbers[key] for key in ("round", "step") if key in numbers})
        if numbers and not self._is_due(text.partition(":")[0]):
            return
        phase = self._phase()
        self._early_lines.append(self._line(phase, level, text, numbers))
        if not self._file.is_open() and self._is_early(level, phase):
            del self._early_lines[:-_MAX_EARLY_LINES]
            return
        lines, self._early_lines = self._early_lines, []
        self._file.append(b"".join(lines))

    def close(self) -> None:
        self._file.close()

    def _is_due(self, what: str) -> bool:
        now = time.monotonic()
        if now - self._last_notes.get(what, -math.inf) < _EVERY_SECONDS:
            return False
        self._last_notes[what] = now
        return True

    def _is_early(self, level: str, phase: str) -> bool:
        if self._wait_for is None or self._wait_for.is_dir():
            return False
        return level not in ("warning", "error") and phase == "starting"

    def _line(self, phase: str, level: str, text: str, numbers: dict[str, float]) -> bytes:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {"time": now, **self._process, "pid": os.getpid(), "phase": phase, **self._position, "level": level}
        fields |= {"text": self._redact(text)}
        fields |= {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}
        return json.dumps(fields, ensure_ascii=False).encode(errors="replace") + b"\n"

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _CREDENTIALS.sub("***", text)


def _secrets(env: Mapping[str, str]) -> list[str]:
    return [v for name, v in env.items() if _SECRET_NAMES.search(name) and len(v) >= _LEAST_SECRET]


_restorers: list[Callable[[], None]] = []


def begin(config: Config, phase: Callable[[], str]) -> Path:
    """From now on, all that this process says is also in its rank's log, unforeseen errors included; the log's path.

    phase: what this rank is doing. A second call ends what the first began.
    """
    end()
    run = config.run.folder
    inside = config.ranks.logs is None and not run.startswith("s3://")
    log = RankLog(
        log_folder(config.run.folder, config.ranks.logs), phase, wait_for=local_folder(run) if inside else None
    )
    in_main, in_thread = sys.excepthook, threading.excepthook

    def main_failed(*error: Any) -> None:
        note("".join(traceback.format_exception(*error)), "error")
        in_main(*error)

    def thread_failed(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None:
            note("".join(traceback.format_exception(failure.exc_value)), "error")
        in_thread(failure)

    def restore() -> None:
        sys.excepthook, threading.excepthook = in_main, in_thread

    sys.excepthook, threading.excepthook = main_failed, thread_failed
    _restorers.extend([log.close, restore, listen(log.write)])
    note(f"started ({os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} times again)", "info")
    return log.path


def end() -> None:
    """What is said from now on is in no log."""
    while _restorers:
        _restorers.pop()()
