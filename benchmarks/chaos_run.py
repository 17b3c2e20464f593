"""The disturbed run of chaos.py: launched, watched, struck, and launched again until it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from chaos_checks import FINISHED, Check, Commits, told
from chaos_world import At, Launch, Service, alive, family, kill

from mirl_dist.training.checkpointing import crash_loop

RANK, ALL, LAUNCHER = "one rank", "all ranks", "the launcher"
S3, S3_WHOLE, MLFLOW = "the S3 server", "S3 with its storage", "the MLflow server"
TRAINING = (RANK, ALL, LAUNCHER)
LATE_STEPS = 30
CALM_STEPS = 15  # of good weather at the end: a lease is let go within its seconds, or not at all
ORPHAN_SECONDS, STUCK_SECONDS = 30.0, 300.0
Say = Callable[[str], None]


class Steps:
    """Where the run's main rank is, read many times a second from the record of its steps (crash_loop.py)."""

    def __init__(self, temporary: Path) -> None:
        """temporary: TMPDIR of this run alone."""
        self._folder = temporary / f"mirl-dist-{os.getuid()}" / "footprints"

    def now(self) -> At | None:
        """The steps that were done when the newest one began; None before the first, and between rounds."""
        records = []
        for path in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # a life that ends well removes it
                records.append(crash_loop.read_record(path.read_bytes()))
        newest = max(records, default=crash_loop.StepRecord())  # one that is inside a step comes last
        return At(newest.round_, newest.updates) if newest.inside else None


class Blow(NamedTuple):
    """One kill: `delay` seconds after the run has reached `after` steps, or 30 steps later. away: of a server."""

    after: int
    delay: float
    victim: str
    rank: int
    away: float


class Log:
    """What happened when: lines of JSON in the experiment's folder, and some of them for people."""

    def __init__(self, folder: Path, say: Say) -> None:
        self._path, self._say, self._began = folder / "events.jsonl", say, time.monotonic()

    def __call__(self, what: str, text: str = "", **more: Any) -> None:
        at = time.monotonic() - self._began
        with self._path.open("a") as file:
            file.write(json.dumps({"seconds": round(at, 3), "what": what, "text": text, **more}) + "\n")
        if text:
            self._say(f"{at:7.1f} s  {text}")


class Hurt(NamedTuple):
    """A kill that the run has not got over: it has when it trains a step after it."""

    at: float
    victim: str


class Experiment:
    """The disturbed run, from its first launch to its end. Counts and failures are read when `play` has returned."""

    def __init__(
        self, blows: list[Blow], services: dict[str, Service], commits: Commits, start: Callable[[int], Launch],
        steps: Steps, steps_per_round: int, chance: random.Random, log: Log,
    ) -> None:  # fmt: skip
        self._services, self._commits, self._start_launch = services, commits, start
        self._steps, self._per_round, self._chance, self._log = steps, steps_per_round, chance, log
        self.waiting, self.killed, self.codes = list(blows), Counter[str](), Counter[int]()
        self.total = len(blows)
        self.launches = self.elastic = self.resumes = self.refused = self.retrained = self.tracebacks = 0
        self.failures: list[str] = []
        self.lost: list[str] = []
        self.recoveries: dict[str, list[float]] = {}
        self.vanished: list[float] = []
        self._due: dict[Blow, float] = {}
        self._orphans: list[tuple[float, list[psutil.Process]]] = []
        self._hurt: list[Hurt] = []
        self._launch: Launch | None = None
        self._next_launch, self._refusal, self._struck = 0.0, False, False
        self._furthest, self._at, self._first = -1, At(-1, -1), At(-1, -1)
        self._floor: At | None = None
        self._opened, self._state = 0.0, "none"
        self._moved = time.monotonic()

    def play(self, minutes: float) -> bool:
        """Until the run has ended; whether it has."""
        last = time.monotonic() + 60 * minutes
        while not self.failures:
            self._keep_launched()
            if self._launch is None and self.codes[0]:
                return True
            self._listen()
            self._follow()
            self._strike()
            self._watch_orphans()
            for service in self._services.values():
                service.tick(disturb=self._furthest < 3 * self._per_round - CALM_STEPS)
            now = time.monotonic()
            if now > last:
                self.failures.append(f"not at its end after {minutes:g} minutes")
            if now - self._moved > STUCK_SECONDS:
                self.failures.append(f"no new step for {STUCK_SECONDS:.0f} s, launch {self.launches}")
            time.sleep(0.02)
        return False

    # -- launches ---------------------------------------------------------------------------------------------------

    def _keep_launched(self) -> None:
        now = time.monotonic()
        if self._launch is None:
            if now >= self._next_launch and not self.codes[0]:
                self._commits.look()
                self._floor = self._commits.before(time.monotonic())
                self.launches += 1
                self._refusal = self._struck = False
                self._launch = self._start_launch(self.launches)
                self._log("launch", number=self.launches, newest=told(self._floor))
            return
        code = self._launch.ended()
        if code is None:
            return
        self._listen()
        self.codes[code] += 1
        self._log("ended", number=self.launches, code=code)
        if (code == 2 and not self._refusal) or (code < 0 and not self._struck):
            self.failures.append(f"launch {self.launches} ended with {code}: see launch-{self.launches:03d}.err")
        self.refused += code == 2 and self._refusal
        self._launch, self._next_launch = None, now + self._chance.uniform(0, 1.5)

    def _listen(self) -> None:
        """To what the launch says."""
        for kind, line in self._launch.lines() if self._launch else ():
            if kind == "out" and re.match(r"\d+ ranks x", line):
                self._opened, self._state = time.monotonic(), "opened"
            elif found := re.match(r"resuming: round (\d+), (?:after step (\d+)|finished)", line):
                self.resumes += 1
                at = At(int(found[1]), FINISHED if found[2] is None else int(found[2]))
                self._log("resumes", at=told(at), newest=told(self._floor))
                if self._floor is not None and at < self._floor:
                    self.lost.append(f"launch {self.launches} resumed {told(at)}, committed was {told(self._floor)}")
            elif "starting the ranks again (" in line:
                self.elastic += 1
                self._floor = self._commits.before(time.monotonic())
                self._log("ranks again", line=line)
            elif "is held by another launch" in line:
                self._refusal = True
            elif line.startswith("Traceback"):
                self.tracebacks += 1
                self._log("traceback", number=self.launches)

    # -- progress ---------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Note a step that begins, once; `_at` counts those done before."""
        at, now = self._steps.now(), time.monotonic()
        if at is None:
            self._state = "rested" if self._state == "opened" else self._state
            return
        if at == self._at and self._state != "rested":
            return
        index = at.round * self._per_round + at.step
        if self._state in ("rested", "opened"):  # the first step of these ranks
            self._state, self._first = "training", at
            self.retrained += max(0, self._furthest - index)
            if self._floor is not None and at < self._floor:
                self.lost.append(f"launch {self.launches} trains {told(at)}, committed was {told(self._floor)}")
        over = [h for h in self._hurt if at != self._first and (h.victim not in TRAINING or h.at < self._opened)]
        restarted = any(h.victim in TRAINING for h in self._hurt)
        for hurt in over:
            if hurt.victim in TRAINING or not restarted:  # else it is not the server that was waited for
                self.recoveries.setdefault(hurt.victim, []).append(now - hurt.at)
            self._hurt.remove(hurt)
        if index > self._furthest:
            self._furthest, self._moved = index, now
        self._at = at

    # -- kills ------------------------------------------------------------------------------------------------------

    def _strike(self) -> None:
        """The first kill that is due and whose victim lives."""
        now = time.monotonic()
        for blow in self.waiting:
            if self._furthest < blow.after:
                break
            due = self._due.setdefault(blow, now + blow.delay)
            early = self._furthest < blow.after + LATE_STEPS
            if now < due and early:
                continue
            if self._hit(blow):
                self._note(blow)
                break
            self._due[blow] = now + 0.25 + blow.delay  # it is dead; not at the very moment when it lives again

    def _note(self, blow: Blow) -> None:
        self.waiting.remove(blow)
        self.killed[blow.victim] += 1
        self._hurt.append(Hurt(time.monotonic(), blow.victim))
        which = f" {blow.rank}" if blow.victim == RANK else ""
        text = f"kill {self.killed.total():3d} of {self.total}: {blow.victim + which:18} {told(self._at):20}"
        self._log("kill", f"{text} launch {self.launches}", blow=blow._asdict())

    def _hit(self, blow: Blow) -> bool:
        """Whether the victim was there to be killed."""
        if blow.victim in (S3, S3_WHOLE, MLFLOW):
            service = self._services[MLFLOW if blow.victim == MLFLOW else S3]
            if service.up:
                service.kill(blow.away, everything=blow.victim == S3_WHOLE)
                return True
            return False
        if self._launch is None or self._launch.ended() is not None:
            return False
        if blow.victim == LAUNCHER:
            victims = [self._launch.process]
            self._struck = True
        else:
            ranks = self._launch.ranks()
            if len(ranks) < 2:
                return False
            victims = list(ranks.values()) if blow.victim == ALL else [ranks[blow.rank]]
        left = [p for victim in victims for p in family(victim)]
        for victim in victims:
            kill(victim)
        self._orphans.append((time.monotonic(), left))
        return True

    def _watch_orphans(self) -> None:
        """What the killed left behind must go by itself."""
        now = time.monotonic()
        for born, processes in list(self._orphans):
            if not any(alive(p) for p in processes):
                self.vanished.append(now - born)
            elif now - born < ORPHAN_SECONDS:
                continue
            else:
                names = ", ".join(str(p) for p in processes if alive(p))
                self.failures.append(f"still alive {ORPHAN_SECONDS:.0f} s after what started it was killed: {names}")
            self._orphans.remove((born, processes))


def watched(experiment: Experiment, commits: Commits) -> Iterator[Check]:
    """What was seen while it ran."""
    e = experiment
    done = e.killed.total()
    yield Check("kills", f"{done} of {e.total} before the run's end", done == e.total)
    for failure in e.failures:
        yield Check("failure", failure, False)
    lost = e.lost + commits.lost
    yield Check(
        "(b) no commit lost", f"{e.resumes} resumes, {len(lost)} before a commit {' '.join(lost[:2])}", not lost
    )
    worst = max(e.vanished, default=0.0)
    yield Check("(d) orphans", f"{len(e.vanished)} times all gone by themselves, after {worst:.1f} s at most", True)


def figures_of(experiment: Experiment) -> dict[str, Any]:
    """(e) Counts."""
    e = experiment
    victims = {
        victim: {
            "kills": n,
            "median_seconds_to_next_step": round(statistics.median(seconds), 2) if seconds else None,
            "longest_seconds_to_next_step": round(max(seconds), 2) if seconds else None,
        }
        for victim, n in sorted(e.killed.items())
        for seconds in [e.recoveries.get(victim, [])]
    }
    return {
        "kills": e.killed.total(),
        "victims": victims,
        "launches": e.launches,
        "exit_codes": {str(code): n for code, n in sorted(e.codes.items())},
        "refused_by_a_dying_launch": e.refused,
        "elastic_restarts": e.elastic,
        "resumes": e.resumes,
        "steps_retrained": e.retrained,
        "tracebacks": e.tracebacks,
    }
