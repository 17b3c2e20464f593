"""The program `mirl-dist`: its commands, exit codes and error output.

Exit codes: 0 success, 1 failure, 2 user error (a short message), 75 stopped early and resumable.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from mirl_dist import __version__
from mirl_dist.cli import Json, Overwrite, Sets, TicketArgument, shards, tickets, train
from mirl_dist.cli.profile.profile import profile
from mirl_dist.distributed.launch.control import ControlChannel
from mirl_dist.distributed.signals import RESUMABLE, StopSignal
from mirl_dist.errors import MirlError, Stopped, UserError
from mirl_dist.observability.console import FAULT, rank_label, warn

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find winning tickets in all-in-one image restoration networks, on any number of GPUs.",
)
Device = Annotated[str | None, Option(help="auto, cpu or cuda. Default: the run's train.device.")]
Tile = Annotated[int | None, Option(help="Pixels of square tiles, for images too large for memory.")]
track_app = typer.Typer(no_args_is_help=True, help="Deliver a run's records to MLflow.")
app.add_typer(shards.app, name="shards")
app.add_typer(tickets.app, name="tickets")
app.add_typer(track_app, name="track")


def main() -> None:
    """Run a command; a UserError becomes one line on standard error."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank would print a page of C++ frames
    if "RANK" in os.environ:
        sys.excepthook = _leave_with_traceback
        if (code := ControlChannel.of_worker().exit_code()) is not None:
            os._exit(code)  # elastic launchers restart ranks that have reported their exit, too
    try:
        app()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        _leave(code, final=code == 2)
    except MirlError as fault:
        if _is_main() or not fault.everywhere:
            who = "mirl-dist" if fault.everywhere or "RANK" not in os.environ else f"mirl-dist, {rank_label()}"
            more = " Go on with --resume auto." if fault.resumable and "train" in sys.argv[1:2] else ""
            warn(f"{who}: {fault}{more}", FAULT)
        _leave(RESUMABLE if fault.resumable else 2, final=True)
    except Stopped as stopped:
        if _is_main():
            warn(f"mirl-dist: {stopped}.{' Go on with --resume auto.' if 'train' in sys.argv[1:2] else ''}")
        _leave(RESUMABLE, final=True)
    except RuntimeError as error:
        _leave_for(error)


def _leave_for(error: RuntimeError) -> None:
    """Report in one line an error of a device or of another process, and exit; raise any other error again."""
    from mirl_dist.data.parallel import loader_fault
    from mirl_dist.distributed import device_errors
    from mirl_dist.distributed.process_group import is_peer_loss

    who = f"mirl-dist, {rank_label()}"
    if (dead_loader := loader_fault(error)) is not None:  # torch reports it in whatever the main thread does
        warn(f"{who}: {dead_loader}", FAULT)
        _leave(2, final=True)
    if device_errors.is_out_of_memory(error):
        warn(
            f"{who}: {device_errors.describe_out_of_memory(error)} End what else uses it, or take a larger one.", FAULT
        )
        _leave(2, final=True)
    if is_peer_loss(error):
        warn(f"{who}: another rank has exited ({str(error).splitlines()[0][:120]})")
        ControlChannel.of_worker().wait_before_exit()
        _leave(1)
    if (failure := device_errors.describe_gpu_failure(error)) is None:
        raise error
    warn(f"{who}: {failure}", FAULT)
    _leave(1)


def _is_main() -> bool:
    """Whether this process reports for all ranks: rank 0, or any process of a command that no launcher starts."""
    launched = sys.argv[1:2] in (["train"], ["evaluate"], ["profile"]) or sys.argv[1:3] == ["shards", "build"]
    return not launched or os.environ.get("RANK", "0") == "0"


def _leave(code: int, *, final: bool = False) -> None:
    """Exit immediately with `code`. final: restarting the ranks would not help, so the launcher is notified.

    A regular interpreter shutdown could hang: other ranks may have exited, destroying torch's process group (gloo,
    torch 2.13) can deadlock, and a thread may be waiting for an unavailable store.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if final and "RANK" in os.environ:
        ControlChannel.of_worker().report_exit(code)
    os._exit(code)


def _leave_with_traceback(*error: Any) -> None:
    """Print the traceback of an unexpected error of a rank, and exit with code 1."""
    sys.__excepthook__(*error)
    _leave(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mirl_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


app.command("train")(train.train)
app.command("profile")(profile)


@app.command()
def sweep(
    file: Annotated[Path, Argument(help="YAML file, for example configs/sweeps/demo.yaml.")],
    sets: Annotated[
        list[str] | None, Option("--set", help="key=value of the sweep itself, for example slots=2.")
    ] = None,
    show: Annotated[bool, Option("--print", "--dry-run", help="Print the command of each run, a line each.")] = False,
    submit: Annotated[str | None, Option(help="'slurm': hand the runs over as a job array.")] = None,
    status: Annotated[bool, Option("--status", help="Print the progress of the runs.")] = False,
    compare: Annotated[bool, Option("--compare", help="Compare the runs that have finished.")] = False,
    as_json: Json = False,
) -> None:
    """Train methods x seeds, a few runs at a time, and compare them. The same command resumes a sweep.

    Exit codes: 0 all finished, 1 a run failed, 2 a mistake to put right, 75 asked to stop, 130 ended at once.
    """
    stop = StopSignal().listen()
    if sum((show, submit is not None, status, compare)) > 1:
        raise UserError("found several of --print, --submit, --status and --compare. Give one, or none to train.")
    if as_json and not status:
        raise UserError("found --json without --status. Remove it, or add --status.")
    if submit not in (None, "slurm"):
        raise UserError(f"--submit: found '{submit}'. There is slurm; for other schedulers take --print.")
    from mirl_dist.cli.sweep import spec

    plan = spec.read(file, sets or [])
    if show:
        print("\n".join(spec.command_line(plan, run) for run in plan.runs))
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


@app.command()
def doctor(
    config: Annotated[Path | None, Argument(help="Also say what this config means on 1, 2, 4, ... ranks.")] = None,
    sets: Sets = None,
    launch: Annotated[
        str | None, Option(help="A file from launch/, or 'auto': check this launch of the config, and plan it.")
    ] = None,
    gpu: Annotated[str | None, Option(help="With --launch: A40, A100-40, A100-80, H100 or H200.")] = None,
    rate: Annotated[float | None, Option(min=1e-6, help="With --launch: samples per second over all ranks.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine offers, and what is missing; with --launch: whether a launch would work, and its plan."""
    if launch is None and (gpu is not None or rate is not None or as_json):
        raise UserError("found --gpu, --rate or --json without --launch, which they belong to. Name a launch file.")
    if launch is not None and config is None:
        raise UserError("found --launch without a config. Name the config that is to be launched.")
    from mirl_dist.cli.doctor import doctor as doctors
    from mirl_dist.config import config as configs

    if launch is not None and config is not None:
        faults = doctors.print_launch(configs.read(config, sets or []), launch, gpu, rate, as_json)
    else:
        faults = doctors.print_machine()
        if config is not None:
            doctors.print_plan(configs.read(config, sets or []))
    if faults:
        raise typer.Exit(1)


@app.command()
def status(run: Annotated[str, Argument(help="Run folder.")], as_json: Json = False) -> None:
    """Show where a run stands: round, step, last commit, the launch that writes it, records pending for MLflow."""
    from mirl_dist.cli.status import print_status

    print_status(run, as_json)


@app.command()
def evaluate(
    ticket: TicketArgument,
    shards: Annotated[
        str | None,
        Option(help="Built shards, a folder or URL; default: the run's. A ticket file needs it."),
    ] = None,
    protocol: Annotated[
        list[str] | None, Option(help="How to score (docs/protocols.md); may be repeated. Default: the run's.")
    ] = None,
    tile: Tile = None,
    precision: Annotated[str | None, Option(help="fp32 or bf16.")] = None,
    compiled: Annotated[bool | None, Option("--compile/--no-compile", help="torch.compile.")] = None,
    device: Device = None,
    table: Annotated[Path | None, Option(help="A CSV file to write: the scores of each image.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score a ticket: PSNR and SSIM per task and set. Under `accelerate launch` all ranks share the images."""
    from mirl_dist.cli.evaluate import EvalOptions, print_scores

    options = EvalOptions(protocol, tile, precision, compiled, device)
    print_scores(ticket, shards, options, table=table, overwrite=overwrite, as_json=as_json)


@app.command()
def restore(
    images: Annotated[list[Path], Argument(help="Image files.")],
    ticket: Annotated[str, Option(help="Run folder, run folder/rounds/NN, or a ticket file.")],
    out: Annotated[Path, Option(help="Folder for the restored PNG files.")],
    tile: Annotated[
        str, Option(help="auto: square tiles for images too large for memory; none; or the tiles' side in pixels.")
    ] = "auto",
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Restore images with a ticket's network."""
    from mirl_dist.cli.restore import restore_files

    restore_files(images, ticket, out, tile, device, overwrite=overwrite)


@app.command("import")
def import_(
    file: Annotated[Path, Argument(help="Official checkpoint (.ckpt, .pth, .pt or .safetensors).")],
    out: Annotated[Path, Option(help="The safetensors file to write.")],
    model: Annotated[str, Option(help="Network name.")] = "promptir",
    overwrite: Overwrite = False,
) -> None:
    """Convert an official checkpoint of the published size to this project's weights."""
    from mirl_dist.tickets import transfer

    transfer.import_official(file, model, out, overwrite=overwrite)


@track_app.command("resend")
def track_resend(run: Annotated[str, Argument(help="Run folder, or s3://bucket/prefix.")]) -> None:
    """Send MLflow the records that a run left pending when it ended."""
    from mirl_dist.cli.status import resend

    resend(run)
