"""Reads runs with their tickets back from MLflow for comparisons, and logs comparison reports there.

An unavailable store is reported immediately or after MLFLOW_HTTP_REQUEST_TIMEOUT (default 30 s). Files read here are
checked for size only; `ticket.parse` and the readers of masks and pictures validate their contents.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import records
from mirl_dist.observability.mlflow.client import import_quietly, transient_errors
from mirl_dist.observability.mlflow.first_start import experiment_id, one_at_a_time
from mirl_dist.observability.mlflow.records import redact, redact_uri

EXPERIMENT = "experiment:"
"""Prefix of a reference to all runs of an experiment: 'experiment:NAME'."""
RUN, TICKET, MASK, PICTURES = "run.json", "ticket.json", "mask.safetensors", "pictures.png"
_MIB = 2**20
_LARGEST = {RUN: _MIB, TICKET: 16 * _MIB, MASK: 256 * _MIB, PICTURES: 64 * _MIB}  # bytes; a mask has 1 bit per weight
_KEY, _PARENT = "mirl_dist.key", "mlflow.parentRunId"


class RemoteTicket(NamedTuple):
    """Files of one round, as written: ticket.json, mask.safetensors and pictures.png; None if missing."""

    round: int
    ticket: bytes
    mask: bytes | None
    pictures: bytes | None


class RemoteTickets(NamedTuple):
    """A run with its tickets, sorted by round. config: contents of its run.json, or None if missing."""

    run_name: str
    run_id: str
    config: dict[str, Any] | None
    tickets: list[RemoteTicket]


def read(reference: str, uri: str | None) -> list[RemoteTickets]:
    """Return the run with the given id, or for 'experiment:NAME' all its runs with tickets, oldest first.

    uri: tracking URI; None as for `MlflowTracker`. Raise UserError for an id that is unknown, belongs to a round or was
    not tracked by mirl-dist, for runs without tickets, for missing or too large files, and (resumable) for an
    unavailable store.
    """
    address = records.default_uri(uri)
    store = redact_uri(address)
    with _client(address) as client:
        if not reference.startswith(EXPERIMENT):
            runs = [_find_run(client, reference, store)]
            missing = f"found no ticket yet in {_describe_run(runs[0])} at {store}. Wait for its first round."
        else:
            name = reference.removeprefix(EXPERIMENT)
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                known = sorted(e.name for e in client.search_experiments(max_results=20))
                raise UserError(f"found no experiment {name!r} at {store}. There are: {', '.join(known)}.")
            runs = _search_runs(client, experiment.experiment_id, f"tags.`{_KEY}` LIKE '%/run'")
            missing = f"found no run with tickets in the experiment {name!r} at {store}. Name another one."
        with_tickets = [remote for run in runs if (remote := _read_tickets(client, run, store)).tickets]
        if not with_tickets:
            raise UserError(missing)
        return with_tickets


def check_server(address: str, experiment: str, seconds: float) -> None:
    """Query a server once for an experiment, creating nothing. Raise UserError if it is unavailable or refuses.

    seconds: timeout if MLFLOW_HTTP_REQUEST_TIMEOUT is unset.
    """
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ.setdefault(name, f"{seconds:.0f}")
    try:
        with _client(address) as client:
            client.get_experiment_by_name(experiment)
    finally:
        if before is None:
            del os.environ[name]


def log_report(
    uri: str | None,
    experiment: str,
    name: str,
    files: Mapping[str, bytes],
    metrics: Mapping[str, float] = {},
    tags: Mapping[str, str] = {},
) -> str:
    """Log files as a separate run of an experiment, which is created if missing. Return the run's address.

    name: run name. files: 'name' or 'folder/name' -> content; MLflow displays HTML as a page. Raise UserError
    (resumable) for an unavailable store. After a failure the incomplete run is deleted if possible.
    """
    assert files and not any(PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts for path in files)
    address = records.default_uri(uri)
    with _client(address, makes=True) as client:
        from mlflow.entities import Metric

        place = experiment_id(client, address, experiment)
        texts = {records.legal_name(n): redact(text, address)[: records.LONGEST_TAG] for n, text in tags.items()}
        run = client.create_run(place, tags=texts | {"mirl_dist.report": name}, run_name=name).info
        try:
            with tempfile.TemporaryDirectory() as folder:
                for path, data in files.items():
                    Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                    Path(folder, path).write_bytes(data)
                client.log_artifacts(run.run_id, folder)
            points = [Metric(records.legal_name(n), value, run.start_time, 0) for n, value in metrics.items()]
            client.log_batch(run.run_id, metrics=points)
            client.set_terminated(run.run_id)
        except BaseException:
            with contextlib.suppress(*transient_errors()):
                client.delete_run(run.run_id)
            raise
    return records.page_address(address, place, run.run_id)


@contextlib.contextmanager
def _client(address: str, *, makes: bool = False) -> Iterator[Any]:
    """Yield a client; store errors inside become a resumable UserError. makes: allow creating a new SQLite store."""
    records.check_uri(address)
    import_quietly(address)
    if address.startswith("sqlite") and not makes and not records.database(address).exists():
        raise UserError(
            f"found no file {records.database(address)} for the tracking URI {redact_uri(address)}. "
            "Give the address that the runs were tracked at."
        )
    from mlflow import MlflowClient

    try:
        with one_at_a_time(address):
            client = MlflowClient(tracking_uri=address)
            if address.startswith("sqlite"):
                client.search_experiments(max_results=1)  # creates the tables of a new database
        yield client
    except UserError:
        raise
    except transient_errors() as trouble:
        raise UserError(
            f"found {redact_uri(address)} unavailable or refusing requests ({records.describe(trouble, address)}). "
            "Check the server, and the address in tracking.uri or MLFLOW_TRACKING_URI.",
            resumable=True,
        ) from None


def _find_run(client: Any, id_: str, store: str) -> Any:
    """Return the parent run with this id. Raise UserError if it is unknown, deleted, a round, or not from mirl-dist."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(id_)
    except MlflowException as trouble:
        if trouble.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(
            f"found no run {id_!r} at {store}. Give a run's id as its page shows it, or {EXPERIMENT}NAME."
        ) from None
    if run.info.lifecycle_stage != "active":
        raise UserError(f"found {_describe_run(run)} deleted at {store}. Restore it there, or name another one.")
    if parent := run.data.tags.get(_PARENT):
        raise UserError(f"found {_describe_run(run)} at {store}, which is one round of the run {parent}. Give that id.")
    if not run.data.tags.get(_KEY, "").endswith("/run"):
        raise UserError(f"found {_describe_run(run)} at {store}, which mirl-dist has not tracked. Name another one.")
    return run


def _read_tickets(client: Any, run: Any, store: str) -> RemoteTickets:
    nested = _search_runs(client, run.info.experiment_id, f"tags.`{_PARENT}` = '{run.info.run_id}'")
    with ThreadPoolExecutor(4) as pool:  # one file costs MLflow several requests
        kept = list(filter(None, pool.map(lambda each: _read_ticket(client, each, store), nested)))
    config = None
    if RUN in (files := _files(client, run, "", (RUN,), store)):
        try:
            config = json.loads(files[RUN])
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise UserError(
                f"found {RUN} of {_describe_run(run)} at {store} damaged. Compare the run's folder in its place."
            )
    return RemoteTickets(run.info.run_name, run.info.run_id, config, sorted(kept))


def _read_ticket(client: Any, run: Any, store: str) -> RemoteTicket | None:
    """Return the ticket files of a nested run; None if its round has no ticket yet."""
    number = run.data.tags.get(_KEY, "").rpartition("/round/")[2]
    if not (number.isdecimal() and number.isascii()):
        return None
    folder = f"tickets/{number}/"
    files = _files(client, run, folder, (TICKET, MASK, PICTURES), store)
    if TICKET in files:
        return RemoteTicket(int(number), files[TICKET], files.get(MASK), files.get(PICTURES))
    if "alive_weights" not in run.data.metrics:
        return None
    raise UserError(
        f"found no {folder}{TICKET} with {_describe_run(run)} at {store}, which has a ticket's scores. "
        "Send what still waits with `mirl-dist track resend RUN`, or compare the run's folder in its place."
    )


def _files(client: Any, run: Any, folder: str, names: Sequence[str], store: str) -> dict[str, bytes]:
    """Return the contents of those named files that exist in a folder. Raise UserError for a file that is too large."""
    id_, contents = run.info.run_id, dict[str, bytes]()
    sizes = {file.path: file.file_size for file in client.list_artifacts(id_, folder.rstrip("/")) if not file.is_dir}
    with tempfile.TemporaryDirectory() as here:
        for name in names:
            if (path := folder + name) not in sizes:
                continue
            most, size = _LARGEST[name], sizes[path] or 0  # 0 if unknown to the store: then checked after the download
            if size <= most:
                file = Path(client.download_artifacts(id_, path, here))
                size = file.stat().st_size
            if size > most:
                raise UserError(
                    f"found {path} of {_describe_run(run)} at {store} with {size / _MIB:.1f} MiB, where ours have "
                    f"{most / _MIB:.0f} at most. Compare the run's folder in its place."
                )
            contents[name] = file.read_bytes()
    return contents


def _search_runs(client: Any, experiment: str, condition: str) -> list[Any]:
    """Return all active runs that match a filter expression, oldest first."""
    runs, token = list[Any](), None
    while True:
        page = client.search_runs(
            [experiment], condition, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _describe_run(run: Any) -> str:
    return f"the run {run.info.run_name!r} ({run.info.run_id})"
