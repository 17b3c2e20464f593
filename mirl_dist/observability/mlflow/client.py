"""Client for one MLflow address: maps run names to ids, and delivers records idempotently. Imports mlflow."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import records
from mirl_dist.observability.mlflow.first_start import experiment_id, one_at_a_time
from mirl_dist.observability.mlflow.records import Record, redact

_ENVIRONMENT = {  # defaults that MLflow reads at each call; values set by the user take precedence
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds; without retries a dead server blocks 30 s per call, not 246 s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
_NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"
REFUSALS = ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", _NOT_FOUND)  # error codes of records that no retry helps
_log = logging.getLogger("mirl_dist.tracking")


@dataclass
class RemoteRun:
    """Known contents of a run in the store, updated when it is opened and after each delivery."""

    id: str
    params: dict[str, str]
    steps: dict[str, int]  # latest step of each curve


class RunIds:
    """MLflow's ids of a run and its rounds ("run", "round/03"), kept over restarts, and the key to find lost runs.

    remembered: ids passed to `remember` by earlier processes. key: this run's key, unless an earlier process set one.
    remember: saves new ids before they are used; if it raises UserError, it is called again later.
    """

    def __init__(self, remembered: Mapping[str, str], key: str, remember: Callable[[dict[str, str]], None]) -> None:
        self.known, self._key, self._remember = dict(remembered), key, remember

    def key_of(self, run_key: str) -> str:
        """Return the value of the tag by which a run is found. Raise UserError while the key cannot be saved."""
        self.keep("key", self.known.get("key", self._key))
        return f"{self.known['key']}/{run_key}"

    def keep(self, name: str, id_: str) -> None:
        """Save an id if it is new. Raise UserError if that fails."""
        if self.known.get(name) != id_:
            self._remember({name: id_})
            self.known[name] = id_


class MlflowClientStore:
    """Delivers records to MLflow at one address, idempotently. Maps run names to MLflow's ids.

    ids: MLflow ids of runs opened before. session_id: prefix of the ids of this process's records.
    """

    def __init__(self, uri: str, experiment: str, run_name: str, ids: RunIds, session_id: str) -> None:
        self.remote_runs: dict[str, RemoteRun] = {}
        self.uri, self._experiment, self._run_name, self._session_id = uri, experiment, run_name, session_id
        self._ids = ids
        self._connection: tuple[Any, str] | None = None  # MLflow's client and the experiment's id
        self._opened: dict[str, Record] = {}  # what opens a lost run again: by run key, or id for params
        self._created = Counter[str]()  # creation requests per run

    @property
    def name(self) -> str:
        return records.redact_uri(self.uri)

    @property
    def experiment_id(self) -> str:
        """'' until the store has answered."""
        return self._connection[1] if self._connection else ""

    def deliver(self, record: Record) -> None:
        """Deliver a record; raise one of `transient_errors`. It may belong to a run that an earlier process opened.

        Runs missing on the server, for example after it was reset, are created again.
        """
        if self._connection is None:
            import_quietly(self.uri)
        from mlflow.exceptions import MlflowException

        if record.kind in ("open", "params"):
            self._opened[record.run_key if record.kind == "open" else record.id] = record
        try:
            self._deliver(record)
        except MlflowException as trouble:
            if trouble.error_code != _NOT_FOUND:
                raise
            self._connection, self.remote_runs = None, {}
            self._deliver(record)

    def _deliver(self, record: Record) -> None:
        from mlflow.entities import Param, RunTag

        client = self._connect()
        if record.kind == "open":
            return self._open(client, record)
        run = self._open_or_find(client, record)
        if record.kind == "end":
            if not self._is_out_of_date(record, client.get_run(run.id)):
                client.set_terminated(run.id, record.name, record.at_ms)
            self._delete_duplicates(client, record.run_key)
        elif record.kind == "params":
            new = [Param(name, text) for name, text in record.texts.items() if name not in run.params]
            changed = [n for n, text in record.texts.items() if run.params.get(n, text) != text]
            tags = [RunTag(f"changed.{n}", record.texts[n]) for n in changed]
            client.log_batch(run.id, params=new, tags=tags)
            run.params |= {param.key: param.value for param in new}
        elif record.kind == "file":
            path = PurePosixPath(record.name)
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, path.name).write_bytes(record.data)
                client.log_artifact(run.id, f"{folder}/{path.name}", str(path.parent) if path.parent.name else None)
            if record.name.startswith(records.IMAGES):
                client.set_tag(run.id, "mlflow.loggedImages", "true")  # otherwise MLflow's image grid stays empty
        else:
            _send_points(client, record, run)

    def _connect(self) -> Any:
        """Return MLflow's client. The first call finds or creates the experiment."""
        from mlflow import MlflowClient

        if self._connection is None:
            with one_at_a_time(self.uri):
                client = MlflowClient(tracking_uri=self.uri)
                self._connection = client, experiment_id(client, self.uri, self._experiment)
        return self._connection[0]

    def answers(self) -> bool:
        """Whether the tracking server responds, regardless of its artifact store."""
        try:
            self._connect().get_run(self.remote_runs["run"].id)
        except transient_errors():
            return False
        return True

    def _open_or_find(self, client: Any, record: Record) -> RemoteRun:
        """Return the record's run: found if an earlier process opened it, recreated with its params if it was lost."""
        if record.run_key not in self.remote_runs:
            round_ = record.run_key.rpartition("/")[2]
            name = self._run_name if record.run_key == "run" else records.round_name(self._run_name, int(round_))
            opening = Record("open", record.run_key, name, at_ms=record.at_ms)
            self._open(client, self._opened.get(record.run_key, opening))
            for opened in list(self._opened.values()):
                if (opened.kind, opened.run_key) == ("params", record.run_key):
                    self._deliver(opened)
        return self.remote_runs[record.run_key]

    def _open(self, client: Any, record: Record) -> None:
        """Find the run by id or tag, or create it. Remember its params and the latest step of each curve."""
        from mlflow.entities import RunTag

        tags = record.texts | {"mirl_dist.key": self._ids.key_of(record.run_key)}
        if record.run_key != "run":
            parent = self._open_or_find(client, Record("open", "run", at_ms=record.at_ms)).id
            client.get_run(parent)  # raises if the parent is lost, so that no orphan is created
            tags["mlflow.parentRunId"] = parent
        run = self._find(client, record.run_key, tags["mirl_dist.key"])
        if run is None:
            self._created[record.run_key] += 1
            run = client.create_run(self.experiment_id, record.at_ms, tags, record.name)
        else:
            if run.info.status != "RUNNING" and not self._is_out_of_date(record, run):
                client.update_run(run.info.run_id, status="RUNNING")
            new = [RunTag(name, text) for name, text in tags.items() if run.data.tags.get(name) != text]
            if new:
                client.log_batch(run.info.run_id, tags=new)
        steps = {metric.key: metric.step for metric in run.to_proto().data.metrics}
        self.remote_runs[record.run_key] = RemoteRun(run.info.run_id, dict(run.data.params), steps)
        self._ids.keep(record.run_key, run.info.run_id)

    def _is_out_of_date(self, record: Record, run: Any) -> bool:
        """Whether another process ended the run after this record was made. False for this process's own records."""
        return not record.id.startswith(self._session_id) and (run.info.end_time or 0) > record.at_ms

    def _find(self, client: Any, run_key: str, key: str) -> Any:
        """Return the run opened as `run_key` before, by id or else by tag; None if the store has none."""
        from mlflow.exceptions import MlflowException

        if id_ := self._ids.known.get(run_key):
            try:
                run = client.get_run(id_)
            except MlflowException as trouble:
                if trouble.error_code != _NOT_FOUND:
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
            _log.warning("%s has no run %s any more (remembered as %s); it gets a new one", self.name, id_, run_key)
            del self._ids.known[run_key]
        return next(iter(self._runs_with_key(client, key)), None)

    def _runs_with_key(self, client: Any, key: str) -> list[Any]:
        return list(client.search_runs([self.experiment_id], f"tags.`mirl_dist.key` = '{key}'", max_results=10))

    def _delete_duplicates(self, client: Any, run_key: str) -> None:
        """Delete empty duplicates of a run, left when a slow server executed a creation request that was retried."""
        if self._created[run_key] > 1:
            for run in self._runs_with_key(client, self._ids.key_of(run_key)):
                if run.info.run_id != self.remote_runs[run_key].id and not run.data.metrics:
                    client.delete_run(run.info.run_id)


def _send_points(client: Any, record: Record, run: RemoteRun) -> None:
    """Send the points that the run does not have yet.

    Steps of a curve only grow, so points beyond its latest step are new. Exception: a ticket's score 'x' has step =
    alive weights, which shrinks; it is sent in one batch with 'round/x' (step = round) and is new if that one is.
    """
    from mlflow.entities import Metric

    steps, points = dict(run.steps), list[tuple[str, float, int, int]]()
    is_ticket = record.kind == "ticket"
    rounds = {name: step for name, *_, step in record.points if is_ticket and name.startswith(records.BY_ROUND)}
    for name, value, at_ms, step in record.points:
        twin = records.BY_ROUND + name
        if rounds[twin] > run.steps.get(twin, -1) if twin in rounds else step > steps.get(name, -1):
            points.append((name, value, at_ms, step))
            steps[name] = step
    if points:
        client.log_batch(run.id, metrics=[Metric(*point) for point in points])
    run.steps = steps


def transient_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions raised for a store that is unavailable, rejects requests, lacks its driver or sends
    malformed responses; also UserError."""
    # requests' errors are OSErrors. On malformed responses MLflow's client raises whatever its parsing raised.
    nonsense = (ValueError, LookupError, TypeError, AttributeError, RuntimeError)
    kinds: list[type[BaseException]] = [UserError, OSError, ImportError, *nonsense]
    for module, name in (
        ("mlflow.exceptions", "MlflowException"),
        ("sqlalchemy.exc", "SQLAlchemyError"),
        ("alembic.util.exc", "CommandError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("boto3.exceptions", "Boto3Error"),
    ):
        if module in sys.modules:  # a module that is not loaded cannot have raised anything
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)


def check_usable(uri: str) -> None:
    """Raise UserError for a URI that MLflow cannot use, or if MLflow is not installed. Does not import it."""
    scheme = uri.partition("://")[0]
    if scheme == "file" or scheme == uri != "databricks":
        raise UserError(
            f"found the tracking URI {redact(uri, uri)!r} in tracking.uri or MLFLOW_TRACKING_URI: MLflow 3 "
            "keeps no runs in plain folders. Use sqlite:///mlflow.db, http://host:port or postgresql://user@host/db."
        )
    if importlib.util.find_spec("mlflow") is None:
        raise UserError(
            "found no package mlflow where tracking is switched on. "
            "Run pip install mlflow, or set tracking.enabled=false."
        )


def import_quietly(uri: str) -> None:
    """Import MLflow, in seconds, with short timeouts and without its log output. Raise UserError as `check_usable`."""
    check_usable(uri)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Permanently, not around each call: warning filters are global, so the sending thread would affect other threads.
    warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy|pydantic)(\.|$)")
    import mlflow.tracking

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # errors also arrive as exceptions, with secrets masked here
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not uri.startswith("http"):
        import mlflow.store.db.utils

        mlflow.store.db.utils.MAX_RETRY_COUNT = 2  # otherwise an unavailable database blocks 100 s per call
