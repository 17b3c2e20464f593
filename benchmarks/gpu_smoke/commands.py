"""Runs commands of the package for gpu_smoke, on a small run, within the time that is left to a stage."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "tracking.enabled": "false",
    "tracking.every_steps": "1",
    "data.workers": "1",
    "data.mix": "{derain: 8}",
    "data.steps_per_epoch": "8",
    "evaluate.sets": "[rain]",
    "train.epochs": "1",
    "schedule.warmup_epochs": "0",
    "prune.rounds": "1",
    "checkpoint.every_steps": "3",
}
"""Two rounds of eight steps of the demo's network."""
_NOISE = re.compile(r"Warning|WARN|^\[rank\d|^\[[WE]\d")


class Limit:
    """The moment (of time.monotonic) until which a stage may run."""

    def __init__(self, end: float) -> None:
        self.end = end

    def left(self) -> float:
        return self.end - time.monotonic()


class Commands:
    """Starts commands in a folder of this smoke test. cpu: everything on the CPU."""

    def __init__(self, work: Path, cpu: bool, limit: Limit) -> None:
        self.work, self.cpu, self.limit = work, cpu, limit

    def run(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        send: int | None = None,
        when: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Run a command to its end, or until the limit. send: a signal, sent once when `when` becomes true.

        Return exit code (None: killed at the limit), seconds, text, its last lines and those that look like warnings.
        """
        began, log = time.monotonic(), self.work / f"log-{len(list(self.work.glob('log-*')))}.txt"
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "PYTHONPATH": paths} | (env or {})
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            while process.poll() is None and self.limit.left() > 0:
                if send is not None and when():
                    (os.killpg if send == signal.SIGKILL else os.kill)(process.pid, send)
                    send = None
                time.sleep(0.05)
            ended = process.poll()
            if ended is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(errors="replace")
        return {
            "code": ended,
            "seconds": round(time.monotonic() - began, 1),
            "text": text,
            "tail": [line[:200] for line in text.splitlines()[-4:]],
            "noise": [line[:160] for line in text.splitlines() if _NOISE.search(line)][:5],
        }

    def mirl(self, *words: str, **more: Any) -> dict[str, Any]:
        """Run `mirl-dist WORDS`."""
        return self.run([sys.executable, "-m", "mirl_dist", *words], **more)

    def train_words(self, name: str, sets: dict[str, str] | None = None, launch: str | None = None) -> list[str]:
        """Return the words of a training command of the small run `name`. launch: a launch file, or 'auto'."""
        given = SMALL | {"run.folder": str(self.work / name), "data.shards": str(self.work / "shards")}
        given |= {"train.device": "cpu" if self.cpu else "cuda"} | (sets or {})
        words = ["train", "configs/demo.yaml"]
        for key, value in given.items():
            words += ["--set", f"{key}={value}"]
        return words + (["--launch", launch] if launch else [])

    def train(
        self, name: str, sets: dict[str, str] | None = None, launch: str | None = None, **more: Any
    ) -> dict[str, Any]:
        return self.mirl(*self.train_words(name, sets, launch), **more)

    def tickets(self, name: str) -> list[list[str]]:
        """Return the digests of masks and weights of each finished round of a run."""
        files = sorted((self.work / name / "rounds").glob("*/ticket-*/ticket.json"))
        tickets = [json.loads(file.read_text()) for file in files]
        return [[str(ticket["mask_digest"])[:12], str(ticket["weights_digest"])[:12]] for ticket in tickets]

    def one_rank(self, launch_file: str) -> str:
        """Write a copy of a launch file with one rank, and return its path."""
        copy = self.work / f"one-{launch_file}"
        text = (ROOT / "launch" / launch_file).read_text()
        copy.write_text(text.replace("num_processes: 2", "num_processes: 1"))
        return str(copy)


def brief(result: dict[str, Any], *more: str) -> dict[str, Any]:
    """Return what a result says in the report: exit code, seconds and, of a failure, the last lines."""
    shown = {key: result[key] for key in ("code", "seconds", *more)}
    if result["noise"]:
        shown["noise"] = result["noise"]
    return shown if result["code"] == 0 else shown | {"tail": result["tail"]}


def rates(result: dict[str, Any]) -> list[int]:
    """Return the last reported samples per second."""
    return [int(number) for number in re.findall(r"(\d+) samples/s", result["text"])][-3:]
