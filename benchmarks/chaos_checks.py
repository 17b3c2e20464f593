"""What chaos.py holds a run against: its commits as they appear, and, at its end, the same run undisturbed."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chaos_world import At, alive, marked

from mirl_dist.observability.mlflow import tracker
from mirl_dist.training import ticket

FINISHED = 1 << 60
"""The step of a commit that ends its round."""
BUCKET, RUN, SHARDS, ROUNDS = "chaos", "run", "shards", (0, 1, 2)
CHAOS, REFERENCE = "chaos", "reference"
"""Experiments in MLflow."""
_COMMIT = re.compile(rf"{RUN}/rounds/(\d+)/(?:steps/(\d+)-\d+|ticket-\d+)/COMPLETE\.json")
_TIMES = ("samples_per_second", "time/")
_CLOSE = 1e-6
_PER_LAUNCH = ("logs/", "lease/", "accepted/")


class Check(NamedTuple):
    """One promise: what it says, what was found, and whether it held."""

    name: str
    found: str
    held: bool


# -- the store, seen without the package and without the proxy --------------------------------------------------------


class Commits:
    """A thread that lists the run's commits all the time. folders: all that were ever seen; lost: what went back."""

    def __init__(self, url: str) -> None:
        self.folders: set[str] = set()
        self.lost: list[str] = []
        self._newest: list[tuple[float, At]] = []
        self._client, self._ended = plain_client(url), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._looking = threading.Lock()
        self._thread.start()

    def before(self, moment: float) -> At | None:
        """The newest commit in any list that was complete at a moment."""
        return max((at for seen, at in list(self._newest) if seen <= moment), default=None)

    def look(self) -> bool:
        """List now; whether the server answered."""
        with self._looking:
            try:
                names = names_in(self._client, f"{RUN}/rounds/")
            except server_errors():
                return False
            self._note([match for name in names if (match := _COMMIT.fullmatch(name))])
            return True

    def _note(self, found: list[re.Match[str]]) -> None:
        self.folders |= {match[0].rpartition("/")[0] for match in found}
        newest = max((At(int(m[1]), FINISHED if m[2] is None else int(m[2])) for m in found), default=None)
        known = self._newest[-1][1] if self._newest else None
        if newest is not None and (known is None or newest > known):
            self._newest.append((time.monotonic(), newest))
        elif newest != known:
            self.lost.append(f"{told(known)} was the newest commit, and then {told(newest)}")

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.3):
            self.look()


def told(at: At | None) -> str:
    if at is None:
        return "nothing"
    return f"round {at.round}, {'finished' if at.step == FINISHED else f'step {at.step}'}"


def plain_client(url: str) -> Any:
    """A boto3 client that tries once."""
    import boto3.session
    from botocore.config import Config

    once = Config(
        connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
    )
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing-secret", "region_name": "us-east-1"}
    return boto3.session.Session().client("s3", endpoint_url=url, config=once, **keys)


def server_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError


def names_in(client: Any, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return sorted(found["Key"] for page in pages for found in page.get("Contents", ()))


# -- at the end -------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """Both runs. client: of S3; mlflow_url: the server itself; mark: of the experiment's processes."""

    client: Any
    reference: Path
    mlflow_url: str
    journal: Path
    mark: str

    def bytes_of(self, name: str) -> bytes:
        """An object of the disturbed run."""
        found: bytes = self.client.get_object(Bucket=BUCKET, Key=f"{RUN}/{name}")["Body"].read()
        return found

    def ticket_of(self, round_: int) -> str:
        """The folder of a finished round's ticket."""
        below = f"{RUN}/rounds/{round_:02d}/ticket-"
        (found,) = [n for n in names_in(self.client, below) if n.endswith("/COMPLETE.json")]
        return found.removeprefix(f"{RUN}/").removesuffix("/COMPLETE.json")


def all_of(ended: Ended) -> list[Check]:
    """Every check; what cannot be checked fails."""
    from mlflow.exceptions import MlflowException

    found: list[Check] = []
    for some in (tickets, points, leftovers):
        try:
            found += some(ended)
        except (*server_errors(), MlflowException, OSError, ValueError, LookupError) as error:
            found.append(Check(f"{some.__name__}", f"cannot be checked: {type(error).__name__}: {error}", False))
    return found


def tickets(ended: Ended) -> Iterator[Check]:
    """(a) The very same tickets, weights and masks."""
    same, files = [], []
    for round_ in ROUNDS:
        folder, (other,) = ended.ticket_of(round_), ended.reference.glob(f"rounds/{round_:02d}/ticket-*")
        mine = ticket.parse(ended.bytes_of(f"{folder}/ticket.json"), "chaos")
        theirs = ticket.parse((other / "ticket.json").read_bytes(), "reference")
        same.append(mine.digest() == theirs.digest())
        for part in ("weights.safetensors", "mask.safetensors"):
            files.append(ended.bytes_of(f"{folder}/{part}") == (other / part).read_bytes())
    yield Check("(a) tickets", f"{sum(same)} of {len(ROUNDS)} have the undisturbed run's digest", all(same))
    yield Check(
        "(a) weights and masks", f"{sum(files)} of {len(files)} files are the undisturbed run's bytes", all(files)
    )


class Shown(NamedTuple):
    """What MLflow shows of one experiment: its parent runs, and its nested runs by round."""

    parents: list[Any]
    rounds: dict[int, list[Any]]


def shown(client: Any, name: str) -> Shown:
    experiment = client.get_experiment_by_name(name)
    runs = list(client.search_runs([experiment.experiment_id]))
    rounds: dict[int, list[Any]] = {}
    for run in runs:
        if "mlflow.parentRunId" in run.data.tags:
            rounds.setdefault(int(run.data.tags["round"]), []).append(run)
    return Shown([run for run in runs if "mlflow.parentRunId" not in run.data.tags], rounds)


def points(ended: Ended) -> Iterator[Check]:
    """(c) What MLflow shows: the same runs, each point once, the same values, the tickets' files."""
    from mlflow import MlflowClient

    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    client = MlflowClient(ended.mlflow_url)
    mine, theirs = shown(client, CHAOS), shown(client, REFERENCE)
    nested = [run for runs in mine.rounds.values() for run in runs]
    one = len(mine.parents) == 1 and sorted(mine.rounds) == list(ROUNDS) and len(nested) == len(ROUNDS)
    yield Check("(c) runs in MLflow", f"{len(mine.parents)} parent, {len(nested)} nested", one)
    states = [run.info.status for run in [*mine.parents, *nested]]
    yield Check("(c) finished", f"{states.count('FINISHED')} of {len(states)} runs", set(states) == {"FINISHED"})
    if not one:
        return
    pairs = [(mine.parents[0], theirs.parents[0]), *((mine.rounds[r][0], theirs.rounds[r][0]) for r in ROUNDS)]
    compared = Compared()
    for run, other in pairs:
        compared.add(client, run, other)
    yield from compared.checks()
    yield _files(ended, client, mine, theirs)


class Compared:
    """Curves of a run beside those of the other."""

    def __init__(self) -> None:
        self.points = self.twice = self.missing = self.foreign = self.differ = self.losses = 0
        self.furthest = 0.0

    def add(self, client: Any, run: Any, other: Any) -> None:
        for name in run.data.metrics.keys() | other.data.metrics.keys():
            mine = [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]
            theirs = dict((p.step, p.value) for p in client.get_metric_history(other.info.run_id, name))
            steps = {step for step, _ in mine}
            self.points += len(mine)
            self.twice += len(mine) - len(steps)
            self.missing += len(theirs.keys() - steps)
            self.foreign += len(steps - theirs.keys())
            if not name.startswith(_TIMES):
                self._values(name, mine, theirs)

    def _values(self, name: str, mine: list[tuple[int, float]], theirs: dict[int, float]) -> None:
        self.losses += len(mine) if name.startswith("loss/") else 0
        for step, value in mine:
            if step in theirs and value != theirs[step]:
                self.differ += 1
                self.furthest = max(self.furthest, abs(value - theirs[step]) / max(abs(theirs[step]), 1e-12))

    def checks(self) -> Iterator[Check]:
        wrong = (self.twice, self.missing, self.foreign)
        text = f"{self.points} points; {self.twice} twice, {self.missing} missing, {self.foreign} of no step"
        yield Check("(c) each point once", text, self.points > 0 and not any(wrong))
        equal = "all equal to the bit" if not self.differ else f"{self.differ} differ, by {self.furthest:.1e} at most"
        yield Check("(c) values", f"{self.losses} losses and all else but speeds: {equal}", self.furthest <= _CLOSE)


def _files(ended: Ended, client: Any, mine: Shown, theirs: Shown) -> Check:
    """The tickets' artefacts: the same names as in the reference; each has the bytes of the store's file."""
    right = wanted = 0
    for round_ in ROUNDS:
        folder = f"tickets/{round_:02d}"
        names = [
            sorted(f.path for f in client.list_artifacts(runs[round_][0].info.run_id, folder))
            for runs in (mine.rounds, theirs.rounds)
        ]
        wanted += len(names[1])
        for path in names[0] if names[0] == names[1] else ():
            local = Path(client.download_artifacts(mine.rounds[round_][0].info.run_id, path))
            right += local.read_bytes() == ended.bytes_of(f"{ended.ticket_of(round_)}/{local.name}")
    return Check("(c) tickets' files", f"{right} of {wanted} are there with the store's bytes", right == wanted > 0)


def leftovers(ended: Ended) -> Iterator[Check]:
    """(d) Nothing is left of what died."""
    last = time.monotonic() + 30  # loader processes look for their parents every 5 s
    while (living := [p for p in marked(ended.mark) if alive(p)]) and time.monotonic() < last:
        time.sleep(0.2)
    yield Check("(d) processes", f"{len(living)} of the experiment are alive", not living)
    names = [name.removeprefix(f"{RUN}/") for name in names_in(ended.client, f"{RUN}/")]
    steps = [name for name in names if "/steps/" in name]
    yield Check("(d) step commits", f"{len(steps)} objects left", not steps)
    theirs = [p.relative_to(ended.reference).as_posix() for p in ended.reference.rglob("*") if p.is_file()]
    rounds = [ended.ticket_of(r) for r in ROUNDS]
    parts = {f"{r}/{part}" for r in rounds for part in json.loads(ended.bytes_of(f"{r}/COMPLETE.json"))["parts"]}
    mine, whole = ({re.sub(r"/ticket-\d+/", "/ticket/", n) for n in of} for of in (names, parts))
    wanted = {re.sub(r"/ticket-\d+/", "/ticket/", n) for n in theirs}
    odd = {n for n in mine ^ wanted if n not in whole and not n.startswith(_PER_LAUNCH)}
    yield Check("(d) other objects", f"{len(odd)} more or fewer than undisturbed {' '.join(sorted(odd)[:3])}", not odd)
    newest = max((n for n in names if re.fullmatch(r"lease/\d+\.json", n)), default="")
    said = newest.replace(".json", ".released.json")
    why = json.loads(ended.bytes_of(said))["why"] if said in names and said else "nothing"
    yield Check("(d) lease", f"generation {newest[6:14]} released: {why}", why == "finished")
    pending = ended.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    yield Check("(d) uploads in parts", f"{len(pending)} pending", not pending)
    waits = tracker.pending_records(ended.journal)
    yield Check(
        "(d) journal", f"{waits.points} points and {waits.records} records wait", not (waits.points or waits.records)
    )


def waits(journal: Path) -> bool:
    """Whether MLflow has not heard all."""
    found = tracker.pending_records(journal)
    return bool(found.points or found.records)
