"""Tracking of a run in MLflow: one parent run, one nested run per round; no failure of MLflow stops training.

Every record goes into a journal on disk first. A thread sends the records in order, and the caller never waits for the
store. Sending a record twice changes nothing: points keep the time at which they were made (the store knows them by it)
and curves only grow, runs are found again by id or tag, files are overwritten. So neither a restart nor a lost answer
leaves a point twice. A process first sends the records that earlier ones could not send.
"""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import records
from mirl_dist.observability.mlflow.client import MlflowClientStore, import_quietly
from mirl_dist.observability.mlflow.journal import Journal, Pending, pending_records
from mirl_dist.observability.mlflow.outbox import Outbox
from mirl_dist.observability.mlflow.records import (
    Record,
    default_uri,
    flatten,
    image_files,
    is_score,
    legal_name,
    redact,
    redact_uri,
)
from mirl_dist.observability.mlflow.remote_runs import RunIds
from mirl_dist.observability.mlflow.sender import Sender

__all__ = ["MlflowTracker", "NoTracker", "Tracker", "Pending", "pending_records"]

FAREWELL_SECONDS = 10.0
"""How long the end of a run waits for MLflow while nothing gets through."""

_log = logging.getLogger("mirl_dist.tracking")


class Tracker(Protocol):
    """What training reports of its run: to `MlflowTracker` on rank 0, to `NoTracker` on the others."""

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None: ...
    def begin_round(self, round_: int, tags: Mapping[str, str], params: Mapping[str, object] = {}) -> None: ...
    def log_step(self, step: int, values: Mapping[str, float]) -> None: ...
    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None: ...
    def log_file(self, name: str, data: bytes, scope: str) -> None: ...
    def log_image(self, key: str, png: bytes, step: int) -> None: ...
    def flush(self) -> None: ...
    def pending(self) -> bytes: ...
    def end_round(self, status: str = "FINISHED") -> None: ...
    def end_run(self, status: str = "FINISHED", seconds: float = math.inf) -> None: ...
    def address(self) -> str: ...


class NoTracker:
    """Does nothing: for ranks other than 0, and for tracking switched off."""

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None: ...
    def begin_round(self, round_: int, tags: Mapping[str, str], params: Mapping[str, object] = {}) -> None: ...
    def log_step(self, step: int, values: Mapping[str, float]) -> None: ...
    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None: ...
    def log_file(self, name: str, data: bytes, scope: str) -> None: ...
    def log_image(self, key: str, png: bytes, step: int) -> None: ...
    def flush(self) -> None: ...
    def end_round(self, status: str = "FINISHED") -> None: ...
    def end_run(self, status: str = "FINISHED", seconds: float = math.inf) -> None: ...

    def pending(self) -> bytes:
        return b""

    def address(self) -> str:
        return ""


class MlflowTracker:
    """A run as MLflow shows it, reopened by id after a restart and without any point twice.

    uri: tracking URI; None means MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory.
    remembered, remember: ids that the caller keeps over restarts ("run", "round/03", and "key", by which a
    run is found whose id got lost); `remember` gets new ones as soon as they exist, in the thread that sends, and is
    called again later when it raises a UserError (as storage does).
    journal: a folder of this machine for this run alone. inherited: what `pending` gave to the commit that the run goes
    on from. A store that is unavailable or refuses requests raises nothing and is not waited for: one warning per
    outage, logger "mirl_dist.tracking"; the same for a journal that can't be written, whose part then waits in memory.
    Raises UserError for a URI that MLflow refuses, and when MLflow is not installed.
    """

    def __init__(
        self,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        remembered: Mapping[str, str],
        remember: Callable[[dict[str, str]], None],
        journal: Path,
        inherited: bytes = b"",
    ) -> None:
        self._uri = default_uri(uri)
        import_quietly(self._uri)
        self._run_name = run_name
        opened, key = _open_journal(journal, redact_uri(self._uri))
        self._journal = journal if opened is not None else None
        session_id = uuid.uuid4().hex
        self._store = MlflowClientStore(self._uri, experiment, run_name, RunIds(remembered, key, remember), session_id)
        self._outbox = Outbox(self._store.name, session_id, opened, inherited)
        self._sender = Sender(self._store, self._outbox)
        self._round, self._begun = "", set[str]()
        self._sender.start()

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the parent run; nested params become 'a.b', long values are cut, passwords in URLs masked.

        A param that differs after a restart stays; its new value becomes the tag 'changed.<name>'.
        """
        self._begin("run", self._run_name, tags, params)

    def begin_round(self, round_: int, tags: Mapping[str, str], params: Mapping[str, object] = {}) -> None:
        """Open the nested run 'RUN, round 03'; params as in `begin_run`.

        Steps that it holds already, or that wait for it, are not sent again.
        """
        self._round = f"round/{round_:02d}"
        self._begin(self._round, records.round_name(self._run_name, round_), tags, params)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Write down the values of one optimiser step; sent when 50 steps or 5 seconds have gathered.

        Values that are not finite are left out.
        """
        assert self._round, "begin_round comes first"
        self._outbox.put_points("points", self._round, [(n, value, step) for n, value in values.items()])
        self._sender.count_step()

    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None:
        """Write down what a begun round came to: twice is once. Names must differ from those of log_step.

        All go to the nested run at step = round, and those not under 'weights/density/' to the parent too, as
        'round/<name>'. The parent also has its scores ('psnr/...', 'ssim.<protocol>/...') under their plain names, at
        step = values['alive_weights'].
        """
        run_key = f"round/{round_:02d}"
        assert run_key in self._begun, "begin_round comes first"
        self._outbox.put_points("ticket", run_key, [(name, value, round_) for name, value in values.items()])
        alive, points = values.get("alive_weights", math.nan), list[tuple[str, float, int]]()
        for name in sorted(values, key=lambda name: (not is_score(name), name.count("/"))):  # as pages list them
            if not name.startswith("weights/density/"):
                points.append((records.BY_ROUND + name, values[name], round_))
            if is_score(name) and math.isfinite(alive):  # next to its twin, from which no limit may part it
                points.append((name, values[name], int(alive)))
        self._outbox.put_points("ticket", "run", points)
        self.flush()

    def log_file(self, name: str, data: bytes, scope: str) -> None:
        """Keep a file ('folder/name', a relative path) with the current 'round' or with the whole 'run'."""
        assert scope in ("round", "run") and records.is_relative_file(name)
        name = str(PurePosixPath(name))
        self._outbox.put(Record("file", self._round if scope == "round" else "run", name, data=data))
        self.flush()

    def log_image(self, key: str, png: bytes, step: int) -> None:
        """Show a picture in the image grid of the run, under 'task/set image', at a step of its slider (the round).

        Of a key and step the last one stands.
        """
        for name, data in image_files(key, png, step).items():
            self.log_file(name, data, "run")

    def flush(self) -> None:
        """Have sent what waits, unless the store failed a moment ago; returns at once."""
        self._sender.request_send()

    def pending(self) -> bytes:
        """All that waits now, for a commit: a life that goes on from it elsewhere gets it as `inherited`.

        b"" when nothing waits. Above 16 MiB the largest files are left out, never points.
        """
        return self._outbox.pending_lines()

    def end_round(self, status: str = "FINISHED") -> None:
        """Close the nested run of the current round, if one is open, as FINISHED, FAILED or KILLED."""
        if self._round:
            self._outbox.put(Record("end", self._round, status))
            self._round = ""
            self.flush()

    def end_run(self, status: str = "FINISHED", seconds: float = math.inf) -> None:
        """Close the parent run as FINISHED, FAILED or KILLED, and wait while what waits gets through.

        At most `FAREWELL_SECONDS` without progress, and at most `seconds` in all. What is left then is told.
        """
        self._outbox.put(Record("end", "run", status))
        self._outbox.move_to_disk()
        if self._sender.finish(FAREWELL_SECONDS, seconds):
            return
        with contextlib.suppress(UserError):
            left = pending_records(self._journal) if self._journal else Pending(0, 0, None)
            if left.since is not None:
                _log.warning(
                    "the run ends while %d points and %d other records wait for %s in %s. "
                    "Send them with `mirl-dist track resend RUN`.",
                    *(left.points, left.records, self._store.name, self._journal),
                )
        lost = self._outbox.count_in_memory()
        if lost.since is not None:
            text = "the run ends while %d points and %d other records wait for %s in memory only: they are lost to it"
            _log.warning(text, lost.points, lost.records, self._store.name)

    def address(self) -> str:
        """Where people find the run: its page, or the command that opens the store; never a password."""
        run = self._store.remote_runs.get("run")
        return records.page_address(self._uri, self._store.experiment_id, run.id if run else "")

    def _begin(self, run_key: str, name: str, tags: Mapping[str, str], params: Mapping[str, object]) -> None:
        texts = {legal_name(t): redact(text, self._uri)[: records.LONGEST_TAG] for t, text in tags.items()}
        self._outbox.put(Record("open", run_key, name, texts))
        self._begun.add(run_key)
        long = records.LONGEST_PARAM
        pairs = [(legal_name(n), redact(text, self._uri)[:long]) for n, text in flatten(params).items()]
        for start in range(0, len(pairs), records.PARAMS_PER_CALL):
            self._outbox.put(Record("params", run_key, texts=dict(pairs[start : start + records.PARAMS_PER_CALL])))
        self.flush()


def check_reachable(uri: str | None) -> None:
    """Raise UserError for an address that is unclear or that MLflow refuses, and when MLflow is not installed.

    No server is asked."""
    address = default_uri(uri)
    records.check_uri(address)
    import_quietly(address)


def _open_journal(folder: Path, store_name: str) -> tuple[Journal | None, str]:
    """The journal, if there can be one, and the key of its run."""
    try:
        journal = Journal(folder)
    except OSError as error:
        _log.warning(
            "the journal %s cannot be used (%s): records for %s wait in memory only. "
            "Make room or correct the rights, or choose another tracking.journal.",
            *(folder, error.strerror or error, store_name),
        )
        return None, uuid.uuid4().hex
    try:
        return journal, journal.read_key()
    except OSError:
        return journal, uuid.uuid4().hex
