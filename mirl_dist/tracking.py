"""The door to MLflow: one parent run per run, one nested run per round, and no mishap there stops training.

Everything goes into an outbox first, and leaves it in order when the store has it. Delivering twice changes
nothing: points keep the time of their making (by which the store knows them), runs are found again by id or
tag, files are overwritten. So neither a restart nor an answer lost on the way leaves a point twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from mirl_dist.faults import Fault

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 300.0
TRIES_PER_FILE = 3
OUTBOX_BYTES, POINT_BYTES = 64 * 2**20, 200  # what may wait in memory; one point, roughly
POINTS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # MLflow's limits, as are the next three (characters)
LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000

_log = logging.getLogger("mirl_dist.tracking")


@dataclass(eq=False)
class Item:
    """One thing to deliver."""

    do: str  # open, params, points, ticket, file or end
    where: str  # "run" or "round/03"
    name: str = ""  # of a run or a file; the status for "end"
    texts: dict[str, str] = field(default_factory=dict)  # tags or params
    points: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, time in ms, step
    data: bytes = b""
    at_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    tries: int = 0


class Store(Protocol):
    """Where items go. `deliver` must bear the same item twice."""

    name: str  # for people, without secrets

    def deliver(self, item: Item) -> None: ...
    def troubles(self) -> tuple[type[BaseException], ...]: ...
    def told(self, trouble: BaseException) -> str: ...
    def final(self, trouble: BaseException) -> bool: ...
    def answers(self) -> bool: ...


class Outbox:
    """Items in the order of their making; when too much waits, the oldest points and files are forgotten."""

    def __init__(self, store: Store) -> None:
        self.items: deque[Item] = deque()
        self._store = store
        self._forgotten = 0
        self._away, self._pause, self._not_before = False, 0.0, 0.0

    def put(self, item: Item) -> None:
        self.items.append(item)

    def put_points(self, do: str, where: str, values: list[tuple[str, float, int]]) -> None:
        """Add (name, value, step) under one time, joined to the last item where the batch limit allows.

        Values that are not finite are left out: MLflow would draw infinity as 1.8e308.
        """
        now = time.time_ns() // 1_000_000
        points = [(legal_name(n), float(v), now, step) for n, v, step in values if math.isfinite(v)]
        tail = self.items[-1] if self.items else None
        same = tail is not None and (tail.do, tail.where) == (do, where)
        if tail and same and len(tail.points) + len(points) <= POINTS_PER_CALL:
            tail.points += points
            return
        for start in range(0, len(points), POINTS_PER_CALL):
            self.put(Item(do, where, points=points[start : start + POINTS_PER_CALL]))

    def deliver(self, *, at_once: bool) -> None:
        """Deliver in order until nothing waits or the store fails; without `at_once`, not during a pause."""
        if at_once or time.monotonic() >= self._not_before:
            while self.items:
                try:
                    self._store.deliver(self.items[0])
                except self._store.troubles() as trouble:
                    if self._must_wait(self.items[0], trouble):
                        break
                self.items.popleft()
            else:
                self._away, self._pause, self._not_before = False, 0.0, 0.0
        self._forget_oldest()

    def _must_wait(self, item: Item, trouble: BaseException) -> bool:
        """Whether a failed item stays; the first failure of an outage and each refusal are told."""
        if item.do == "file" and self._store.answers():
            item.tries += 1
        refused = item.do != "open" and self._store.final(trouble)
        if refused or item.tries >= TRIES_PER_FILE:
            _log.warning(
                "%s did not take %s '%s' of %s (%s). Training goes on without it there.",
                *(self._store.name, item.do, item.name, item.where, self._store.told(trouble)),
            )
            return False
        if not self._away:
            _log.warning(
                "%s is away or refuses (%s). Training goes on; points are kept and sent when it is back. "
                "Check the server, and the address in tracking.uri or MLFLOW_TRACKING_URI.",
                *(self._store.name, self._store.told(trouble)),
            )
        self._away = True
        self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._not_before = time.monotonic() + self._pause
        if item.do == "file":  # the place for files may be away alone: let points pass
            self.items.rotate(-1)
        return True

    def _forget_oldest(self) -> None:
        sizes = [(item, POINT_BYTES * len(item.points) + len(item.data)) for item in self.items]
        total = sum(size for _, size in sizes)
        for item, size in sizes:
            if total > OUTBOX_BYTES and size:
                if not self._forgotten:
                    _log.warning("too much waits for %s: the oldest is being forgotten", self._store.name)
                self.items.remove(item)
                self._forgotten += len(item.points) or 1
                total -= size

    def __str__(self) -> str:
        points = sum(len(item.points) for item in self.items)
        text = f"{points} points and {sum(not item.points for item in self.items)} other records wait"
        return text + (f" and {self._forgotten} were forgotten" if self._forgotten else "")


def flat(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested params as {'a.b': text}; numbers, lists, true, false and null as JSON writes them."""
    texts: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            texts |= flat(value, f"{prefix}{name}.")
        else:
            texts[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return texts


def legal_name(name: str) -> str:
    """A name that MLflow takes for a metric, param or tag: letters, digits, _ - . / space, 250 at most."""
    parts = re.sub(r"[^/\w.\- ]", "_", name)[:LONGEST_NAME].split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "_"


def shown(uri: str) -> str:
    """A tracking URI without password, token and query (for web addresses without user name as well)."""
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    if parts.scheme in ("http", "https"):
        user, at = "", ""
    return f"{parts.scheme}://{user.partition(':')[0]}{at}{host}{parts.path}" if parts.scheme else uri


def masked(text: str, uri: str) -> str:
    """A text without the secrets of the tracking URI, of MLflow's environment, and of any address in it."""
    parts = urlsplit(uri)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    token = user if not password and parts.scheme in ("http", "https") else ""
    environment = [os.environ.get(f"MLFLOW_TRACKING_{word}", "") for word in ("PASSWORD", "TOKEN")]
    text = re.sub(r"(\w://)[^/\s@]+@", r"\1***@", text.replace(uri, shown(uri)))
    for secret in (password, unquote(password), token, parts.query, *environment):
        if len(secret) > 3:  # shorter ones would garble every word
            text = text.replace(secret, "***")
    return text


STEPS_PER_DELIVERY, SECONDS_PER_DELIVERY = 50, 5.0

_SETTINGS = {  # MLflow reads them at each call; what the user has set stands
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds; without retries a dead server costs 5 s a try, not 246 s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
_FINAL = ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", "RESOURCE_DOES_NOT_EXIST")  # asking again is no use


class Tracker(Protocol):
    """What a story tells of its run: `Mlflow` on rank 0, `Silent` on the others; methods as in `Mlflow`."""

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None: ...
    def begin_round(self, round_: int, tags: Mapping[str, str]) -> int: ...
    def log_step(self, step: int, values: Mapping[str, float]) -> None: ...
    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None: ...
    def log_file(self, name: str, data: bytes, where: str) -> None: ...
    def flush(self) -> None: ...
    def end_round(self, status: str = "FINISHED") -> None: ...
    def end_run(self, status: str = "FINISHED") -> None: ...
    def address(self) -> str: ...


class Silent(Tracker):
    """The twin that does nothing: for ranks other than 0, and for tracking switched off."""

    def begin_round(self, round_: int, tags: Mapping[str, str]) -> int:
        return -1

    def address(self) -> str:
        return ""


class Mlflow:
    """A run as MLflow shows it, reopened by id after a restart and without any point twice.

    uri: tracking URI; None means MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory.
    remembered, remember: ids that the caller keeps over restarts ("run", "round/03", and "key", by which a
    run is found whose id got lost); `remember` gets new ones as soon as they exist.
    A store that is away or refuses raises nothing: one warning per outage, logger "mirl_dist.tracking".
    Raises Fault for a URI that MLflow refuses, and when MLflow is not installed.
    """

    def __init__(
        self,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        remembered: Mapping[str, str],
        remember: Callable[[dict[str, str]], None],
    ) -> None:
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        _import_quietly(self._uri)
        self._run_name = run_name
        self._store = _Store(self._uri, experiment, dict(remembered), remember)
        self._outbox = Outbox(self._store)
        self._round, self._begun = "", set[str]()
        self._steps_waiting, self._waiting_since = 0, 0.0

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the parent run; nested params become 'a.b', long values are cut, passwords in URLs masked.

        A param that differs after a restart stays; its new value becomes the tag 'changed.<name>'.
        """
        self._begin("run", self._run_name, tags)
        long = LONGEST_PARAM
        texts = [(legal_name(n), masked(text, self._uri)[:long]) for n, text in flat(params).items()]
        for start in range(0, len(texts), PARAMS_PER_CALL):
            some = dict(texts[start : start + PARAMS_PER_CALL])
            self._outbox.put(Item("params", "run", texts=some))
        self._deliver(at_once=True)

    def begin_round(self, round_: int, tags: Mapping[str, str]) -> int:
        """Open the nested run 'round 03' and return the last step it holds; points up to it are not resent.

        Returns -1 for a run without points, or while the store is away (they are sorted out on delivery).
        """
        self._round = f"round/{round_:02d}"
        self._begin(self._round, f"round {round_:02d}", tags)
        self._deliver(at_once=True)
        reached = self._store.reached.get(self._round)
        return reached.last if reached else -1

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Write down the values of one optimiser step; delivered when 50 steps or 5 seconds have gathered.

        Values that are not finite are left out.
        """
        assert self._round, "begin_round comes first"
        self._outbox.put_points("points", self._round, [(n, value, step) for n, value in values.items()])
        if self._steps_waiting == 0:
            self._waiting_since = time.monotonic()
        self._steps_waiting += 1
        old = time.monotonic() - self._waiting_since >= SECONDS_PER_DELIVERY
        if old or self._steps_waiting >= STEPS_PER_DELIVERY:
            self.flush()

    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None:
        """Write down what a begun round came to: twice is once. Names must differ from those of log_step.

        All go to the nested run, and those not under 'density/' to the parent too, at step = round; the
        parent also gets 'by_alive/<name>' at step = values['alive_weights'] where that is given.
        """
        where = f"round/{round_:02d}"
        assert where in self._begun, "begin_round comes first"
        self._outbox.put_points("ticket", where, [(name, value, round_) for name, value in values.items()])
        summary = {name: value for name, value in values.items() if not name.startswith("density/")}
        points = [(name, value, round_) for name, value in summary.items()]
        alive = summary.pop("alive_weights", math.nan)
        if math.isfinite(alive):
            points += [(f"by_alive/{name}", value, int(alive)) for name, value in summary.items()]
        self._outbox.put_points("ticket", "run", points)
        self.flush()

    def log_file(self, name: str, data: bytes, where: str) -> None:
        """Keep a file ('folder/name', a relative path) with the current 'round' or with the whole 'run'."""
        path = PurePosixPath(name)
        assert where in ("round", "run") and path.name and not path.is_absolute() and ".." not in path.parts
        self._outbox.put(Item("file", self._round if where == "round" else "run", str(path), data=data))
        self.flush()

    def flush(self) -> None:
        """Deliver what waits, unless the store failed a moment ago."""
        self._deliver(at_once=False)

    def end_round(self, status: str = "FINISHED") -> None:
        """Close the nested run of the current round as FINISHED, FAILED or KILLED."""
        self._outbox.put(Item("end", self._round, status))
        self.flush()

    def end_run(self, status: str = "FINISHED") -> None:
        """Close the parent run as FINISHED, FAILED or KILLED, and try once more to deliver what waits."""
        self._outbox.put(Item("end", "run", status))
        self._deliver(at_once=True)
        if self._outbox.items:
            _log.warning("the run ends while %s for %s: lost to MLflow only", self._outbox, shown(self._uri))

    def address(self) -> str:
        """Where people find the run: its page, or the command that opens the store; never a password."""
        clean, run = shown(self._uri), self._store.reached.get("run")
        if not clean.startswith("http"):
            return f"{clean} (to see it: mlflow ui --backend-store-uri {clean})"
        page = f"{clean.rstrip('/')}/#/experiments/{self._store.experiment_id}/runs/"
        return page + run.id if run else clean

    def _begin(self, where: str, name: str, tags: Mapping[str, str]) -> None:
        texts = {legal_name(t): masked(text, self._uri)[:LONGEST_TAG] for t, text in tags.items()}
        self._outbox.put(Item("open", where, name, texts))
        self._begun.add(where)

    def _deliver(self, *, at_once: bool) -> None:
        self._steps_waiting = 0
        self._outbox.deliver(at_once=at_once)


@dataclass
class _Reached:
    """What the store held of a run when it was opened."""

    id: str
    params: dict[str, str]
    steps: dict[str, int]  # latest step of each curve
    last: int  # latest step of all, -1 for none


class _Store:
    """MLflow at one address: resolves our names to its ids, and bears the same item twice."""

    def __init__(
        self, uri: str, experiment: str, ids: dict[str, str], remember: Callable[[dict[str, str]], None]
    ) -> None:
        self.name = shown(uri)
        self.experiment_id = ""
        self.reached: dict[str, _Reached] = {}
        self._uri, self._experiment, self._ids, self._remember = uri, experiment, ids, remember
        self._client: Any = None

    def deliver(self, item: Item) -> None:
        with _hushed():
            self._deliver(self._connected(), item)

    def _deliver(self, client: Any, item: Item) -> None:
        from mlflow.entities import Param, RunTag

        if item.do == "open":
            return self._open(client, item)
        run = self.reached[item.where]
        if item.do == "end":
            client.set_terminated(run.id, item.name, item.at_ms)
        elif item.do == "params":
            new = [Param(name, text) for name, text in item.texts.items() if name not in run.params]
            changed = [n for n, text in item.texts.items() if run.params.get(n, text) != text]
            tags = [RunTag(f"changed.{n}", item.texts[n]) for n in changed]
            client.log_batch(run.id, params=new, tags=tags)
        elif item.do == "file":
            path = PurePosixPath(item.name)
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, path.name).write_bytes(item.data)
                client.log_artifact(
                    run.id, f"{folder}/{path.name}", str(path.parent) if path.parent.name else None
                )
        else:
            _send_points(client, item, run)

    def answers(self) -> bool:
        try:
            with _hushed():
                self._connected().get_run(self.reached["run"].id)
        except self.troubles():
            return False
        return True

    def final(self, trouble: BaseException) -> bool:
        return getattr(trouble, "error_code", "") in _FINAL

    def told(self, trouble: BaseException) -> str:
        text = " ".join(masked(str(trouble), self._uri).split())
        short = text if len(text) <= 300 else f"{text[:120]} ... {text[-170:]}"  # the cause stands last
        return f"{type(trouble).__name__}: {short}"

    def troubles(self) -> tuple[type[BaseException], ...]:
        """What a store raises that is away, refuses or lacks its driver (requests' errors are OSErrors)."""
        from mlflow.exceptions import MlflowException

        kinds: list[type[BaseException]] = [MlflowException, OSError, ImportError]
        for module, name in (
            ("sqlalchemy.exc", "SQLAlchemyError"),
            ("alembic.util.exc", "CommandError"),
            ("botocore.exceptions", "BotoCoreError"),
            ("botocore.exceptions", "ClientError"),
            ("boto3.exceptions", "Boto3Error"),
        ):
            if module in sys.modules:  # only what MLflow has loaded can have been raised
                kinds.append(getattr(sys.modules[module], name))
        return tuple(kinds)

    def _connected(self) -> Any:
        """MLflow's client, once the store has answered and knows the experiment."""
        if self._client is None:
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self._uri)
            found = client.get_experiment_by_name(self._experiment)
            self.experiment_id = found.experiment_id if found else self._create_experiment(client)
            self._client = client
        return self._client

    def _create_experiment(self, client: Any) -> str:
        location = None
        if self._uri.startswith("sqlite"):  # files beside the database, whatever the working directory
            database = Path(self._uri.partition(":///")[2].partition("?")[0]).resolve()
            location = (database.parent / "mlartifacts" / legal_name(self._experiment)).as_uri()
        return str(client.create_experiment(self._experiment, artifact_location=location))

    def _open(self, client: Any, item: Item) -> None:
        """Find the run by id or tag, or create it, and note what it holds already."""
        from mlflow.entities import RunTag

        if "key" not in self._ids:
            self._know("key", uuid.uuid4().hex)
        tags = item.texts | {"mirl_dist.key": f"{self._ids['key']}/{item.where}"}
        if item.where != "run":
            tags["mlflow.parentRunId"] = self.reached["run"].id
        run = self._find(client, item.where, tags["mirl_dist.key"])
        if run is None:
            run = client.create_run(self.experiment_id, item.at_ms, tags, item.name)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            client.log_batch(run.info.run_id, tags=[RunTag(name, text) for name, text in tags.items()])
        steps = {metric.key: metric.step for metric in run.to_proto().data.metrics}
        last = max(steps.values(), default=-1)
        self.reached[item.where] = _Reached(run.info.run_id, dict(run.data.params), steps, last)
        if self._ids.get(item.where) != run.info.run_id:
            self._know(item.where, run.info.run_id)

    def _know(self, name: str, id_: str) -> None:
        self._remember({name: id_})
        self._ids[name] = id_

    def _find(self, client: Any, where: str, key: str) -> Any:
        """The run that was opened as `where` before, if the store still has it."""
        from mlflow.exceptions import MlflowException

        if id_ := self._ids.get(where):
            try:
                run = client.get_run(id_)
            except MlflowException as trouble:
                if trouble.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
            _log.warning(
                "%s has no run %s any more (remembered as %s); it gets a new one", self.name, id_, where
            )
        found = client.search_runs([self.experiment_id], f"tags.`mirl_dist.key` = '{key}'", max_results=1)
        return found[0] if found else None


def _send_points(client: Any, item: Item, run: _Reached) -> None:
    """Send the points that the run did not hold when opened (steps), or does not hold now (tickets)."""
    from mlflow.entities import Metric

    points = [point for point in item.points if point[3] > run.last]
    if item.do == "ticket":  # 'by_alive/x' goes in one batch with 'x', whose steps are rounds and grow
        held = {name for name, _, _, step in item.points if run.steps.get(name, -1) >= step}
        points = [point for point in item.points if point[0].removeprefix("by_alive/") not in held]
    if points:
        client.log_batch(run.id, metrics=[Metric(*point) for point in points])
    if item.do == "ticket":
        run.steps |= {name: step for name, _, _, step in points}


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """No warnings of MLflow and its parts, such as deprecations inside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _import_quietly(uri: str) -> None:
    """Import MLflow with short timeouts and without its chatter, after refusing what it cannot use."""
    scheme = uri.partition("://")[0]
    if scheme == "file" or scheme == uri != "databricks":
        raise Fault(
            f"found the tracking URI {masked(uri, uri)!r} in tracking.uri or MLFLOW_TRACKING_URI: MLflow 3 "
            "keeps no runs in plain folders. Use sqlite:///mlflow.db, http://host:port or postgresql://user@host/db."
        )
    if importlib.util.find_spec("mlflow") is None:
        raise Fault(
            "found no package mlflow where tracking is switched on. "
            "Run pip install mlflow, or set tracking.enabled=false."
        )
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with _hushed():
        import mlflow.tracking
    logging.getLogger("mlflow").setLevel(
        logging.CRITICAL
    )  # its troubles reach us as exceptions; we mask them
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not scheme.startswith("http"):
        import mlflow.store.db.utils

        mlflow.store.db.utils.MAX_RETRY_COUNT = 2  # else a database that is away costs 100 s a try
