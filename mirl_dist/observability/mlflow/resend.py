"""Sends the pending records of an ended run from its journal or last commit, for `mirl-dist track resend`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from mirl_dist.errors import UserError
from mirl_dist.observability import progress
from mirl_dist.observability.mlflow.client import MlflowClientStore
from mirl_dist.observability.mlflow.journal import Journal, Pending
from mirl_dist.observability.mlflow.outbox import Outbox
from mirl_dist.observability.mlflow.records import default_uri, redact_uri
from mirl_dist.observability.mlflow.remote_runs import RunIds
from mirl_dist.observability.mlflow.sender import Sender
from mirl_dist.observability.mlflow.tracker import check_reachable

RESEND_SECONDS = 30.0
"""Time without a successful delivery after which `resend` gives up."""


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
    """Send all pending records to the store, report it through `say`, and return their counts.

    Other arguments as for `MlflowTracker`. Raise UserError while the run is active, and a resumable one if nothing was
    delivered for 30 seconds.
    """
    address = default_uri(uri)
    check_reachable(address)
    if not inherited and not journal.exists():
        say(f"nothing waits for {redact_uri(address)}")
        return Pending(0, 0, None)
    opened, key = _open_journal(journal)
    try:
        if not opened.lock():
            raise UserError(
                f"found the journal {journal} in use: the run lives and sends by itself, or another command does. "
                "Wait until it has ended."
            )
        session_id = uuid.uuid4().hex
        store = MlflowClientStore(address, experiment, run_name, RunIds(remembered, key, remember), session_id)
        outbox = Outbox(store.name, session_id, opened, inherited)
        outbox.claim()
        return _send(store, outbox, journal, say)
    finally:
        opened.close()


def _open_journal(folder: Path) -> tuple[Journal, str]:
    """Return the journal and its run's key. Raise UserError if it cannot be used."""
    try:
        journal = Journal(folder)
        return journal, journal.read_key()
    except OSError as error:
        raise UserError(f"found the journal {folder}, which cannot be used: {error}. Correct the rights.") from None


def _send(store: MlflowClientStore, outbox: Outbox, journal: Path, say: Callable[[str], None]) -> Pending:
    """Send all records of an outbox and return their counts. Raise a resumable UserError if any are left."""
    before = outbox.count()
    if before.since is None:
        say(f"nothing waits for {store.name} in {journal}")
        return before
    with progress.bar(f"sending to {store.name}", outbox.total()) as advance:
        failure = Sender(store, outbox).send_all(RESEND_SECONDS, lambda done: advance(done, ""))
    if failure:
        left = outbox.count()
        raise UserError(
            f"found {store.name} unavailable or refusing requests ({failure}): {left.points} points and "
            f"{left.records} other records still wait in {journal}. Check the server, and call this again.",
            resumable=True,
        )
    say(f"sent {before.points} points and {before.records} other records to {store.name}")
    return before
