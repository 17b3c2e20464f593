"""What chaos.py kills and disturbs: a launch and its ranks, an S3 and an MLflow server, the networks before them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.services.ceph_server import CephServer
from tests.services.faulty_proxy import SLOW_DOWN, FaultyProxy, answer
from tests.services.s3_server import S3Server

_MARK = "MIRL_CHAOS"


class At(NamedTuple):
    """A place in a run: `step` optimiser steps of a round are done."""

    round: int
    step: int


# -- processes --------------------------------------------------------------------------------------------------------


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and that nobody waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def marked(mark: str) -> list[psutil.Process]:
    """All processes of an experiment, whoever their parents are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == mark and alive(process):
                found.append(process)
    return found


class Launch:
    """`mirl-dist train CONFIG --launch auto`: the process that is started, and the ranks that it starts.

    Each has a cache of its own, as on another node: its shards come over the network.
    """

    def __init__(self, number: int, config: Path, folder: Path, env: Mapping[str, str]) -> None:
        self.number, self.began = number, time.monotonic()
        cache = f"data.cache.folder={folder}/cache-{number:03d}"
        files = {kind: folder / f"launch-{number:03d}.{kind}" for kind in ("out", "err")}
        with files["out"].open("wb") as out, files["err"].open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mirl_dist", "train", str(config), "--launch", "auto", "--set", cache],
                cwd=folder,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._said = {kind: Tail(path) for kind, path in files.items()}
        self.process = psutil.Process(self._process.pid)

    def lines(self) -> Iterator[tuple[str, str]]:
        """What was said since the last call: ('out' or 'err', line)."""
        for kind, tail in self._said.items():
            for line in tail.lines():
                yield kind, line

    def ended(self) -> int | None:
        """Its exit code, minus the signal for one that was killed; None while it runs."""
        return self._process.poll()

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that run now."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.process.children():
                with contextlib.suppress(psutil.Error, OSError):
                    rank = child.environ().get("RANK")
                    if rank is not None and alive(child):
                        found[int(rank)] = child
        return found


class Tail:
    """The complete lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def lines(self) -> list[str]:
        """Those since the last call."""
        if self._path.stat().st_size == self._read:
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + bool(whole)
        return whole.decode(errors="replace").splitlines()


# -- servers ----------------------------------------------------------------------------------------------------------


class Service:
    """A server, and the bad network before it: killed, and brought back in a thread after a while."""

    def __init__(self, server: Any, chance: random.Random, words: tuple[int, ...]) -> None:
        """words: below which byte of an answer it may be cut, chosen anew each time."""
        self.server, self._chance, self._words = server, chance, words
        self.proxy = FaultyProxy(server.url, seed=chance.randrange(1 << 30))
        self.spells: dict[str, int] = {}
        self.restarts = 0
        self._until, self._kind, self._back = 0.0, "calm", 0.0
        self._starting: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1)
        self.up = True

    def kill(self, away_seconds: float, *, everything: bool = False) -> None:
        """SIGKILL; it comes back on the same port with the same data. everything: also what keeps its data."""
        self.up = False
        (self.server.kill_all if everything else self.server.kill)()
        self._back = time.monotonic() + away_seconds

    def tick(self, disturb: bool = True) -> None:
        """What is due now: a start, another spell of weather; without `disturb` only good weather comes."""
        now = time.monotonic()
        if not self.up:
            if self._starting is not None and self._starting.done():
                failed, self._starting = self._starting.exception(), None
                self.up, self._back = failed is None, now + 1
                self.restarts += self.up
                if failed is not None and not isinstance(failed, (RuntimeError, OSError, subprocess.SubprocessError)):
                    raise failed
            elif self._starting is None and now >= self._back:
                self._starting = self._pool.submit(self.server.start)
        if now >= self._until or (self._kind != "calm" and not disturb):
            self._turn(now, disturb)

    def _turn(self, now: float, disturb: bool) -> None:
        """Another spell."""
        try:
            self.proxy.accept()
        except OSError:  # somebody's outgoing connection has the port for a moment
            self._until = now + 0.1
            return
        self.proxy.calm()
        chance = self._chance
        kind = chance.choices(("calm", "late", "cut", "refuse", "slow down"), (6, 3, 4, 3, 2))[0] if disturb else "calm"
        seconds, self._kind = chance.uniform(2, 8), kind
        if kind == "late":
            self.proxy.latency = chance.uniform(0.002, 0.02)
        elif kind == "cut":
            self.proxy.cut_every, self.proxy.cut_within = chance.randrange(4, 16), chance.choice(self._words)
        elif kind == "refuse":
            seconds = chance.uniform(0.5, 3)
            self.proxy.refuse()
        elif kind == "slow down":
            self.proxy.answers = [answer(*SLOW_DOWN)] * chance.randrange(1, 6)
        self.spells[kind] = self.spells.get(kind, 0) + 1
        self._until = now + seconds

    def settle(self, seconds: float = 180) -> None:
        """Good weather, and the server there. Raises RuntimeError."""
        last = time.monotonic() + seconds
        while True:
            self.tick(disturb=False)
            if self.up and self._kind == "calm":
                return
            if time.monotonic() > last:
                raise RuntimeError(f"the server at {self.server.url} does not come back")
            time.sleep(0.05)

    def told(self) -> dict[str, Any]:
        """How often it was disturbed, and how."""
        p = self.proxy
        counts = {"requests": len(p.requests), "cut": p.cuts, "answered 503": p.answered, "restarts": self.restarts}
        return counts | {"spells": dict(sorted(self.spells.items()))}

    def close(self) -> None:
        """The server itself is its owner's to end."""
        self._pool.shutdown(wait=True)
        self.proxy.close()


def s3_server() -> S3Server:
    """Ceph where it is installed; else moto, which loses its objects with its life."""
    return CephServer() if CephServer.installed() else S3Server()


def durable(server: S3Server) -> bool:
    return isinstance(server, CephServer)


def environment(folder: Path, s3: Mapping[str, str], mlflow_url: str, mark: str, temporary: Path) -> dict[str, str]:
    """Of a launch: its servers, and everything that it leaves on this machine inside the experiment's folder."""
    temporary.mkdir(exist_ok=True)
    here = {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(folder / "home"), "MLFLOW_TRACKING_URI": mlflow_url}
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1"}
    return {**os.environ, **s3, **here, **quiet, _MARK: mark}


def write_json(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree, indent=1) + "\n")
    return path
