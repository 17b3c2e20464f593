"""Compares tickets, and judges whether they win: on the terminal, as CSV and LaTeX, as an HTML page, and in MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from mirl_dist.errors import UserError
from mirl_dist.observability import progress
from mirl_dist.observability.console import warn
from mirl_dist.observability.mlflow import reader
from mirl_dist.storage import Folder, open_store, output_paths
from mirl_dist.tickets import collect
from mirl_dist.tickets.compare import caveats, judge, statistics
from mirl_dist.tickets.open import RunTicket, open_run_ticket
from mirl_dist.tickets.report import latex, page, text_tables
from mirl_dist.tickets.runs import run_of
from mirl_dist.training.checkpointing.checkpoint import Checkpoints

CSV, LATEX, PAGE, PUBLISHED = "tickets.csv", "tickets.tex", "tickets.html", "published.csv"
CONTROL_KINDS = ("reinit", "random_layer", "random_global")


class Report(NamedTuple):
    """What a comparison writes. out: folder for the files. experiment: of MLflow, at `uri`, which gets them too."""

    out: Path | None
    title: str
    experiment: str | None
    uri: str | None
    pictures: bool


def compare(references: Sequence[str], report: Report, *, overwrite: bool, as_json: bool) -> None:
    """Print a comparison of tickets, and write and log its files.

    as_json: print a list of tickets on standard output, and notes on standard error.
    """
    out, title, to_mlflow, uri, pictures = report
    names = (CSV, LATEX, PAGE, PUBLISHED)
    output_paths.check_folder(out, names=names, overwrite=overwrite, reads=references)
    entries = collect.gather(references, uri)
    statistics.check_comparable(entries)
    if not pictures:
        entries = [one._replace(strip=None) for one in entries]
    say = warn if as_json else progress.say  # standard output is reserved for JSON
    if as_json:
        rows = [
            {"run": one.run, "method": one.method, "seed": one.seed} | one.ticket.row() | {"method": one.method}
            for one in entries
        ]
        print(json.dumps(rows, indent=1))
    else:
        _print_tables(text_tables.tables(entries))
    for note in caveats.list_caveats(entries):
        say(f"note: {note}")
    if out is None and to_mlflow is None:
        return
    made_at = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    files = {
        CSV: text_tables.csv(entries),
        PUBLISHED: text_tables.published_csv(),
        LATEX: latex.tables(entries).encode(),
        PAGE: page.html(entries, title, made_at).encode(),
    }
    if out is not None:
        for name, data in files.items():
            Folder(out).put(name, data)
        say(f"wrote {', '.join(str(out / name) for name in files)}")
    if to_mlflow is not None:
        say(f"MLflow: {reader.log_report(uri, to_mlflow, title, files)}")


def _print_tables(tables: Sequence[text_tables.TextTable]) -> None:
    for table in tables:
        Console().print(table)


# -- judgement --------------------------------------------------------------------------------------------------------


class ControlRun(NamedTuple):
    """A control run that a ticket is compared with: its mask with other initial weights, or a random mask.

    parent: the ticket's digest. tree: the control's config.
    """

    kind: str
    folder: str
    parent: str
    tree: dict[str, Any]

    def is_finished(self) -> bool:
        """Return whether it was trained. Raises UserError if its folder contains a control of another ticket."""
        checkpoints = Checkpoints(open_store(self.folder))
        if checkpoints.identity() is None:
            return False
        tickets = checkpoints.tickets()
        if tickets and tickets[0].parent != self.parent:
            raise UserError(
                f"{self.folder} holds a control of another ticket (the run was trained anew, or copied). Remove that "
                "folder; --train trains it again."
            )
        return bool(tickets)


def judge_runs(runs: Sequence[str], round_: int | None, train: str | None, tolerance_db: float, as_json: bool) -> None:
    """Print the judgement of a round of each run (by default the best if the run chose one, else the last).

    train: a launch file or 'auto', with which missing controls are trained first.
    """
    say = warn if as_json else progress.say  # standard output is reserved for JSON
    run_folders = [run_of(run) for run in runs]
    repeated = next((run_folder for run_folder in run_folders if run_folders.count(run_folder) > 1), None)
    if repeated is not None:
        raise UserError(f"found {repeated} twice. Judge one round of each run; call again for another round.")
    references = runs if round_ is None else [f"{run_folder}/rounds/{round_:02d}" for run_folder in run_folders]
    opened_runs = dict(zip(run_folders, map(open_run_ticket, references), strict=True))
    controls = [control for run_folder, opened in opened_runs.items() for control in controls_of(run_folder, opened)]
    for control in controls:
        if train is not None and not control.is_finished():
            say(f"training the control {control.folder}")
            _train_control(control, train, quiet=as_json)
    finished = [control for control in controls if control.is_finished()]
    wanted = [f"{run_folder}/rounds/{opened.round_:02d}" for run_folder, opened in opened_runs.items()]
    dense = [f"{run_folder}/rounds/00" for run_folder, opened in opened_runs.items() if opened.round_ != 0]
    names = list(dict.fromkeys([*dense, *wanted, *(control.folder for control in finished)]))
    entries = collect.gather(names)
    statistics.check_comparable(entries)
    chosen = references is runs and any(f.checkpoints.best() is not None for f in opened_runs.values())
    judgements = judge.judge(entries, tolerance_db, chosen=chosen)
    notes = caveats.list_caveats(entries)
    if any(opened.config.rewinds_to() != "initial" for opened in opened_runs.values()) and finished:
        notes.append("controls start from initial values and train a whole round; these tickets did not start there")
    missing = [control.folder for control in controls if control not in finished]
    if as_json:
        result = {"judgements": judge.to_json(judgements), "notes": notes, "controls_missing": missing}
        print(json.dumps(result, indent=1))
        return
    _print_tables(text_tables.judgement_tables(judgements))
    for note in notes:
        say(f"note: {note}")
    if missing:
        say(f"{len(missing)} controls were not trained ({missing[0]}, ...): --train auto, or a launch file, does that")


def controls_of(run_folder: str, opened: RunTicket) -> list[ControlRun]:
    """Return the controls of a round, in its run's folder: same data and training, one round, different start."""
    if opened.round_ == 0 or opened.config.start.ticket is not None:
        return []
    controls, parent = [], opened.ticket().digest()
    for kind in CONTROL_KINDS:
        tree = opened.config.dump()
        folder = f"{run_folder}/controls/{opened.round_:02d}-{kind}"
        tree["run"]["folder"] = folder
        tree["start"] = {"ticket": f"{run_folder}/rounds/{opened.round_:02d}", "kind": kind}
        tree["model"]["weights"] = None
        tree["prune"] |= {"style": "iterative", "rounds": 0, "target_sparsity": None, "finetune_lr": None}
        tree["rewind"] = {}
        tree["tracking"]["run_name"] = f"{run_folder.rpartition('/')[2]}, {opened.round_:02d}-{kind}"
        controls.append(ControlRun(kind, folder, parent, tree))
    return controls


def _train_control(control: ControlRun, launch: str, *, quiet: bool) -> None:
    """Train a control to completion. Raises UserError if it does not complete."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / f"{control.kind}.yaml"
        config.write_text(yaml.safe_dump(control.tree, sort_keys=False))
        command = [sys.executable, "-m", "mirl_dist", "train", str(config), "--launch", launch]
        code = subprocess.run(command, stdout=sys.stderr if quiet else None, check=False).returncode
    if code:
        raise UserError(
            f"the control {control.folder} ended with code {code}, as it said above. Call this again to go on.",
            resumable=code == 75,
        )
