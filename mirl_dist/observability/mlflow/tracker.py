"""Tracking of a run in MLflow: one parent run, one nested run per round. Failures of MLflow never stop training.

Every record is first written to a journal on disk. A thread sends the records in order, so the caller never waits for
the store. Delivery is idempotent: points keep their creation time, which identifies them in the store, and steps of a
curve only grow; runs are found again by id or tag; files are overwritten. Neither a restart nor a lost response
duplicates a point. Undelivered records are sent first after a restart.
"""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from mirl_dist.errors import UserError
from mirl_dist.observability import progress
from mirl_dist.observability.mlflow import records
from mirl_dist.observability.mlflow.client import MlflowClientStore, RunIds, check_usable, import_quietly
from mirl_dist.observability.mlflow.first_start import one_at_a_time
from mirl_dist.observability.mlflow.journal import Journal, Pending, pending_records
from mirl_dist.observability.mlflow.outbox import Outbox
from mirl_dist.observability.mlflow.records import Record, legal_name, redact, redact_uri
from mirl_dist.observability.mlflow.sender import Sender

__all__ = ["MlflowTracker", "Tracker", "Pending", "pending_records", "resend"]

FAREWELL_SECONDS = 10.0
"""How long `end_run` waits for MLflow without a successful delivery."""
RESEND_SECONDS = 30.0
"""Time without a successful delivery after which `resend` gives up."""

_log = logging.getLogger("mirl_dist.tracking")


class Tracker:
    """A tracker that does nothing, for ranks other than 0 and disabled tracking. Rank 0 has an `MlflowTracker`."""

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


class MlflowTracker(Tracker):
    """Tracker of a run in MLflow; reopens the run by id after a restart, without duplicate points.

    uri: tracking URI; None means MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory.
    remembered, remember: ids that the caller keeps over restarts ("run", "round/03", and "key", which finds a run whose
    id was lost). The sending thread calls `remember` as soon as new ids exist, and again later if it raises UserError,
    as storage does.
    journal: a local folder used by this run only. inherited: the return value of `pending` from the commit that the run
    resumes. A store that is unavailable or refuses neither raises nor blocks: one warning per outage goes to the logger
    "mirl_dist.tracking". The same applies to a journal that cannot be written; its records are then kept in memory.
    Raise UserError for a URI that MLflow rejects, or if MLflow is not installed.
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
        self._uri = records.default_uri(uri)
        check_usable(self._uri)
        with one_at_a_time(self._uri):
            pass  # raises UserError for a half-made database, before any step is trained
        self._run_name = run_name
        self._journal = journal
        opened, key, session_id = Journal(journal), uuid.uuid4().hex, uuid.uuid4().hex
        with contextlib.suppress(OSError):  # the outbox warns of it, and keeps records in memory
            key = opened.read_key()
        self._store = MlflowClientStore(self._uri, experiment, run_name, RunIds(remembered, key, remember), session_id)
        self._outbox = Outbox(self._store.name, session_id, opened, inherited)
        self._sender = Sender(self._store, self._outbox)
        self._round, self._begun = "", set[str]()
        self._sender.start()

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the parent run. Nested params become 'a.b'; long values are cut; passwords in URLs are masked.

        A param that differs after a restart keeps its old value; the new value becomes the tag 'changed.<name>'.
        """
        self._begin("run", self._run_name, tags, params)

    def begin_round(self, round_: int, tags: Mapping[str, str], params: Mapping[str, object] = {}) -> None:
        """Open the nested run 'RUN, round 03'; params as in `begin_run`.

        Steps that it already has, or that are pending for it, are not sent again.
        """
        self._round = f"round/{round_:02d}"
        self._begin(self._round, records.round_name(self._run_name, round_), tags, params)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one optimiser step. Steps are sent in groups of 50, or after 5 seconds.

        Non-finite values are omitted.
        """
        assert self._round, "begin_round comes first"
        self._outbox.put_points("points", self._round, [(n, value, step) for n, value in values.items()])
        self._sender.count_step()

    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None:
        """Log the results of a begun round; idempotent. Names must differ from those of log_step.

        All values go to the nested run at step = round. Those not under 'weights/density/' also go to the parent run as
        'round/<name>'. The parent run additionally gets the scores ('psnr/...', 'ssim.<protocol>/...') under their
        plain names at step = values['alive_weights'].
        """
        run_key = f"round/{round_:02d}"
        assert run_key in self._begun, "begin_round comes first"
        self._outbox.put_points("ticket", run_key, [(name, value, round_) for name, value in values.items()])
        alive, points = values.get("alive_weights", math.nan), list[tuple[str, float, int]]()
        order = sorted(values, key=lambda name: (not records.is_score(name), name.count("/")))  # that of MLflow's pages
        for name in order:
            if not name.startswith("weights/density/"):
                points.append((records.BY_ROUND + name, values[name], round_))
            if records.is_score(name) and math.isfinite(alive):  # next to its 'round/' twin: both must be in one batch
                points.append((name, values[name], int(alive)))
        self._outbox.put_points("ticket", "run", points)
        self.flush()

    def log_file(self, name: str, data: bytes, scope: str) -> None:
        """Log a file under a relative path, 'folder/name'. scope: 'round' (the current one) or 'run'."""
        assert scope in ("round", "run") and records.is_relative_file(name)
        name = str(PurePosixPath(name))
        self._outbox.put(Record("file", self._round if scope == "round" else "run", name, data=data))
        self.flush()

    def log_image(self, key: str, png: bytes, step: int) -> None:
        """Log a picture for the run's image grid. key: 'task/set image'. step: position of the slider (the round).

        A picture with the same key and step is replaced.
        """
        for name, data in records.image_files(key, png, step).items():
            self.log_file(name, data, "run")

    def flush(self) -> None:
        """Request sending of pending records, after the current pause if the store failed recently. Does not block."""
        self._sender.request_send()

    def pending(self) -> bytes:
        """Return all pending records for a commit; a process that resumes from it passes them as `inherited`.

        b"" if there are none. Above 16 MiB the largest files are omitted, never points.
        """
        return self._outbox.pending_lines()

    def end_round(self, status: str = "FINISHED") -> None:
        """Close the current round's nested run, if one is open, with status FINISHED, FAILED or KILLED."""
        if self._round:
            self._outbox.put(Record("end", self._round, status))
            self._round = ""
            self.flush()

    def end_run(self, status: str = "FINISHED", seconds: float = math.inf) -> None:
        """Close the parent run with status FINISHED, FAILED or KILLED, and wait for pending records to be sent.

        Wait at most `FAREWELL_SECONDS` without progress and `seconds` in total. A warning reports what is left.
        """
        self._outbox.put(Record("end", "run", status))
        self._outbox.move_to_disk()
        if seconds == math.inf:
            with contextlib.suppress(ImportError):
                import_quietly(self._uri)  # the thread of a short run may still be importing it: that is no silence
        if self._sender.finish(FAREWELL_SECONDS, seconds):
            return
        text = "the run ends while %d points and %d other records wait for %s in "
        with contextlib.suppress(UserError):
            left = pending_records(self._journal)
            if left.since is not None:
                remedy = "%s. Send them with `mirl-dist track resend RUN`."
                _log.warning(text + remedy, left.points, left.records, self._store.name, self._journal)
        lost = self._outbox.count_in_memory()
        if lost.since is not None:
            _log.warning(text + "memory only: they are lost to it", lost.points, lost.records, self._store.name)

    def address(self) -> str:
        """Return the run's page, or the command that opens the store, without credentials."""
        run = self._store.remote_runs.get("run")
        return records.page_address(self._uri, self._store.experiment_id, run.id if run else "")

    def _begin(self, run_key: str, name: str, tags: Mapping[str, str], params: Mapping[str, object]) -> None:
        texts = {legal_name(t): redact(text, self._uri)[: records.LONGEST_TAG] for t, text in tags.items()}
        self._outbox.put(Record("open", run_key, name, texts))
        self._begun.add(run_key)
        long = records.LONGEST_PARAM
        pairs = [(legal_name(n), redact(text, self._uri)[:long]) for n, text in records.flatten(params).items()]
        for start in range(0, len(pairs), records.PARAMS_PER_CALL):
            self._outbox.put(Record("params", run_key, texts=dict(pairs[start : start + records.PARAMS_PER_CALL])))
        self.flush()


def check_reachable(uri: str | None) -> None:
    """Raise UserError for an invalid tracking URI or one that MLflow rejects, or if MLflow is not installed.

    Does not contact the server."""
    address = records.default_uri(uri)
    records.check_uri(address)
    check_usable(address)


def resend(
    uri: str | None,
    experiment: str,
    run_name: str,
    remembered: Mapping[str, str],
    remember: Callable[[dict[str, str]], None],
    journal: Path,
    inherited: bytes,
    say: Callable[[str], None],
) -> Pending:
    """Send all pending records of an ended run, report it through `say`, and return their counts.

    Other arguments as for `MlflowTracker`. Raise UserError while the run is active, and a resumable one if nothing was
    delivered for 30 seconds.
    """
    address, session_id = records.default_uri(uri), uuid.uuid4().hex
    check_reachable(address)
    if not inherited and not journal.exists():
        say(f"nothing waits for {redact_uri(address)}")
        return Pending(0, 0, None)
    try:
        opened = Journal(journal)
        key = opened.read_key()
    except OSError as error:
        raise UserError(f"found the journal {journal}, which cannot be used: {error}. Correct the rights.") from None
    store = MlflowClientStore(address, experiment, run_name, RunIds(remembered, key, remember), session_id)
    try:
        if not opened.lock():
            raise UserError(
                f"found the journal {journal} in use: the run is still running and sends its records, or "
                "another command does. Wait until it has ended."
            )
        return _send_all(store, Outbox(store.name, session_id, opened, inherited), journal, say)
    finally:
        opened.close()


def _send_all(store: MlflowClientStore, outbox: Outbox, journal: Path, say: Callable[[str], None]) -> Pending:
    """Send all records of an outbox and return their counts. Raise a resumable UserError if any are left."""
    before = outbox.count()
    if before.since is None:
        say(f"nothing waits for {store.name} in {journal}")
        return before
    outbox.claim()
    sender = Sender(store, outbox, announce=lambda *_: None)
    with progress.bar(f"sending to {store.name}", before.points + before.records) as advance:
        sent_all = sender.send_all(RESEND_SECONDS, lambda sent: advance(sent, ""))
    if not sent_all:
        left = outbox.count()
        raise UserError(
            f"found {store.name} unavailable or refusing requests ({sender.last_failure}): {left.points} points and "
            f"{left.records} other records still wait in {journal}. Check the server, and call this again.",
            resumable=True,
        )
    say(f"sent {before.points} points and {before.records} other records to {store.name}")
    return before
