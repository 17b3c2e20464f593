"""Where a run stands: its progress, its writer, and the records that MLflow has not received; sends them again."""

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
from mirl_dist.tickets.open import open_run
from mirl_dist.training.checkpoint import OUTBOX, Checkpoints

_WATCH_SECONDS = 15.0  # three beats of a lease


def print_status(run: str, as_json: bool) -> None:
    """Round and step of the newest commit, and the samples, time and speed up to there."""
    checkpoints, config = open_run(run)
    commits, tickets = checkpoints.commits(), checkpoints.tickets()
    newest, stands = checkpoints.latest_progress(commits)
    said: dict[str, Any] = {
        "run": run,
        "rounds_finished": len(tickets),
        "rounds_planned_at_first": config.prune.rounds + 1,
        "newest_commit": None
        if newest is None
        else {"round": newest.round_, "step": newest.step, "folder": newest.folder},
        "samples": stands.samples,
        "seconds_training": stands.seconds,
        "samples_per_second": stands.samples / stands.seconds if stands.seconds else None,
        "writer": _writer(checkpoints, config),
        "mlflow": _mlflow(run, checkpoints, config),
    }
    if as_json:
        print(json.dumps(said, indent=1))
        return
    for name, value in said.items():
        progress.say(f"{name:24} {in_words(value)}")


def _writer(checkpoints: Checkpoints, config: Config) -> dict[str, Any] | None:
    """Who holds, or last held, the run's lease; while it lives, what its last sign of life said."""
    found = lease.holder(checkpoints.store)
    if found is None:
        return None
    who = {"host": found.host, "pid": found.pid, "since": found.started_at, "beat": found.beat_at}
    if found.ended is not None or found.has_exited():
        return who | {"ended": found.ended or "dead"}
    news = dict(found.status)
    left, speed = news.get("steps", 0) - news.get("step", 0), news.get("samples_per_second")
    if speed:
        news["seconds_left_in_round"] = round(left * config.batch.global_ / speed)
    return who | news


def _tracking(checkpoints: Checkpoints, config: Config) -> TrackingSection:
    """The tracking section of the last launch; that of run.json is the first one's."""
    found = lease.holder(checkpoints.store)
    said = found.launch.get("tracking") if found is not None else None
    return config.tracking if said is None else TrackingSection.model_validate(said)


def _journal(run: str, checkpoints: Checkpoints, said: TrackingSection) -> Path:
    found = checkpoints.identity() or {}
    return journal_folder(run, said.journal, str(found.get("id", "")))


def _mlflow(run: str, checkpoints: Checkpoints, config: Config) -> dict[str, Any] | None:
    """What waits on this machine to be told to MLflow."""
    said = _tracking(checkpoints, config)
    if not said.enabled:
        return None
    waits = tracker.pending_records(_journal(run, checkpoints, said))
    since = None
    if waits.since is not None:
        since = datetime.fromtimestamp(waits.since, timezone.utc).isoformat(timespec="seconds")
    return {"points_waiting": waits.points, "records_waiting": waits.records, "since": since}


def _check_not_alive(run: str, checkpoints: Checkpoints) -> None:
    """Raise UserError when the launch that holds a run gives a sign of life; on another machine that is watched for."""
    first, last = lease.holder(checkpoints.store), time.monotonic() + _WATCH_SECONDS
    if first is None or first.ended is not None or first.has_exited():
        return
    progress.say(f"{run} was last held by the launch on {first}; watching for {_WATCH_SECONDS:g} s whether it lives")
    while time.monotonic() < last:
        time.sleep(0.5)
        now = lease.holder(checkpoints.store)
        if now is not None and (now.sign != first.sign or now.generation != first.generation):
            raise UserError(f"{run} is held by a launch ({now}) that lives, and sends by itself. Wait for its end.")


def resend(run: str) -> None:
    """Tell MLflow what a run that has ended could not tell it: what waits on this machine, and in its last commit."""
    checkpoints, config = open_run(run)
    said = _tracking(checkpoints, config)
    if not said.enabled:
        raise UserError(f"{run} was trained with tracking.enabled=false: there is nothing to send.")
    _check_not_alive(run, checkpoints)
    found = checkpoints.latest()
    tracker.resend(
        uri=said.uri,
        experiment=said.experiment,
        run_name=said.run_name or Path(run).name,
        remembered=checkpoints.mlflow_ids(),
        remember=checkpoints.save_mlflow_ids,
        journal=_journal(run, checkpoints, said),
        inherited=b"" if found is None else found[1].get(OUTBOX, b""),
        say=progress.say,
    )
