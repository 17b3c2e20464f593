"""Finished work off the shelf: tickets of a run listed, shown, scored again, and put to use."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import redirect_stdout
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mirl_dist import assemble, evaluate, feed, lease, metrics, models, report, tracking
from mirl_dist.checkpoint import OUTBOX, Checkpoints, pack_tensors
from mirl_dist.config import Config, Tracking, of_dump
from mirl_dist.data.sample import Pixels
from mirl_dist.data.shards import Shards
from mirl_dist.data.source_image import Refused, decode
from mirl_dist.faults import Fault
from mirl_dist.ranks import Ranks
from mirl_dist.storage import Folder, Store, open_store
from mirl_dist.tasks import Task
from mirl_dist.ticket import Score

_WATCH_SECONDS = 15.0  # three beats of a lease


class Found(NamedTuple):
    """A run and one of its rounds."""

    checkpoints: Checkpoints
    config: Config
    round_: int


def open_run(folder: str, store: Store | None = None) -> tuple[Checkpoints, Config]:
    """A run, opened for reading; store: where that is not as the environment says. Raises Fault without a run."""
    checkpoints = Checkpoints(store or open_store(folder))
    identity = checkpoints.identity()
    if identity is None:
        raise Fault(f"{folder} holds no run (no run.json). Give the run.folder of a config that was trained.")
    return checkpoints, of_dump(identity["config"], f"{folder}/run.json")


def find(reference: str) -> Found:
    """`RUN` (its best round where the run chose one, else its last) or `RUN/rounds/NN`."""
    match = re.fullmatch(r"(.*?)/rounds/(\d+)/?", reference)
    checkpoints, config = open_run(match.group(1) if match else reference)
    rounds = [t.round for t in checkpoints.tickets()]
    if not rounds:
        raise Fault(f"{reference} has no finished round yet. `mirl-dist status` shows where it stands.")
    chosen = checkpoints.best()
    round_ = int(match.group(2)) if match else (rounds[-1] if chosen is None else chosen)
    if round_ not in rounds:
        raise Fault(f"{reference} is not there; finished rounds are {', '.join(map(str, rounds))}.")
    return Found(checkpoints, config, round_)


def network(found: Found) -> nn.Module:
    """The network of a ticket with the weights that its round trained."""
    model = assemble.network(found.config)
    model.load_state_dict(found.checkpoints.round_weights(found.round_))
    return model.eval()


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_tickets(run: str, as_json: bool, store: Store | None = None) -> None:
    """One line per round: alive weights, sparsity, PSNR and SSIM per task and set."""
    checkpoints, _ = open_run(run, store)
    tickets, best = checkpoints.tickets(), checkpoints.best()
    if as_json:
        print(json.dumps([t.row() | {"best": t.round == best} for t in tickets], indent=1))
        return
    if not tickets:
        report.say(f"{run} has no finished round yet.")
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
        report.say("* best by validation")


def print_ticket(reference: str, as_json: bool) -> None:
    """Counts, digests, scores and density per layer of one ticket."""
    found = find(reference)
    ticket = found.checkpoints.ticket(found.round_)
    if as_json:
        print(json.dumps(ticket.row() | {"layer_density": ticket.layer_density}, indent=1))
        return
    for name, value in ticket.row().items():
        if name != "scores":
            report.say(f"{name:16} {value}")
    print_score_table(reference, ticket.scores)
    rows = [[name, f"{value:.4f}"] for name, value in ticket.layer_density.items()]
    _table("density per layer", ["tensor", "alive share"], rows)


def write_pictures(reference: str, out: Path) -> None:
    """The strip of images that a ticket restored, as a PNG file."""
    found = find(reference)
    strip = found.checkpoints.pictures(found.round_)
    if strip is None:
        raise Fault(f"{reference} drew no pictures: its shards have no evaluation sets. Build shards that have some.")
    Folder(out.parent).put(out.name, strip)
    report.say(f"degraded, restored and clean images of round {found.round_}: {out}")


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
    newest, stands = checkpoints.stands(commits)
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
        report.say(f"{name:24} {_in_words(value)}")


def _in_words(value: Any) -> str:
    """One line for people: '-' for nothing, few digits."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(inner)}" for key, inner in value.items() if inner not in ("", None))
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _writer(checkpoints: Checkpoints, config: Config) -> dict[str, Any] | None:
    """Who holds, or last held, the run's lease; while it lives, what its last sign of life said."""
    found = lease.holder(checkpoints.store)
    if found is None:
        return None
    who = {"host": found.host, "pid": found.pid, "since": found.started_at, "beat": found.beat_at}
    if found.ended is not None or found.is_gone():
        return who | {"ended": found.ended or "dead"}
    news = dict(found.news)
    left, speed = news.get("steps", 0) - news.get("step", 0), news.get("samples_per_second")
    if speed:
        news["seconds_left_in_round"] = round(left * config.batch.global_ / speed)
    return who | news


def _tracking(checkpoints: Checkpoints, config: Config) -> Tracking:
    """The tracking section of the last launch; that of run.json is the first one's."""
    found = lease.holder(checkpoints.store)
    said = found.launch.get("tracking") if found is not None else None
    return config.tracking if said is None else Tracking.model_validate(said)


def _journal(run: str, checkpoints: Checkpoints, said: Tracking) -> Path:
    found = checkpoints.identity() or {}
    return tracking.usual_journal(run, said.journal, str(found.get("id", "")))


def _mlflow(run: str, checkpoints: Checkpoints, config: Config) -> dict[str, Any] | None:
    """What waits on this machine to be told to MLflow."""
    said = _tracking(checkpoints, config)
    if not said.enabled:
        return None
    waits = tracking.waiting(_journal(run, checkpoints, said))
    since = None
    if waits.since is not None:
        since = datetime.fromtimestamp(waits.since, timezone.utc).isoformat(timespec="seconds")
    return {"points_waiting": waits.points, "records_waiting": waits.records, "since": since}


def _refuse_while_it_lives(run: str, checkpoints: Checkpoints) -> None:
    """Raise Fault when the launch that holds a run gives a sign of life; on another machine that is watched for."""
    first, last = lease.holder(checkpoints.store), time.monotonic() + _WATCH_SECONDS
    if first is None or first.ended is not None or first.is_gone():
        return
    report.say(f"{run} was last held by the launch on {first}; watching for {_WATCH_SECONDS:g} s whether it lives")
    while time.monotonic() < last:
        time.sleep(0.5)
        now = lease.holder(checkpoints.store)
        if now is not None and (now.sign != first.sign or now.generation != first.generation):
            raise Fault(f"{run} is held by a launch ({now}) that lives, and sends by itself. Wait for its end.")


def resend(run: str) -> None:
    """Tell MLflow what a run that has ended could not tell it: what waits on this machine, and in its last commit."""
    checkpoints, config = open_run(run)
    said = _tracking(checkpoints, config)
    if not said.enabled:
        raise Fault(f"{run} was trained with tracking.enabled=false: there is nothing to send.")
    _refuse_while_it_lives(run, checkpoints)
    found = checkpoints.newest()
    tracking.resend(
        uri=said.uri,
        experiment=said.experiment,
        run_name=said.run_name or Path(run).name,
        remembered=checkpoints.remembered(),
        remember=checkpoints.remember,
        journal=_journal(run, checkpoints, said),
        inherited=b"" if found is None else found[1].get(OUTBOX, b""),
        say=report.say,
    )


def print_scores(reference: str, shards_address: str | None, as_json: bool) -> None:
    """Score a ticket again, on the run's shards or on others."""
    found = find(reference)
    shards = Shards(assemble.store_of(found.config, shards_address or found.config.data.shards))
    tasks = tuple(Task.of(name) for name in found.config.data.mix)
    jobs = evaluate.plan(shards, tasks, found.config.evaluate.sets if shards_address is None else None)
    if not jobs:
        raise Fault(f"{shards.store.where()} holds no evaluation images for {', '.join(t.name for t in tasks)}.")
    ranks = Ranks(device=found.config.train.device)
    model = network(found).to(ranks.device)
    supply = feed.supply_of(found.config, shards, "evaluate", stop_asked=lambda: False)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):  # progress is no JSON
        scored = evaluate.evaluate(model, supply, jobs, ranks, found.config.evaluate.seed)
    if not ranks.is_main:
        return
    if as_json:
        said = {name: score.model_dump() for name, score in scored.scores.items()}
        print(json.dumps({"protocol": metrics.PROTOCOL, "round": found.round_, "scores": said}, indent=1))
        return
    print_score_table(f"{reference}, round {found.round_}", scored.scores)
    report.say(f"protocol: {metrics.PROTOCOL}")


def restore_files(images: list[Path], reference: str, out: Path) -> None:
    """Restore image files into PNG files of the same stem. Raises Fault, before any work, for files that are none."""
    import io

    import numpy as np
    from PIL import Image

    found = find(reference)
    stems = [path.stem for path in images]
    twice = sorted({s for s in stems if stems.count(s) > 1})
    if twice:
        raise Fault(f"two images are named '{twice[0]}': both would be written to {out / twice[0]}.png. Rename one.")
    missing = [str(path) for path in images if not path.is_file()]
    if missing:
        raise Fault(f"no image at {', '.join(missing[:5])}. Give paths of image files.")
    pictures = [_picture(path) for path in images]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, folder = network(found).to(device), Folder(out)
    with report.bar("restoring", len(images)) as advance:
        for number, (path, picture) in enumerate(zip(images, pictures, strict=True)):
            restored = evaluate.restore(model, picture, device)
            data = io.BytesIO()
            Image.fromarray(np.round(restored * 255).astype(np.uint8)).save(data, "PNG")
            folder.put(f"{path.stem}.png", data.getvalue())
            advance(number + 1, path.name)
    report.say(f"{len(images)} restored by round {found.round_} into {out}")


def _picture(path: Path) -> Pixels:
    """The pixels of an image file. Raises Fault for one whose 8-bit RGB would be a guess."""
    try:
        return decode(path.read_bytes())
    except Refused as reason:
        raise Fault(f"{path} {reason}. Give a PNG, JPEG or BMP file of 8 bits per channel.") from None


def import_official(file: Path, model: str, out: Path) -> None:
    """An official checkpoint to safetensors under our names; says what was dropped."""
    converted = models.from_official(model, _load_tensors(file))
    Folder(out.parent).put(out.name, pack_tensors(converted.weights))
    count = sum(t.numel() for t in converted.weights.values())
    report.say(f"{out}: {len(converted.weights)} tensors, {count:,} weights")
    for text in converted.dropped:
        report.say(f"dropped (never used by the network): {text}")


# What torch's restricted unpickler raises for bytes that are no checkpoint: it trips over whatever comes first.
_NO_CHECKPOINT = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError)


def _load_tensors(file: Path) -> dict[str, Any]:
    """What a checkpoint file holds, read without running code from it. Raises Fault for any other file."""
    import pickle

    import safetensors.torch

    try:
        if file.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(file))
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return found
    except FileNotFoundError:
        raise Fault(f"no file at {file}. Give the path of an official checkpoint.") from None
    except pickle.UnpicklingError:  # torch's own text would advise to run the code
        raise Fault(
            f"{file} holds more than tensors and plain values, which only code from the file could read; none was run. "
            "Save its state dict alone, where you trust the file."
        ) from None
    except (*_NO_CHECKPOINT, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise Fault(
            f"{file} is not a checkpoint that can be read ({type(error).__name__}: {reason}). Get the file again."
        ) from None
