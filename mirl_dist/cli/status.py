"""Reports the progress of a run, its writer and its pending MLflow records, and resends these records."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mirl_dist.cli.show import in_words
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import journal_folder
from mirl_dist.config.schema import TrackingSection
from mirl_dist.errors import UserError
from mirl_dist.observability import progress
from mirl_dist.observability.mlflow import tracker
from mirl_dist.storage import lease
from mirl_dist.tickets.runs import open_run
from mirl_dist.training.checkpointing.checkpoint import OUTBOX, Checkpoints

_WATCH_SECONDS = 15.0  # three heartbeat intervals of a lease


def print_status(run: str, as_json: bool) -> None:
    """Print the newest commit, samples, time and speed so far, the writer, and pending records."""
    checkpoints, config = open_run(run)
    commits, tickets = checkpoints.commits(), checkpoints.tickets()
    newest, totals = checkpoints.latest_progress(commits)
    status: dict[str, Any] = {
        "run": run,
        "rounds_finished": len(tickets),
        "rounds_planned_at_first": config.prune.rounds + 1,
        "newest_commit": newest and {"round": newest.round_, "step": newest.step, "folder": newest.folder},
        "samples": totals.samples,
        "seconds_training": totals.seconds,
        "samples_per_second": totals.samples / totals.seconds if totals.seconds else None,
        "writer": _writer(checkpoints, config),
        "mlflow": None,
    }
    section, journal = _latest_tracking(run, checkpoints, config)
    if section.enabled:
        pending = tracker.pending_records(journal)
        since = pending.since and datetime.fromtimestamp(pending.since, timezone.utc).isoformat(timespec="seconds")
        status["mlflow"] = {"points_waiting": pending.points, "records_waiting": pending.records, "since": since}
    if as_json:
        print(json.dumps(status, indent=1))
        return
    for name, value in status.items():
        progress.say(f"{name:24} {in_words(value)}")


def _writer(checkpoints: Checkpoints, config: Config) -> dict[str, Any] | None:
    """Return the launch that holds or last held the run's lease, with its last reported status while it is alive."""
    holder = lease.read_holder(checkpoints.store)
    if holder is None:
        return None
    writer = {"host": holder.host, "pid": holder.pid, "since": holder.started_at, "beat": holder.beat_at}
    if holder.ended is not None or holder.has_exited():
        return writer | {"ended": holder.ended or "dead"}
    last_status = dict(holder.status)
    left, speed = last_status.get("steps", 0) - last_status.get("step", 0), last_status.get("samples_per_second")
    if speed:
        last_status["seconds_left_in_round"] = round(left * config.batch.global_ / speed)
    return writer | last_status


def _latest_tracking(run: str, checkpoints: Checkpoints, config: Config) -> tuple[TrackingSection, Path]:
    """Return the tracking section of the last launch (run.json has that of the first), and the journal's folder."""
    holder = lease.read_holder(checkpoints.store)
    dump = None if holder is None else holder.launch.get("tracking")
    section = config.tracking if dump is None else TrackingSection.model_validate(dump)
    identity = checkpoints.identity() or {}
    return section, journal_folder(run, section.journal, str(identity.get("id", "")))


def _check_no_live_launch(run: str, checkpoints: Checkpoints) -> None:
    """Raise UserError if the launch that holds a run is alive; on another machine, this is judged by its heartbeat."""
    holder, deadline = lease.read_holder(checkpoints.store), time.monotonic() + _WATCH_SECONDS
    if holder is None or holder.ended is not None or holder.has_exited():
        return
    progress.say(
        f"{run} was last held by the launch on {holder}; watching for {_WATCH_SECONDS:g} s whether it is still running"
    )
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = lease.read_holder(checkpoints.store)
        if now is not None and (now.beat != holder.beat or now.generation != holder.generation):
            raise UserError(
                f"{run} is held by a launch ({now}) that is still running and sends its records. Wait until it ends."
            )


def resend(run: str) -> None:
    """Send the pending records of an ended run to MLflow: those on this machine, and those in its last commit."""
    checkpoints, config = open_run(run)
    section, journal = _latest_tracking(run, checkpoints, config)
    if not section.enabled:
        raise UserError(f"{run} was trained with tracking.enabled=false: there is nothing to send.")
    _check_no_live_launch(run, checkpoints)
    latest = checkpoints.latest()
    tracker.resend(
        uri=section.uri,
        experiment=section.experiment,
        run_name=section.run_name or Path(run).name,
        remembered=checkpoints.mlflow_ids(),
        remember=checkpoints.save_mlflow_ids,
        journal=journal,
        inherited=b"" if latest is None else latest[1].get(OUTBOX, b""),
        say=progress.say,
    )
