"""The command `mirl-dist train`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mirl_dist.cli import Sets
from mirl_dist.distributed import environment
from mirl_dist.distributed.launch.control import ControlChannel
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import UserError
from mirl_dist.observability.console import say, warn

if TYPE_CHECKING:
    from mirl_dist.config.config import Config


def train(
    config: Annotated[Path, Argument(help="YAML file, for example configs/demo.yaml.")],
    sets: Sets = None,
    resume: Annotated[str, Option(help="auto, never or must.")] = "auto",
    launch: Annotated[
        str | None, Option(help="A file from launch/, or 'auto': all GPUs, or two CPU processes.")
    ] = None,
) -> None:
    """Train a run: rounds of train, evaluate, prune and rewind, each of which becomes a ticket.

    Under `accelerate launch` this is one rank; with --launch it starts the ranks itself.
    """
    control, stop = listen(launch)
    from mirl_dist.config import config as configs

    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume: found '{resume}'. Use auto, never or must.", everywhere=True)
    try:
        tree = configs.read(config, sets or [])
    except UserError as fault:
        raise UserError(str(fault), everywhere=True) from None
    command = ["train", str(config), "--resume", "auto" if resume == "never" else resume, *set_options(sets)]
    if launch is None or not start_ranks(tree, launch, command, resume, stop):
        _train_rank(tree, resume, stop, control)


def listen(launch: str | None) -> tuple[ControlChannel, StopSignal]:
    """Check the environment of a command that has --launch, and listen to signals and the launcher.

    Call this first, because the imports of such a command take seconds.
    """
    if launch is not None and (ignored := environment.clear_for_launch(os.environ)):
        warn(f"mirl-dist: --launch ignores {', '.join(ignored)} in the environment: the launch file and config decide.")
    if launch is None:
        environment.check_rank(os.environ)
    control, stop = ControlChannel.of_worker(), StopSignal()
    stop.sources += [control.stop_requested, lambda: control.leave_if_orphaned(stop)]
    stop.on_user_signal, stop.is_cleanup = control.request_stop, control.another_failed
    stop.listen()
    return control, stop


def set_options(sets: Sequence[str] | None) -> list[str]:
    """Return the --set options of a command line."""
    return [word for assignment in sets or [] for word in ("--set", assignment)]


def start_ranks(config: Config, launch: str, command: Sequence[str], resume: str, stop: StopSignal) -> bool:
    """Start the ranks for --launch and wait until they end; return False if this process alone should work.

    command: of one rank. Restarted ranks find their own run, so its --resume is not 'never'; `resume` is the user's.
    """
    from mirl_dist.cli.doctor import machine
    from mirl_dist.distributed import hardware
    from mirl_dist.distributed.launch import launcher
    from mirl_dist.tickets.open import open_ticket
    from mirl_dist.training import preflight

    file, options = launcher.choose(config, launch)
    if not options:
        return False
    if config.train.device == "cuda" and not hardware.gpus():
        raise UserError(hardware.choose_device("cuda").fault)
    findings = [("", machine.check_engine(file))]
    if file.nodes == 1:
        findings += [("main_process_port: ", finding) for finding in machine.check_port(file)]
    for key, finding in findings:
        if finding.kind == "FAULT":
            raise UserError(f"{file.path}: {key}{finding.text}")
    preflight.preflight(config, file.ranks, resume, open_ticket)
    stop.close()
    launcher.launch(config, file, options, command)
    return True


def _train_rank(config: Config, resume: str, stop: StopSignal, control: ControlChannel) -> None:
    """Train as one rank of a run; rank 0 prints its tickets at the end."""
    from mirl_dist.observability import rank_log
    from mirl_dist.storage.configured import options_of
    from mirl_dist.tickets.open import open_ticket
    from mirl_dist.training.run import run

    is_main = os.environ.get("RANK", "0") == "0"
    notice = control.restart_notice()
    if notice is not None and is_main:
        warn(f"mirl-dist: {notice}")
    if resume == "never" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        resume = "auto"  # an elastic restart must resume its own run
    rank_log.begin(config, lambda: stop.phase())
    address = run(config, resume, stop, open_ticket)
    if is_main:
        from mirl_dist.cli import show

        with contextlib.suppress(OSError):  # terminal errors do not fail a finished run
            show.print_tickets(config.run.folder, as_json=False, options=options_of(config.store))
        if address:
            say(f"MLflow: {address}")
