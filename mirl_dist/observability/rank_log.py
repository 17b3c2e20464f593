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

_WAITING = 200
"""Lines that are kept until the run has a folder."""
_EVERY_SECONDS = 5.0
_CREDENTIALS = re.compile(r"(?<=://)\S*@|(?<=\w)\?\S*=\S*")
_SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|PRIVATE|CREDENTIAL|(ACCESS|API)_?KEY", re.IGNORECASE)
_LEAST_SECRET = 6  # characters; shorter values are words


class RankLog:
    """Appends to the log of the rank that this process is; never raises, and holds no lock."""

    def __init__(self, folder: Path, phase: Callable[[], str], *, wait_for: Path | None = None) -> None:
        """wait_for: a folder that must be there before a log is made, unless the run has begun or something failed."""
        env = os.environ
        self.path = folder / f"rank-{int(env.get('RANK', '0')):04d}.jsonl"
        self._who = {
            "rank": int(env.get("RANK", "0")),
            "world": int(env.get("WORLD_SIZE", "1")),
            "host": platform.node(),
        }
        self._phase, self._wait_for = phase, wait_for
        self._secrets = sorted(_secrets(env), key=len, reverse=True)
        self._at: dict[str, float] = {}
        self._held: list[bytes] = []
        self._file, self._failed, self._torn = -1, False, False
        self._noted: dict[str, float] = {}

    def write(self, level: str, text: str, numbers: dict[str, float]) -> None:
        """Write a line. round and step are remembered for the lines to come. Notes of numbers are taken at most every
        five seconds."""
        self._at.update({key: numbers[key] for key in ("round", "step") if key in numbers})
        if numbers and not self._due(text.partition(":")[0]):
            return
        phase = self._phase()
        self._held.append(self._line(phase, level, text, numbers))
        if self._file < 0 and self._is_early(level, phase):
            del self._held[:-_WAITING]
            return
        lines, self._held = self._held, []
        self._write(b"".join(lines))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _due(self, what: str) -> bool:
        now = time.monotonic()
        if now - self._noted.get(what, -math.inf) < _EVERY_SECONDS:
            return False
        self._noted[what] = now
        return True

    def _is_early(self, level: str, phase: str) -> bool:
        if self._wait_for is None or self._wait_for.is_dir():
            return False
        return level not in ("warning", "error") and phase == "starting"

    def _line(self, phase: str, level: str, text: str, numbers: dict[str, float]) -> bytes:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said = {"time": now, **self._who, "pid": os.getpid(), "phase": phase, **self._at, "level": level}
        said |= {"text": self._without_secrets(text)}
        said |= {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}
        return json.dumps(said, ensure_ascii=False).encode(errors="replace") + b"\n"

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _CREDENTIALS.sub("***", text)

    def _write(self, data: bytes) -> None:
        if not data:  # another thread has written it
            return
        try:
            if self._file < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            data = b"\n" * self._torn + data
            self._torn = os.write(self._file, data) < len(data)  # the rest of a line is lost, the next one begins anew
        except OSError as error:
            if not self._failed:
                self._failed = True
                warn(
                    f"mirl-dist, {rank_label(str(self._who['rank']))}: {self.path}: this rank's log cannot be written "
                    f"({error.strerror}); the run goes on without it. Make room there, or set ranks.logs."
                )


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

    def thread_failed(said: threading.ExceptHookArgs) -> None:
        if said.exc_value is not None:
            note("".join(traceback.format_exception(said.exc_value)), "error")
        in_thread(said)

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
