"""MLflow at one address: resolves our names to its ids, and bears every item twice. Alone imports mlflow."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mirl_dist.faults import Fault
from mirl_dist.outbox import Item, legal_name, masked, shown

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
_log = logging.getLogger("mirl_dist.tracking")


@dataclass
class Reached:
    """What the store held of a run when it was opened."""

    id: str
    params: dict[str, str]
    steps: dict[str, int]  # latest step of each curve
    last: int  # latest step of all, -1 for none


class Store:
    """MLflow at one address: resolves our names to its ids, and bears the same item twice."""

    def __init__(
        self, uri: str, experiment: str, ids: dict[str, str], remember: Callable[[dict[str, str]], None]
    ) -> None:
        self.name = shown(uri)
        self.experiment_id = ""
        self.reached: dict[str, Reached] = {}
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
                client.log_artifact(run.id, f"{folder}/{path.name}", str(path.parent) if path.parent.name else None)
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
        # Without this tag MLflow opens the experiment on its pages for language models, away from the curves.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self._experiment, artifact_location=location, tags=tags))

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
        self.reached[item.where] = Reached(run.info.run_id, dict(run.data.params), steps, last)
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
            _log.warning("%s has no run %s any more (remembered as %s); it gets a new one", self.name, id_, where)
        found = client.search_runs([self.experiment_id], f"tags.`mirl_dist.key` = '{key}'", max_results=1)
        return found[0] if found else None


def _send_points(client: Any, item: Item, run: Reached) -> None:
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


def import_quietly(uri: str) -> None:
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
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # its troubles reach us as exceptions; we mask them
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not scheme.startswith("http"):
        import mlflow.store.db.utils

        mlflow.store.db.utils.MAX_RETRY_COUNT = 2  # else a database that is away costs 100 s a try
