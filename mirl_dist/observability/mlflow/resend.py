"""Sends what an ended run left in its journal, or in its last commit: for a command that people call."""

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
"""How long nothing may get through before `resend` gives up."""


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
    """Send all that waits for the store, and say so; returns what was sent. Arguments as of `MlflowTracker`.

    Raises UserError while the run lives, and a resumable one when nothing got through for 30 seconds.
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
    """The journal and the key of its run. Raises UserError."""
    try:
        journal = Journal(folder)
        return journal, journal.read_key()
    except OSError as error:
        raise UserError(f"found the journal {folder}, which cannot be used: {error}. Correct the rights.") from None


def _send(store: MlflowClientStore, outbox: Outbox, journal: Path, say: Callable[[str], None]) -> Pending:
    """Send all that an outbox holds; what that was. Raises a resumable UserError where something is left."""
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
