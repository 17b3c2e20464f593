"""Finished work off the shelf: where a run stands, its tickets listed and shown, what MLflow has not heard of it."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import journal_folder
from mirl_dist.config.schema import TrackingSection
from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score
from mirl_dist.observability import progress
from mirl_dist.observability.mlflow import resend as sending
from mirl_dist.observability.mlflow import tracker
from mirl_dist.storage import Folder, Options, lease, output_paths
from mirl_dist.tickets.open import FileTicket, open_run, open_ticket
from mirl_dist.training.checkpoint import OUTBOX, Checkpoints

_USUAL = Options()
_WATCH_SECONDS = 15.0  # three beats of a lease


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=Text(title, style="table.title"))  # Text: names are no markup
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_tickets(run: str, as_json: bool, options: Options = _USUAL) -> None:
    """One line per round: alive weights, sparsity, PSNR and SSIM per task and set."""
    checkpoints, _ = open_run(run, options)
    tickets, best = checkpoints.tickets(), checkpoints.best()
    if as_json:
        print(json.dumps([t.row() | {"best": t.round == best} for t in tickets], indent=1))
        return
    if not tickets:
        progress.say(f"{run} has no finished round yet.")
        return
    names = list(tickets[0].scores)
    columns = ["round", "alive", "sparsity"] + [name.replace("/", "\n") for name in names]
    rows = []
    for t in tickets:
        mark = "*" if t.round == best else ""
        cells = [f"{t.scores[n].psnr:.2f}\n{t.scores[n].ssim:.4f}" for n in names]
        rows.append([f"{t.round}{mark}", f"{t.alive_total:,}", f"{t.total_sparsity:.1%}", *cells])
    given = tickets[0].scores
    rows.append(["input", "", "", *(f"{given[n].degraded_psnr:.2f}\n{given[n].degraded_ssim:.4f}" for n in names)])
    _table(f"tickets of {run} (PSNR in dB over SSIM)", columns, rows)
    if best is not None:
        progress.say("* best by validation")


def print_ticket(reference: str, as_json: bool) -> None:
    """Counts, digests, scores and density per layer of one ticket."""
    opened = open_ticket(reference)
    ticket = opened.ticket()
    if as_json:
        print(json.dumps(ticket.row() | {"layer_density": ticket.layer_density}, indent=1))
        return
    for name, value in ticket.row().items():
        if name not in ("scores", "also"):
            progress.say(f"{name:16} {_in_words(value)}")
    print_score_table(reference, ticket.scores)
    for protocol, scores in ticket.also.items():
        print_score_table(f"{reference}, {protocol}", scores)
    rows = [[name, f"{value:.4f}"] for name, value in ticket.layer_density.items()]
    _table("density per layer", ["tensor", "alive share"], rows)


def write_pictures(reference: str, out: Path) -> None:
    """The strip of images that a ticket restored, as a PNG file."""
    output_paths.check_file(out)
    found = open_ticket(reference)
    if isinstance(found, FileTicket):
        raise UserError(f"found {reference}, a ticket file, which holds no pictures. Name its run, as RUN/rounds/NN.")
    strip = found.checkpoints.pictures(found.round_)
    if strip is None:
        raise UserError(
            f"{reference} drew no pictures: its shards have no evaluation sets. Build shards that have some."
        )
    Folder(out.parent).put(out.name, strip)
    progress.say(f"degraded, restored and clean images of round {found.round_}: {out}")


def print_score_table(title: str, scores: dict[str, Score]) -> None:
    rows = [
        [
            name,
            str(s.images),
            f"{s.psnr:.2f}",
            f"{s.ssim:.4f}",
            f"{s.degraded_psnr:.2f}",
            f"{s.degraded_ssim:.4f}",
        ]
        for name, s in scores.items()
    ]
    _table(title, ["task/set", "images", "PSNR", "SSIM", "input PSNR", "input SSIM"], rows)


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
        progress.say(f"{name:24} {_in_words(value)}")


def _in_words(value: Any) -> str:
    """One line for people: '-' for nothing, few digits."""
    if isinstance(value, dict):
        return ", ".join(
            f"{_in_words(key)} {_in_words(inner)}" for key, inner in value.items() if inner not in ("", None)
        )
    if isinstance(value, str):  # what a damaged sample said, too: nothing that would upset a terminal
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _writer(checkpoints: Checkpoints, config: Config) -> dict[str, Any] | None:
    """Who holds, or last held, the run's lease; while it lives, what its last sign of life said."""
    found = lease.read_holder(checkpoints.store)
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
    found = lease.read_holder(checkpoints.store)
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
    first, last = lease.read_holder(checkpoints.store), time.monotonic() + _WATCH_SECONDS
    if first is None or first.ended is not None or first.has_exited():
        return
    progress.say(f"{run} was last held by the launch on {first}; watching for {_WATCH_SECONDS:g} s whether it lives")
    while time.monotonic() < last:
        time.sleep(0.5)
        now = lease.read_holder(checkpoints.store)
        if now is not None and (now.beat != first.beat or now.generation != first.generation):
            raise UserError(f"{run} is held by a launch ({now}) that lives, and sends by itself. Wait for its end.")


def resend(run: str) -> None:
    """Tell MLflow what a run that has ended could not tell it: what waits on this machine, and in its last commit."""
    checkpoints, config = open_run(run)
    said = _tracking(checkpoints, config)
    if not said.enabled:
        raise UserError(f"{run} was trained with tracking.enabled=false: there is nothing to send.")
    _check_not_alive(run, checkpoints)
    found = checkpoints.latest()
    sending.resend(
        uri=said.uri,
        experiment=said.experiment,
        run_name=said.run_name or Path(run).name,
        remembered=checkpoints.mlflow_ids(),
        remember=checkpoints.save_mlflow_ids,
        journal=_journal(run, checkpoints, said),
        inherited=b"" if found is None else found[1].get(OUTBOX, b""),
        say=progress.say,
    )
