"""The command `mirl-dist doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mirl_dist.cli.options import Json, Sets
from mirl_dist.errors import UserError


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Also say what this config means on 1, 2, 4, ... ranks.")
    ] = None,
    sets: Sets = None,
    launch: Annotated[
        str | None, typer.Option(help="A file from launch/, or 'auto': check this launch of the config, and plan it.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="With --launch: A40, A100-40, A100-80, H100 or H200.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="With --launch: samples per second over all ranks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine offers, and what is missing; with --launch: whether a launch would work, and its plan."""
    if launch is None and (gpu is not None or rate is not None or as_json):
        raise UserError("found --gpu, --rate or --json without --launch, which they belong to. Name a launch file.")
    if launch is not None and config is None:
        raise UserError("found --launch without a config. Name the config that is to be launched.")
    from mirl_dist.cli.doctor import doctor as examine
    from mirl_dist.config import config as configs

    if launch is not None and config is not None:
        faults = examine.print_launch(configs.read(config, sets or []), launch, gpu, rate, as_json)
    else:
        faults = examine.print_machine()
        if config is not None:
            examine.print_plan(configs.read(config, sets or []))
    if faults:
        raise typer.Exit(1)
