"""Starts commands and ranks as real processes, with tiny shards and a tiny config to train on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.services.processes import PATIENCE, free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "multiprocess" / "programs"
TASKS = ("denoise_25", "derain", "dehaze")
TINY: dict[str, Any] = {
    "run": {"folder": "run"},
    "model": {
        "dim": 8,
        "blocks": [1, 1, 1, 1],
        "refinement_blocks": 1,
        "heads": [1, 2, 4, 8],
        "prompt_dims": [8, 8, 8],
        "prompt_sizes": [4, 4, 4],
        "prompt_heads": 4,
    },
    "data": {"mix": dict.fromkeys(TASKS, 3), "patch_pixels": 16, "steps_per_epoch": 3, "workers": 0},
    "batch": {"global": 4},
    "optimiser": {"lr": 2e-3, "clip_norm": 1.0},
    "schedule": {"by": "step", "warmup_epochs": 1},
    "train": {"epochs": 2, "device": "cpu"},
    "prune": {"rounds": 2, "fraction": 0.2},
    "checkpoint": {"every_steps": 2},
    "tracking": {"enabled": False, "every_steps": 1},
    "ranks": {"slow_factor": 1000},  # on a busy machine ranks are unequally fast, and that would be said
}
"""About 0.26 million weights, 6 steps a round, 3 rounds; differs from test to test by `--set`."""


class Ended(NamedTuple):
    """How a command ended: the exit code of each process (minus the signal for a killed one), and what it printed."""

    codes: tuple[int, ...]
    out: str
    err: str

    @property
    def rc(self) -> int:
        """The one code that a launcher passes on: the first of a failed process, 'lost a peer' (1) last."""
        bad = [c for c in self.codes if c]
        return min(bad, key=lambda c: (c < 0, c == 1, c)) if bad else 0

    def ok(self) -> Ended:
        """Itself, if all processes ended well."""
        assert self.rc == 0, self.said()
        return self

    def said(self) -> str:
        return f"codes {self.codes}\n--- out\n{self.out}\n--- err\n{self.err}"


class Started:
    """Processes that run now; their standard streams go to files."""

    def __init__(self, lab: Lab, streams: Path, pids: Sequence[int], process: subprocess.Popen[bytes] | None) -> None:
        self._lab, self._streams, self._process, self.pids = lab, streams, process, tuple(pids)

    def codes(self) -> list[Any]:
        """The exit codes so far; None for what still runs."""
        if self._process is not None:
            return [self._process.poll()]
        return list(self._lab.ask({"poll": self.pids}))

    def everyone(self) -> list[int]:
        """The processes and all that descend from them."""
        found = []
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal to every process of this launch, the launcher included."""
        for pid in self.everyone():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def text(self, kind: str) -> str:
        files = sorted(self._streams.parent.glob(f"{self._streams.name}.*.{kind}"))
        return "".join(f.read_text(errors="replace") for f in files)

    def _killed(self) -> str:
        self.kill()
        return f"{self.text('out')}\n{self.text('err')}"

    def until(self, reached: Callable[[], Any], seconds: float = PATIENCE) -> None:
        """Wait for what the processes bring about; when they end before, they are killed and the test fails."""
        wait_until(reached, seconds=seconds, hopeless=lambda: None not in self.codes(), said=self._killed)

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """How it ended; a launch that takes longer than `seconds` is killed and fails the test."""
        wait_until(lambda: None not in self.codes(), seconds=seconds, said=self._killed, pause=0.02)
        return Ended(tuple(self.codes()), self.text("out"), self.text("err"))


class Lab:
    """Starts commands and ranks. `folder`: images, recipe and shards, only to be read; `shards`: tiny ones, built."""

    def __init__(self, folder: Path, streams: Path) -> None:
        """streams: a folder for the standard streams of what is started."""
        self._folder, self._count = streams, 0
        self.folder = folder
        self.shards = folder / "shards"
        self.fatal = str(PROGRAMS / "crash_at.py")
        self._warm = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | self.env({}),
        )

    def env(self, more: Mapping[str, str]) -> dict[str, str]:
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
        return quiet | dict(more)

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._warm.stdin and self._warm.stdout
        print(json.dumps(question), file=self._warm.stdin, flush=True)
        return json.loads(self._warm.stdout.readline())

    def close(self) -> None:
        self._warm.kill()
        self._warm.communicate()

    def _streams(self) -> Path:
        self._count += 1
        return self._folder / f"streams-{self._count:03d}"

    def start(
        self,
        *arguments: str,
        cwd: Path,
        world: int | None = None,
        script: str | None = None,
        env: Mapping[str, str] = {},
    ) -> Started:
        """`mirl-dist ARGUMENTS`, or a script: one plain process, or `world` ranks that meet as under srun."""
        streams = self._streams()
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if world else {}
        question = {"arguments": arguments, "cwd": str(cwd), "world": world, "script": script, "streams": str(streams)}
        pids = self.ask(question | {"env": self.env(meeting | dict(env))})
        return Started(self, streams, pids, None)

    def cold(self, *command: str, cwd: Path, env: Mapping[str, str] = {}, through: Sequence[str] = ()) -> Started:
        """Any command, started as a user starts it. 'python', 'torchrun' and 'accelerate' mean this environment's.

        through: a command that becomes the one which is given to it.
        """
        launchers = {
            "python": [],
            "torchrun": ["-m", "torch.distributed.run", "--standalone"],
            "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
        }
        streams = self._streams()
        with open(f"{streams}.0.out", "wb") as out, open(f"{streams}.0.err", "wb") as err:
            process = subprocess.Popen(
                [*through, sys.executable, *launchers[command[0]], *command[1:]],
                cwd=cwd,
                env=os.environ | self.env(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return Started(self, streams, [process.pid], process)

    def mirl(self, *arguments: str, cwd: Path | None = None) -> Ended:
        """`mirl-dist ARGUMENTS` in one plain process."""
        return self.start(*arguments, cwd=cwd or self._folder).wait()

    def config(self, folder: Path) -> Path:
        """Writes the tiny config into a folder (its run goes to `folder`/run)."""
        path = folder / "tiny.yaml"
        tree = TINY | {"data": TINY["data"] | {"shards": str(self.shards)}}
        path.write_text(json.dumps(tree))  # JSON is YAML
        return path

    def train(self, folder: Path, sets: Mapping[str, Any] = {}, *more: str) -> list[str]:
        """The arguments of `mirl-dist train` for the tiny config in `folder` with some values set."""
        arguments = ["train", str(self.config(folder)), *more]
        for key, value in sets.items():
            arguments += ["--set", f"{key}={json.dumps(value)}"]
        return arguments

    def play(
        self,
        folder: Path,
        sets: Mapping[str, Any] = {},
        *,
        world: int = 2,
        fatal: Any = None,
        seconds: float = PATIENCE,
        env: Mapping[str, str] = {},
    ) -> Ended:
        """Train the tiny config in `folder` on `world` ranks; fatal: mishaps as in programs/crash_at.py."""
        script, told = (None, {}) if fatal is None else (self.fatal, {"MIRL_FATAL": json.dumps(fatal)})
        started = self.start(*self.train(folder, sets), cwd=folder, world=world, script=script, env=told | dict(env))
        return started.wait(seconds)

    def tickets(self, run: Path) -> list[dict[str, Any]]:
        """What ticket.json says in each finished round."""
        return [json.loads((folder / "ticket.json").read_text()) for folder in self.ended(run)]

    def ended(self, run: Path) -> list[Path]:
        """The folders of all finished rounds' tickets, in order."""
        return sorted(p.parent for p in run.glob("rounds/*/ticket-*/COMPLETE.json"))

    def digests(self, run: Path) -> list[str]:
        return [str(ticket["digest"]) for ticket in self.tickets(run)]

    def assert_same_run(self, run: Path, reference: Path) -> None:
        """The same tickets, with masks and weights of the same bytes."""
        assert self.digests(run) == self.digests(reference)
        for mine, theirs in zip(self.ended(run), self.ended(reference), strict=True):
            for name in ("weights.safetensors", "mask.safetensors"):
                assert (mine / name).read_bytes() == (theirs / name).read_bytes()


def write_photographs(folder: Path) -> None:
    """Small parts of real photographs: six to train on, 48 x 40, and one to score on, 48 x 48."""
    from PIL import Image
    from skimage import data

    for role in ("train", "evaluate"):
        (folder / role).mkdir(parents=True)
    for name in ("astronaut", "coffee"):
        for number in range(3):
            part = getattr(data, name)()[100:148, 150 + 40 * number : 190 + 40 * number]
            Image.fromarray(part).save(folder / "train" / f"{name}-{number}.png")
    Image.fromarray(data.chelsea()[100:148, 150:198]).save(folder / "evaluate" / "chelsea.png")


def recipe_of(images: Path) -> dict[str, Any]:
    """The recipe of the tiny shards: six training images or pairs and one to score on for each kind."""

    def sets(role: str) -> list[dict[str, Any]]:
        made = (("clean", "clean", None), ("rain", "derain", "rain"), ("haze", "dehaze", "haze"))
        clean = {"folder": str(images / role)}
        return [{"set": s, "kind": k, "clean": clean} | ({"make": m} if m else {}) for s, k, m in made]

    return {
        "name": "tiny",
        "least_pixels": 40,
        "shard_megabytes": 0.02,
        "train": sets("train"),
        "evaluate": sets("evaluate"),
    }
