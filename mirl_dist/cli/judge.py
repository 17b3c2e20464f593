"""Is it a winning ticket? Definition 1 of MIR-L on runs of several seeds, and the controls that a reviewer asks for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from mirl_dist.errors import UserError
from mirl_dist.observability import progress
from mirl_dist.observability.console import warn
from mirl_dist.storage import open_store
from mirl_dist.tickets import collect
from mirl_dist.tickets.compare import judge, statistics
from mirl_dist.tickets.open import RunTicket, open_run_ticket, run_of
from mirl_dist.training.checkpoint import Checkpoints

KINDS = ("reinit", "random_layer", "random_global")


class ControlRun(NamedTuple):
    """One more training that a ticket is held against: its mask with other first values, or a random mask.

    parent: the ticket's digest; tree: the control's config.
    """

    kind: str
    folder: str
    parent: str
    tree: dict[str, Any]

    def finished(self) -> bool:
        """Whether it was trained. Raises UserError for a folder that holds a control of another ticket."""
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
    """Print the judgement of each run's round (its last, or the best that it chose); train: a launch file or 'auto',
    with which controls that are missing are trained first."""
    say = warn if as_json else progress.say  # what is said beside JSON is no JSON
    homes = [run_of(run) for run in runs]
    twice = next((home for home in homes if homes.count(home) > 1), None)
    if twice is not None:
        raise UserError(f"found {twice} twice. Judge one round of each run; call again for another round.")
    named = runs if round_ is None else [f"{home}/rounds/{round_:02d}" for home in homes]
    judged = dict(zip(homes, map(open_run_ticket, named), strict=True))
    controls = [control for home, found in judged.items() for control in controls_of(home, found)]
    for control in controls:
        if train is not None and not control.finished():
            say(f"training the control {control.folder}")
            _train(control, train, quiet=as_json)
    finished = [control for control in controls if control.finished()]
    wanted = [f"{home}/rounds/{found.round_:02d}" for home, found in judged.items()]
    dense = [f"{home}/rounds/00" for home, found in judged.items() if found.round_ != 0]
    names = list(dict.fromkeys([*dense, *wanted, *(control.folder for control in finished)]))
    shown = collect.gather(names)
    statistics.check_comparable(shown)
    chosen = named is runs and any(f.checkpoints.best() is not None for f in judged.values())
    judgements = judge.judge(shown, tolerance_db, chosen=chosen)
    notes = statistics.notes(shown)
    if any(found.config.rewinds_to() != "initial" for found in judged.values()) and finished:
        notes.append("controls begin from first values and train a whole round; these tickets did not begin there")
    missing = [control.folder for control in controls if control not in finished]
    if as_json:
        told = {"judgements": judge.to_json(judgements), "notes": notes, "controls_missing": missing}
        print(json.dumps(told, indent=1))
        return
    console = Console()
    for table in judge.tables(judgements):
        console.print(table)
    for note in notes:
        say(f"note: {note}")
    if missing:
        say(f"{len(missing)} controls were not trained ({missing[0]}, ...): --train auto, or a launch file, does that")


def controls_of(home: str, found: RunTicket) -> list[ControlRun]:
    """The controls of a round, inside its run's folder: the same data and training, one round, and another start."""
    if found.round_ == 0 or found.config.start.ticket is not None:
        return []
    made, parent = [], found.ticket().digest()
    for kind in KINDS:
        tree = found.config.dump()
        folder = f"{home}/controls/{found.round_:02d}-{kind}"
        tree["run"]["folder"] = folder
        tree["start"] = {"ticket": f"{home}/rounds/{found.round_:02d}", "kind": kind}
        tree["model"]["weights"] = None
        tree["prune"] |= {"style": "iterative", "rounds": 0, "target_sparsity": None, "finetune_lr": None}
        tree["rewind"] = {}
        tree["tracking"]["run_name"] = f"{home.rpartition('/')[2]}, {found.round_:02d}-{kind}"
        made.append(ControlRun(kind, folder, parent, tree))
    return made


def _train(control: ControlRun, launch: str, *, quiet: bool) -> None:
    """Train a control to its end. Raises UserError when it ends otherwise."""
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
