"""Opens a run in any store (folder, s3://) to read its records. Needs no torch, unlike opening a ticket."""

from __future__ import annotations

import re
from pathlib import Path

from mirl_dist.config.config import Config, from_dump
from mirl_dist.errors import UserError
from mirl_dist.storage import Options, open_store
from mirl_dist.training.checkpointing.checkpoint import Checkpoints
from mirl_dist.training.ticket import Ticket

_DEFAULT_OPTIONS = Options()


def open_run(folder: str, options: Options = _DEFAULT_OPTIONS) -> tuple[Checkpoints, Config]:
    """Open a run for reading. options: override the environment's for its store. Raise UserError without a run."""
    if folder.startswith("mlflow:"):
        raise UserError(
            f"found {folder}, but only `tickets compare` reads MLflow. Name the run's folder, or a ticket file."
        )
    if is_file(folder):
        raise UserError(f"found {folder}, which is a file, where a run is needed. Name the folder of a run.")
    if folder.endswith(".ticket") and not Path(folder).exists():
        raise UserError(f"no file at {folder}. Give the path of a ticket file, or a run.")
    checkpoints = Checkpoints(open_store(folder, options))
    identity = checkpoints.identity()
    if identity is None:
        raise UserError(f"{folder} holds no run (no run.json). Give the run.folder of a config that was trained.")
    return checkpoints, from_dump(identity["config"], f"{folder}/run.json")


def is_file(reference: str) -> bool:
    """Whether a reference is a path of an existing file, which may or may not be a ticket file."""
    return "://" not in reference and Path(reference).is_file()


def run_of(reference: str) -> str:
    """Return the run of a reference `RUN` or `RUN/rounds/NN`."""
    return re.sub(r"/rounds/\d+/?$", "", reference).rstrip("/") or reference


def open_rounds(
    reference: str, options: Options = _DEFAULT_OPTIONS
) -> tuple[Checkpoints, Config, list[Ticket], int | None]:
    """Open the run of `RUN` or `RUN/rounds/NN`; return it with its tickets (one or more) and NN (None for `RUN`).

    Raises UserError without a run, a finished round, or round NN.
    """
    match = re.fullmatch(r"(.*?)/rounds/(\d+)/?", reference)
    checkpoints, config = open_run(match.group(1) if match else reference, options)
    tickets = checkpoints.tickets()
    if not tickets:
        raise UserError(f"{reference} has no finished round yet. `mirl-dist status` shows its progress.")
    asked = int(match.group(2)) if match else None
    if asked not in (None, *(t.round for t in tickets)):
        raise UserError(f"{reference} is not there; finished rounds are {', '.join(str(t.round) for t in tickets)}.")
    return checkpoints, config, tickets, asked
