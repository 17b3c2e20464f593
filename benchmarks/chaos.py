"""The promise, tried: a run that is killed again and again ends with the tickets of one that nobody disturbed.

    python benchmarks/chaos.py [--kills 200] [--seed 0] [--minutes 60] [--folder DIR] [--out FILE.json]

Two ranks train rounds 0, 1, 2 of a tiny network. The run lies on a real S3 server and its shards come from there; it
is told to a real MLflow server; both stand behind proxies that delay, cut, refuse and answer 503 for seconds at a time.
One rank, all ranks, the launcher, the S3 server (with Ceph also what keeps its data) and the MLflow server are killed
with SIGKILL. Victims and moments come from the seed: a moment is a step that the run reaches for the first time, and
some seconds more; every fourth kill follows the one before, into the recovery. Servers come back after 0.5 to 4 s. A
launch that has ended with anything but 0 is started again. Exit code 0: all checks held.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import chaos_checks as checks
from chaos_checks import BUCKET, CHAOS, REFERENCE, RUN, SHARDS, Check, Commits, Ended
from chaos_run import (
    ALL,
    LAUNCHER,
    MLFLOW,
    RANK,
    S3,
    S3_WHOLE,
    TRAINING,
    Blow,
    Experiment,
    Log,
    Say,
    Steps,
    figures_of,
    watched,
)
from chaos_world import Launch, Service, durable, environment, kill, marked, s3_server, write_json

from tests.services.lab import TINY, recipe_of, write_photographs
from tests.services.mlflow_server import MlflowServer
from tests.services.s3_server import S3Server

DECK = {RANK: 6, ALL: 3, LAUNCHER: 4, S3: 2, S3_WHOLE: 2, MLFLOW: 2}
STEPS_PER_KILL, QUIET_STEPS, EPOCH = 8, 60, 12


def planned(kills: int, steps: int, seed: int, victims: Mapping[str, int]) -> list[Blow]:
    """Who is killed when. Each victim once among the first, then by its share; a server is none of the last three."""
    chance = random.Random(f"blows {seed}")
    drawn: list[str] = []
    while len(drawn) < kills:
        first = list(victims) if not drawn else []
        rest = [victim for victim, count in victims.items() for _ in range(count - len(first) // len(victims))]
        drawn += chance.sample(first, len(first)) + chance.sample(rest, len(rest))
    drawn = drawn[:kills]
    last = [victim for victim in drawn if victim in TRAINING][-3:]
    for victim in last:
        drawn.remove(victim)
    drawn += last
    follows = [number > 0 and chance.random() < 0.25 for number in range(kills)]
    leaders, at, blows = kills - sum(follows), 0, []
    for victim, follow in zip(drawn, follows, strict=True):
        if not follow:
            reach = int((at + chance.random()) / leaders * (steps - QUIET_STEPS))
            at += 1
        delay = chance.uniform(0.2, 8) if follow else chance.choice((0.0, chance.uniform(0, 2)))
        blows.append(Blow(reach, delay, victim, chance.randrange(2), chance.uniform(0.5, 4)))
    return blows


def steps_for(kills: int) -> int:
    """Of a round, in whole epochs."""
    return math.ceil((kills * STEPS_PER_KILL + QUIET_STEPS) / 3 / EPOCH) * EPOCH


def config(folder: Path, steps: int, which: str) -> dict[str, Any]:
    """The tree of the disturbed run (CHAOS), or of the other (REFERENCE)."""
    disturbed = which == CHAOS
    data = {"mix": dict.fromkeys(TINY["data"]["mix"], 12), "steps_per_epoch": EPOCH, "workers": 1}
    data["shards"] = f"s3://{BUCKET}/{SHARDS}" if disturbed else str(folder / SHARDS)
    tree: dict[str, Any] = {
        "run": {"folder": f"s3://{BUCKET}/{RUN}" if disturbed else str(folder / REFERENCE)},
        "data": TINY["data"] | data,
        "train": {"epochs": steps // EPOCH, "device": "cpu"},
        "checkpoint": {"every_steps": 10, "keep_last": 2},
        "store": {"lease_seconds": 3, "patience_seconds": 120},
        "ranks": {"restarts": 2, "timeout_seconds": 150},
        "guard": {"same_step_failures": 1000},
        "tracking": {"every_steps": 1, "experiment": which, "journal": str(folder / f"journal-{which}")},
    }
    return {**TINY, **tree}


@contextmanager
def servers(folder: Path, seed: int) -> Iterator[dict[str, Service]]:
    """The two servers behind their bad networks."""
    (folder / "mlflow").mkdir()
    with ExitStack() as ends:
        with ThreadPoolExecutor(2) as pool:  # each takes seconds to start
            made: dict[str, Future[Any]] = {
                S3: pool.submit(lambda: ends.enter_context(s3_server())),
                MLFLOW: pool.submit(lambda: ends.enter_context(MlflowServer(folder / "mlflow"))),
            }
        cuts = {S3: (150, 400, 4000), MLFLOW: (150, 1000)}
        opened = {name: Service(f.result(), random.Random(f"{name} {seed}"), cuts[name]) for name, f in made.items()}
        for service in opened.values():
            ends.callback(service.close)
        yield opened


@contextmanager
def nothing_left(mark: str) -> Iterator[None]:
    """Whatever happens, no process of the experiment outlives it."""
    try:
        yield
    finally:
        for process in marked(mark):
            kill(process)


def command(folder: Path, env: Mapping[str, str], *arguments: str) -> None:
    """`mirl-dist ARGUMENTS`, that must succeed."""
    said = subprocess.run(
        [sys.executable, "-m", "mirl_dist", *arguments],
        cwd=folder,
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if said.returncode:
        raise RuntimeError(f"mirl-dist {' '.join(arguments)} ended with {said.returncode}:\n{said.stdout}{said.stderr}")


def undisturbed(folder: Path, env: Mapping[str, str], tree: dict[str, Any], seconds: float, log: Log) -> float:
    """The same run in a folder of this machine, from shards in a folder; how long it took. Raises RuntimeError."""
    launch = Launch(0, write_json(folder / "reference.yaml", tree), folder, env)
    while (code := launch.ended()) is None:
        if time.monotonic() - launch.began > seconds:
            raise RuntimeError(f"the undisturbed run has not ended after {seconds:.0f} s: see {folder}/launch-000.out")
        time.sleep(0.1)
    took = time.monotonic() - launch.began
    if code:
        raise RuntimeError(f"the undisturbed run ended with {code}: see {folder}/launch-000.err")
    log("reference", f"the undisturbed run took {took:.0f} s")
    return took


class Result(NamedTuple):
    """What came out: every check, and figures for the table."""

    checks: list[Check]
    figures: dict[str, Any]

    @property
    def held(self) -> bool:
        return all(check.held for check in self.checks)


def try_it(folder: Path, kills: int, seed: int, minutes: float, say: Say) -> Result:
    """The whole experiment. folder: empty, for all that it writes. Raises RuntimeError where it cannot be made."""
    log, mark, steps = Log(folder, say), secrets.token_hex(8), steps_for(kills)
    with nothing_left(mark), servers(folder, seed) as services, Commits(services[S3].server.url) as commits:
        s3, mlflow = services[S3].server, services[MLFLOW].server
        calm = environment(folder, s3.env(), mlflow.url, mark, folder / "tmp-calm")
        build(folder, calm, s3)
        kind = type(s3).__name__ if durable(s3) else "moto, which is not killed: its objects would be lost"
        log("plan", f"{kills} kills in a run of 3 x {steps} steps; seed {seed}; the S3 server is {kind}")
        local = undisturbed(folder, calm, config(folder, steps, REFERENCE), 60 * minutes, log)
        victims = {name: n for name, n in DECK.items() if durable(s3) or name not in (S3, S3_WHOLE)}
        tree = config(folder, steps, CHAOS)
        path = write_json(folder / "chaos.yaml", tree)
        env = environment(folder, s3.env(services[S3].proxy.url), services[MLFLOW].proxy.url, mark, folder / "tmp")
        experiment = Experiment(
            blows=planned(kills, 3 * steps, seed, victims),
            services=services,
            commits=commits,
            start=lambda number: Launch(number, path, folder, env),
            steps=Steps(folder / "tmp"),
            steps_per_round=steps,
            chance=random.Random(f"launches {seed}"),
            log=log,
        )
        began = time.monotonic()
        ended = experiment.play(minutes)
        figures = figures_of(experiment) | {
            "seconds": round(time.monotonic() - began, 1),
            "undisturbed_seconds": round(local, 1),
            "commits": len(commits.folders),
            "faults": {name: service.told() for name, service in services.items()},
        }
        found = list(watched(experiment, commits))
        if ended:
            for service in services.values():
                service.settle()
            journal = folder / f"journal-{CHAOS}"
            figures["resent_by_hand"] = checks.waits(journal)
            if figures["resent_by_hand"]:
                command(folder, calm, "track", "resend", tree["run"]["folder"])
            client = checks.plain_client(s3.url)
            found += checks.all_of(Ended(client, folder / REFERENCE, mlflow.url, journal, mark))
        return Result(found, figures | {"seed": seed, "steps": 3 * steps, **conditions(type(s3).__name__)})


def build(folder: Path, env: Mapping[str, str], server: S3Server) -> None:
    """Tiny shards, in a folder and in the bucket."""
    write_photographs(folder / "images")
    write_json(folder / "recipe.yaml", recipe_of(folder / "images"))
    command(folder, env, "shards", "build", "recipe.yaml", "--out", SHARDS, "--workers", "1")
    server.fill(f"{server.bucket(BUCKET)}/{SHARDS}", folder / SHARDS)


def conditions(server: str) -> dict[str, Any]:
    names = ("torch", "accelerate", "mlflow", "boto3")
    return {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "s3": server,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


def shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def table(result: Result) -> Iterator[str]:
    """Lines for a terminal."""
    f = result.figures
    yield f"{'killed':19} {'times':>5}  {'to the next step: median':>24} {'longest':>9}"
    for victim, said in f["victims"].items():
        middle, longest = (said[f"{which}_seconds_to_next_step"] for which in ("median", "longest"))
        yield f"{victim:19} {said['kills']:5}  {shown(middle):>24} {shown(longest):>9}"
    yield (
        f"{f['seconds']:.0f} s, undisturbed {f['undisturbed_seconds']:.0f} s; {f['steps']} steps, "
        f"{f['steps_retrained']} trained again; {f['commits']} commits; {f['launches']} launches, "
        f"{f['elastic_restarts']} elastic restarts"
    )
    yield f"exit codes {f['exit_codes']}; {f['refused_by_a_dying_launch']} refused; {f['tracebacks']} tracebacks"
    for name, said in f["faults"].items():
        yield f"{name}: " + ", ".join(f"{count} {what}" for what, count in said.items() if what != "spells")
        yield "  spells of weather: " + ", ".join(f"{count} {what}" for what, count in said["spells"].items())
    for check in result.checks:
        yield f"{'holds' if check.held else 'FAILS'}  {check.name:24} {check.found}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="the disturbed run may take")
    parser.add_argument("--folder", type=Path, help="an empty or new one; it is kept. Default: a temporary one")
    parser.add_argument("--out", type=Path, help="figures and conditions as JSON")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        result = try_it(folder, given.kills, given.seed, given.minutes, lambda line: print(line, flush=True))
        print("\n".join(table(result)))
        if not result.held and given.folder is None:
            kept = Path(tempfile.mkdtemp(prefix="chaos-failed-"))
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            print(f"what was written is kept in {kept}")
    if given.out is not None:
        said = [check._asdict() for check in result.checks]
        write_json(given.out, result.figures | {"checks": said})
    sys.exit(0 if result.held else 1)


if __name__ == "__main__":
    main()
