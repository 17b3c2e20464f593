"""The command `mirl-dist profile`: starts the ranks like `train`, and shows where the time of their steps goes."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mirl_dist.cli import Overwrite, Sets, train
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import UserError

if TYPE_CHECKING:
    from mirl_dist.config.config import Config


def profile(
    config: Annotated[Path, Argument(help="YAML file, for example configs/demo.yaml.")],
    sets: Sets = None,
    steps: Annotated[int, Option(min=1, help="Training steps to measure, after a warm-up.")] = 10,
    launch: Annotated[
        str | None, Option(help="A file from launch/, or 'auto': all GPUs, or two CPU processes.")
    ] = None,
    out: Annotated[Path | None, Option(help="A JSON file to write: all numbers.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a few steps of a run, and show where their time goes. Leaves the run's folder and MLflow alone.

    Under `accelerate launch` this is one rank; with --launch it starts the ranks itself.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would print when it starts and stops
    _, stop = train.listen(launch)
    from mirl_dist.config import config as configs
    from mirl_dist.storage import output_paths

    try:
        tree = configs.read(config, sets or [])
        if os.environ.get("RANK", "0") == "0":
            output_paths.check_file(out, overwrite=overwrite, reads=[config, tree.data.shards])
    except UserError as fault:
        raise UserError(str(fault), everywhere=True) from None
    own = _apart_from_the_run(tree)
    command = ["profile", str(config), "--steps", str(steps), *train.set_options(sets)]
    command += [] if out is None else ["--out", str(out), "--overwrite"]  # checked above, before any rank starts
    if launch is None or not train.start_ranks(own, launch, command, "never", stop):
        _profile_rank(own, stop, steps, out)


def _apart_from_the_run(config: Config) -> Config:
    """Return the config with a run folder that does not exist, without MLflow and without restarts of ranks."""
    folder = f"{tempfile.gettempdir()}/mirl-dist-profile-{uuid.uuid4().hex}"
    sections: dict[str, Any] = {
        "run": config.run.model_copy(update={"folder": folder}),
        "tracking": config.tracking.model_copy(update={"enabled": False}),
        "ranks": config.ranks.model_copy(update={"restarts": 0}),
    }
    return config.model_copy(update=sections)


def _profile_rank(config: Config, stop: StopSignal, steps: int, out: Path | None) -> None:
    """Measure as one rank; rank 0 prints the tables and writes the file."""
    from mirl_dist.cli.profile import measure, tables
    from mirl_dist.observability.progress import say
    from mirl_dist.storage import Folder
    from mirl_dist.tickets.open import open_ticket
    from mirl_dist.training import preflight, run

    ranks = run.join_ranks(config, stop)
    plan = preflight.preflight_on_ranks(config, "never", ranks, open_ticket)
    stop.graceful = True  # from here on the loop ends after a step
    with tempfile.TemporaryDirectory(prefix="mirl-dist-profile-") as folder:
        times = measure.profile_steps(plan, ranks, stop, open_ticket, steps, Path(folder))
    engine = ranks.network.spec.name
    if ranks.is_main:
        tables.print_profile(plan, engine, times, steps)
        if out is not None:
            Folder(out.parent).put(out.name, tables.profile_as_json(plan, engine, times, steps))
            say(f"all numbers: {out}")
    ranks.barrier()
    ranks.close()
