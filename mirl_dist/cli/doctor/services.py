"""Checks the services that a run uses: its folder or bucket, shards, MLflow, and clocks.

Stores are tested with real objects, which are removed afterwards; nothing else is written.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import secrets
import socket
import sqlite3
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from mirl_dist.cli.doctor.machine import Finding, format_bytes, probe_folder, run_check, store_of
from mirl_dist.config.config import Config
from mirl_dist.data.sampler import GlobalSampler
from mirl_dist.data.shards import Shards
from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import reader, tracker
from mirl_dist.observability.mlflow.records import check_uri, database, default_uri, redact_uri
from mirl_dist.storage import Folder, NotFound, Store
from mirl_dist.storage.http import HttpStore
from mirl_dist.storage.s3 import S3Store
from mirl_dist.storage.s3_errors import AccessDenied
from mirl_dist.tickets.open import open_ticket
from mirl_dist.training import preflight
from mirl_dist.training.checkpointing.checkpoint import Checkpoints

_SECONDS = 5.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_WARN_SKEW, _MAX_SKEW = 60.0, 900.0


# -- the run's folder ---------------------------------------------------------------------------------------------


def check_permissions(config: Config) -> Iterator[Finding]:
    """Check every permission that a run needs in its folder by performing the operation."""
    store = store_of(config.store, config.run.folder)
    if isinstance(store, Folder):
        try:
            with probe_folder(Path(store.where())) as folder:
                yield from _probe_store(Folder(folder), store.where())
        except OSError as error:
            text = f"{store.where()}: {error.strerror}; correct the rights or make room, or choose another run.folder."
            yield Finding("FAULT", "run.folder", text)
    else:
        yield from _probe_store(store, store.where())


def _probe_store(store: Store, location: str) -> Iterator[Finding]:
    """Try all operations. First delete an absent object: if that is refused, a probe could not be removed later."""
    name, data = f"doctor-{secrets.token_hex(6)}/probe", secrets.token_bytes(16)
    allowed, faults, created = list[str](), list[Finding](), list[bool]()
    aborted = False  # an operation failed for another reason than a missing permission: others would fail likewise

    def attempt(what: str, work: Callable[[], object]) -> bool:
        """Try an operation and return whether it is allowed; NotFound counts as allowed."""
        nonlocal aborted
        if aborted:
            return False
        try:
            with contextlib.suppress(NotFound):
                work()
        except UserError as fault:
            aborted = not isinstance(fault, AccessDenied)
            faults.append(Finding("FAULT", "run.folder", f"{what}: {fault}"))
            return False
        allowed.append(what)
        return True

    attempt("list", lambda: store.list(name.partition("/")[0]))
    attempt("get", lambda: store.get(name))
    if attempt("delete", lambda: store.remove(name)):
        try:
            if attempt("put", lambda: store.put(name, data)):
                attempt("read back", lambda: _read_back(store, name, data))
            attempt("conditional put", lambda: created.extend(store.put_if_absent(f"{name}-2", data) for _ in "ab"))
        finally:
            aborted = False
            for probe in (name, f"{name}-2"):
                attempt("delete", partial(store.remove, probe))
    elif not aborted:
        text = f"put: not tried in {location}, for a probe would stay there."
        faults.append(Finding("warning", "run.folder", text))
    if created == [True, True]:
        text = f"conditional put: {location} lets two writers win, so two launches could write one run"
        faults.append(Finding("FAULT", "run.folder", f"{text}; use a server that knows If-None-Match."))
    yield from faults or [Finding("ok", "run.folder", f"{location}: {', '.join(dict.fromkeys(allowed))}")]


def _read_back(store: Store, name: str, data: bytes) -> None:
    if store.get(name) != data:
        raise UserError(f"{store.where(name)} gives back other bytes than were put there. Check the server.")


def check_run(config: Config, digest: str | None) -> Finding:
    """Check the run that the folder already contains. digest: of the shards' manifest."""
    checkpoints = Checkpoints(store_of(config.store, config.run.folder))

    def check() -> str:
        if digest is not None:
            preflight.check_run_folder(checkpoints, config, digest, "auto", open_ticket)
        if checkpoints.identity() is None:
            return "new"
        commits = checkpoints.commits()
        rounds = [commit.round_ for commit in commits if commit.step is None]
        ticket = checkpoints.ticket(max(rounds)) if rounds else None
        finished = ticket is not None and config.prune.ends_after(ticket.round, ticket.total_sparsity)
        newest = f"newest commit {commits[0].folder}" if commits else "no commit yet"
        return f"{'finished' if finished else 'goes on'}: {newest}"

    return run_check("run", check)


# -- shards -------------------------------------------------------------------------------------------------------


def check_shards(config: Config) -> tuple[Finding, tuple[Shards, GlobalSampler] | None]:
    """Check that the shards can be read and provide the mix; also return the shards and the sampler if so."""
    opened: list[tuple[Shards, GlobalSampler]] = []

    def check() -> str:
        shards = Shards(store_of(config.store, config.data.shards))
        shards.check_present(*(("train", "evaluate") if config.data.damage == "refuse" else ("evaluate",)))
        shards.check_patch_size(config.data.patch_pixels)
        sampler = preflight.sampler_of(config, shards)
        first = shards.train[0]
        shards.index(first)
        next(iter(shards.store.read(first.name)), b"")
        opened.append((shards, sampler))
        size = format_bytes(sum(shard.bytes for shard in shards.manifest.shards))
        return f"{shards.store.where()}: {len(shards.manifest.shards)} shards, {size}"

    finding = run_check("shards", check)
    return finding, opened[0] if opened else None


# -- MLflow -------------------------------------------------------------------------------------------------------


def check_mlflow(config: Config) -> Finding:
    """Check that MLflow would accept records. Unavailability is a FAULT only here; a run continues without MLflow."""
    if not config.tracking.enabled:
        return Finding("ok", "MLflow", "off (tracking.enabled)")
    address = default_uri(config.tracking.uri)
    kind, shown_address = address.partition(":")[0].lower(), redact_uri(address)
    if importlib.util.find_spec("mlflow") is None:
        text = "no package mlflow, and tracking is on; pip install mlflow, or set tracking.enabled=false."
        return Finding("FAULT", "MLflow", text)
    try:
        check_uri(address)
        if kind.startswith("sqlite"):
            _read_sqlite(database(address))
        elif kind in ("http", "https"):
            HttpStore(shown_address, seconds=_SECONDS).now("health")  # fails fast if the server is unavailable
            reader.check_server(address, config.tracking.experiment, _SECONDS)
        elif urlsplit(address).hostname:
            parts = urlsplit(address)  # a database: connect without reading data
            port = parts.port or _PORTS.get(parts.scheme.partition("+")[0], 0)
            socket.create_connection((str(parts.hostname), port), timeout=_SECONDS).close()
        else:
            tracker.check_reachable(address)
    except (UserError, OSError, sqlite3.Error) as error:
        advice = "" if isinstance(error, UserError) else "; correct tracking.uri or MLFLOW_TRACKING_URI, or the rights."
        return Finding("FAULT", "MLflow", f"{shown_address}: {error}{advice}")
    return Finding("ok", "MLflow", f"{shown_address}: {'writable' if kind.startswith('sqlite') else 'answers'}")


def _read_sqlite(file: Path) -> None:
    """Read an SQLite file; if it does not exist, check that its folder is writable. Raises OSError or sqlite3.Error."""
    if not file.exists():
        with probe_folder(file.parent):
            return
    if not os.access(file, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    uri = f"{file.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_SECONDS)) as connection:
        connection.execute("PRAGMA schema_version").fetchone()


# -- clocks -------------------------------------------------------------------------------------------------------


def check_clocks(config: Config) -> Iterator[Finding]:
    """Compare this machine's clock with those of the servers that report their time."""
    clocks: dict[str, Callable[[], datetime | None]] = {}
    for address in dict.fromkeys((config.run.folder, config.data.shards)):
        store = store_of(config.store, address)
        if isinstance(store, (S3Store, HttpStore)):
            clocks[store.where()] = store.now
    address = redact_uri(default_uri(config.tracking.uri))
    if config.tracking.enabled and address.startswith(("http://", "https://")):
        clocks[address] = lambda: HttpStore(address, seconds=_SECONDS).now("health")
    for server, now in clocks.items():
        try:
            server_time = now()
        except UserError:
            continue  # reported by the check of that service
        if server_time is None:
            continue
        ahead = (datetime.now(timezone.utc) - server_time).total_seconds()
        text = f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {server}"
        text += f"; S3 refuses from {_MAX_SKEW:.0f} s: set it (chrony, NTP)."
        if abs(ahead) <= _WARN_SKEW:
            yield Finding("ok", "clock", f"within {max(1.0, abs(ahead)):.0f} s of {server}")
        else:
            yield Finding("FAULT" if abs(ahead) >= _MAX_SKEW else "warning", "clock", text)
