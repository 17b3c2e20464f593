"""The command `mirl-dist sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mirl_dist.cli.options import Json
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import UserError


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file, for example configs/sweeps/demo.yaml.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the sweep itself, for example slots=2.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--print", "--dry-run", help="Print the command of each run, a line each.")
    ] = False,
    submit: Annotated[str | None, typer.Option(help="'slurm': hand the runs over as a job array.")] = None,
    status: Annotated[bool, typer.Option("--status", help="Say where the runs stand.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Compare the runs that have finished.")] = False,
    as_json: Json = False,
) -> None:
    """Train methods x seeds, a few runs at a time, and compare them. The same command resumes a sweep.

    Exit codes: 0 all finished, 1 a run failed, 2 a mistake to put right, 75 asked to stop, 130 ended at once.
    """
    stop = StopSignal().listen()
    if sum((show, submit is not None, status, compare)) > 1:
        raise UserError(
            "found several of --print, --submit, --status and --compare. Give one of them, or none to train."
        )
    if as_json and not status:
        raise UserError("found --json without --status. Remove it, or add --status.")
    if submit not in (None, "slurm"):
        raise UserError(f"--submit: found '{submit}'. There is slurm; for other schedulers take --print.")

    from mirl_dist.cli.sweep import spec

    plan = spec.read(file, sets or [])
    if show:
        for run in plan.runs:
            print(spec.command_line(plan, run))
        return

    from mirl_dist.cli.sweep import sweep as sweeps

    if status:
        sweeps.print_status(plan, as_json)
    elif compare:
        sweeps.compare_finished(plan, str(file))
    elif submit is not None:
        sweeps.submit(plan, str(file))
    else:
        raise typer.Exit(sweeps.run(plan, str(file), stop.close))
