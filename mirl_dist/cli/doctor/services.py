"""What a run needs of the places it names: its folder or bucket, shards, MLflow, clocks.

Stores are tried with real objects, which are gone afterwards; nothing else is written.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import secrets
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from mirl_dist.cli.doctor.disks import beside, store_of
from mirl_dist.cli.doctor.machine import Finding, sized
from mirl_dist.config.config import Config
from mirl_dist.data.sampler import GlobalSampler
from mirl_dist.data.shards import Shards
from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import reader, tracker
from mirl_dist.observability.mlflow.client import database
from mirl_dist.observability.mlflow.records import check_uri, default_uri, redact_uri
from mirl_dist.storage import Folder, NotFound, Store
from mirl_dist.storage.http import HttpStore
from mirl_dist.storage.s3 import S3Store
from mirl_dist.storage.s3_errors import AccessDenied
from mirl_dist.tickets.open import open_ticket
from mirl_dist.training import preflight
from mirl_dist.training.checkpoint import Checkpoints

_SECONDS = 5.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_WARN_SKEW, _MOST_SKEW = 60.0, 900.0


# -- the run's place ----------------------------------------------------------------------------------------------


def run_place(config: Config) -> Iterator[Finding]:
    """Every right that a run needs in its folder, each proved by use."""
    store = store_of(config, config.run.folder)
    if isinstance(store, Folder):
        try:
            with beside(Path(store.where())) as here:
                yield from _rights(Folder(here), store.where())
        except OSError as error:
            text = f"{store.where()}: {error.strerror}; correct the rights or make room, or choose another run.folder."
            yield Finding("FAULT", "run.folder", text)
    else:
        yield from _rights(store, store.where())


class PermissionProbe:
    """Tries one thing after another in a store. over: what failed is no missing right, so more tries are no use."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.found: list[Finding] = []
        self.over = False

    def try_(self, what: str, work: Callable[[], object]) -> bool:
        """Whether it worked; what is not there was allowed to be asked for."""
        if self.over:
            return False
        try:
            work()
        except NotFound:
            pass
        except UserError as fault:
            self.over = not isinstance(fault, AccessDenied)
            self.found.append(Finding("FAULT", "run.folder", f"{what}: {fault}"))
            return False
        self.said.append(what)
        return True


def _rights(store: Store, where: str) -> Iterator[Finding]:
    """Removing is tried first, on nothing: where it is refused, a probe would stay for ever."""
    name, data = f"doctor-{secrets.token_hex(6)}/probe", secrets.token_bytes(16)
    trial, won = PermissionProbe(), list[bool]()
    trial.try_("list", lambda: store.list(name.partition("/")[0]))
    trial.try_("get", lambda: store.get(name))
    if trial.try_("delete", lambda: store.remove(name)):
        try:
            if trial.try_("put", lambda: store.put(name, data)):
                trial.try_("read back", lambda: _read_back(store, name, data))
            trial.try_("conditional put", lambda: won.extend(store.put_if_absent(f"{name}-2", data) for _ in "ab"))
        finally:
            trial.over = False
            for probe in (name, f"{name}-2"):
                trial.try_("delete", partial(store.remove, probe))
    elif not trial.over:
        text = f"put: not tried in {where}, for a probe would stay there."
        trial.found.append(Finding("warning", "run.folder", text))
    if won == [True, True]:
        text = f"conditional put: {where} lets two writers win, so two launches could write one run; use a server that"
        trial.found.append(Finding("FAULT", "run.folder", f"{text} knows If-None-Match."))
    yield from trial.found
    if not trial.found:
        yield Finding("ok", "run.folder", f"{where}: {', '.join(dict.fromkeys(trial.said))}")


def _read_back(store: Store, name: str, data: bytes) -> None:
    if store.get(name) != data:
        raise UserError(f"{store.where(name)} gives back other bytes than were put there. Check the server.")


def check_run(config: Config, digest: str | None) -> Iterator[Finding]:
    """What lies in the run's folder already. digest: of the shards' manifest."""
    checkpoints = Checkpoints(store_of(config, config.run.folder))
    try:
        if digest is not None:
            preflight.check_run_folder(checkpoints, config, digest, "auto", open_ticket)
        if checkpoints.identity() is not None:
            commits = checkpoints.commits()
            newest = f"newest commit {commits[0].folder}" if commits else "no commit yet"
            yield Finding("ok", "run", f"{'finished' if _is_over(config, checkpoints) else 'goes on'}: {newest}")
        else:
            yield Finding("ok", "run", "new")
    except UserError as fault:
        yield Finding("FAULT", "run", str(fault))


def _is_over(config: Config, checkpoints: Checkpoints) -> bool:
    """Whether the last round that the config asks for has its ticket."""
    ended = [commit.round_ for commit in checkpoints.commits() if commit.step is None]
    if not ended:
        return False
    target, ticket = config.prune.target_sparsity, checkpoints.ticket(max(ended))
    return ticket.round >= config.prune.rounds or (target is not None and ticket.total_sparsity >= target)


# -- shards -------------------------------------------------------------------------------------------------------


def check_shards(config: Config, found: list[tuple[Shards, GlobalSampler]]) -> Iterator[Finding]:
    """Whether the shards can be read and feed the mix; `found` gets them when they can."""
    try:
        there = Shards(store_of(config, config.data.shards))
        roles = ("train", "evaluate") if config.data.damage == "refuse" else ("evaluate",)
        there.check_present(*roles)
        there.check_patch_size(config.data.patch_pixels)
        order = preflight.sampler_of(config, there)
        first = there.train[0]
        there.index(first)
        next(iter(there.store.read(first.name)), b"")
    except UserError as fault:
        yield Finding("FAULT", "shards", str(fault))
        return
    found.append((there, order))
    size = sized(sum(shard.bytes for shard in there.manifest.shards))
    count = len(there.manifest.shards)
    yield Finding("ok", "shards", f"{there.store.where()}: {count} shards, {size}")


# -- MLflow -------------------------------------------------------------------------------------------------------


def check_mlflow(config: Config) -> Iterator[Finding]:
    """Whether what the run tells MLflow would arrive; a run goes on without it, so what is away is a FAULT now only."""
    if not config.tracking.enabled:
        yield Finding("ok", "MLflow", "off (tracking.enabled)")
        return
    address = default_uri(config.tracking.uri)
    kind, clean = address.partition(":")[0].lower(), redact_uri(address)
    if importlib.util.find_spec("mlflow") is None:
        text = "no package mlflow, and tracking is on; pip install mlflow, or set tracking.enabled=false."
        yield Finding("FAULT", "MLflow", text)
        return
    try:
        check_uri(address)
        if kind.startswith("sqlite"):
            _sqlite(database(address))
        elif kind in ("http", "https"):
            HttpStore(clean, seconds=_SECONDS).now("health")  # quick, where nobody answers
            reader.check_server(address, config.tracking.experiment, _SECONDS)
        elif urlsplit(address).hostname:
            _connects(address)
        else:
            tracker.check_reachable(address)
    except (UserError, OSError, sqlite3.Error) as error:
        advice = "" if isinstance(error, UserError) else "; correct tracking.uri or MLFLOW_TRACKING_URI, or the rights."
        yield Finding("FAULT", "MLflow", f"{clean}: {error}{advice}")
        return
    yield Finding("ok", "MLflow", f"{clean}: {'writable' if kind.startswith('sqlite') else 'answers'}")


def _sqlite(file: Path) -> None:
    if not file.exists():
        with beside(file.parent):
            return
    if not os.access(file, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=_SECONDS)) as found:
        found.execute("PRAGMA schema_version").fetchone()


def _connects(address: str) -> None:
    """A database's server; what it holds is not asked."""
    parts = urlsplit(address)
    port = parts.port or _PORTS.get(parts.scheme.partition("+")[0], 0)
    socket.create_connection((str(parts.hostname), port), timeout=_SECONDS).close()


# -- clocks -------------------------------------------------------------------------------------------------------


def check_clocks(config: Config) -> Iterator[Finding]:
    """This machine's clock against those of the servers that tell theirs."""
    asked: dict[str, Callable[[], datetime | None]] = {}
    for address in dict.fromkeys((config.run.folder, config.data.shards)):
        store = store_of(config, address)
        if isinstance(store, (S3Store, HttpStore)):
            asked[store.where()] = store.now
    address = redact_uri(default_uri(config.tracking.uri))
    if config.tracking.enabled and address.startswith(("http://", "https://")):
        asked[address] = lambda: HttpStore(address, seconds=_SECONDS).now("health")
    for where, now in asked.items():
        try:
            theirs = now()
        except UserError:
            continue  # told where that place is tried
        if theirs is not None:
            yield _skew(where, (datetime.now(timezone.utc) - theirs).total_seconds())


def _skew(where: str, seconds: float) -> Finding:
    away = f"this clock is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} that of {where}"
    if abs(seconds) >= _MOST_SKEW:
        return Finding("FAULT", "clock", f"{away}; S3 refuses from {_MOST_SKEW:.0f} s: set it (chrony, NTP).")
    if abs(seconds) > _WARN_SKEW:
        return Finding("warning", "clock", f"{away}; S3 refuses from {_MOST_SKEW:.0f} s: set it (chrony, NTP).")
    return Finding("ok", "clock", f"within {max(1.0, abs(seconds)):.0f} s of {where}")
