"""The commands. Each checks what it was given, calls one story, and prints what came out.

Exit codes: 0 done, 1 failed, 2 the user's mistake (one clear line), 75 stopped early and resumable.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mirl_dist import __version__
from mirl_dist.cli import sweep_command, tickets
from mirl_dist.cli.tickets import Json, TicketArgument, Tile
from mirl_dist.distributed.launch.control import ControlChannel
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.distributed.signals import RESUMABLE, StopSignal
from mirl_dist.errors import MirlError, Stopped, UserError
from mirl_dist.observability.console import rank_label, say, warn

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find winning tickets in all-in-one image restoration networks, on any number of GPUs.",
)
shards_app = typer.Typer(no_args_is_help=True, help="Build and check WebDataset shards.")
track_app = typer.Typer(no_args_is_help=True, help="What MLflow is to hear of a run.")
app.add_typer(shards_app, name="shards")
app.add_typer(tickets.app, name="tickets")
app.add_typer(track_app, name="track")

Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value, read as YAML; may be repeated.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes of each rank; default: one per processor.")]


def main() -> None:
    """Run a command; a UserError becomes one line on standard error."""
    rank = os.environ.get("RANK", "0")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost rank costs a page of C++ frames
    if "RANK" in os.environ:
        sys.excepthook = _show_and_leave
        _leave_if_said_already()
    try:
        app()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        _leave(code, final=code == 2)
    except MirlError as fault:
        if rank == "0" or not fault.everywhere:
            who = "mirl-dist" if fault.everywhere or "RANK" not in os.environ else f"mirl-dist, {rank_label()}"
            more = " Go on with --resume auto." if fault.resumable and "train" in sys.argv[1:2] else ""
            warn(f"{who}: {fault}{more}", "fault")
        _leave(RESUMABLE if fault.resumable else 2, final=True)
    except Stopped as stopped:
        if rank == "0":
            warn(f"mirl-dist: {stopped}. Go on with --resume auto.")
        _leave(RESUMABLE, final=True)
    except RuntimeError as error:
        from mirl_dist.distributed.process_group import is_peer_loss

        if not is_peer_loss(error):
            raise
        warn(f"mirl-dist, {rank_label()}: another rank has gone ({str(error).splitlines()[0][:120]})")
        ControlChannel.of_worker().wait_before_exit()
        _leave(1)


def _leave(code: int, *, final: bool = False) -> None:
    """Exit; final: a launcher that starts the ranks again would not mend it.

    A process goes at once: other ranks may be gone already, torch's process group (gloo, torch 2.13) can wait for
    itself for ever while Python takes it apart, and so can a thread for a store that is away.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if final and "RANK" in os.environ:
        ControlChannel.of_worker().report_exit(code)
    os._exit(code)


def _leave_if_said_already() -> None:
    """An elastic launcher starts its ranks again whatever ended them: those that have had their last word leave."""
    code = ControlChannel.of_worker().exit_code()
    if code is not None:
        os._exit(code)


def _show_and_leave(*error: Any) -> None:
    """What an unforeseen error of a rank does: its traceback, then code 1."""
    sys.__excepthook__(*error)
    _leave(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mirl_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, for example configs/demo.yaml.")],
    sets: Sets = None,
    resume: Annotated[str, typer.Option(help="auto, never or must.")] = "auto",
    launch: Annotated[
        str | None, typer.Option(help="A file from launch/, or 'auto': all GPUs, or two CPU processes.")
    ] = None,
) -> None:
    """Train a run: rounds of train, evaluate, prune and rewind, each of which becomes a ticket.

    Under `accelerate launch` this is one rank; with --launch it starts the ranks itself.
    """
    stop_asked, slip = StopSignal(), ControlChannel.of_worker()
    stop_asked.sources += [slip.stop_requested, lambda: slip.leave_if_orphaned(stop_asked)]
    stop_asked.on_user_signal, stop_asked.is_cleanup = slip.request_stop, slip.another_failed
    stop_asked.listen()  # before what takes seconds to import

    from mirl_dist.config import config as configs
    from mirl_dist.observability import rank_log
    from mirl_dist.storage.configured import options_of
    from mirl_dist.tickets.open import open_ticket
    from mirl_dist.training import run as assemble

    if resume not in ("auto", "never", "must"):
        raise UserError(f"--resume: found '{resume}'. Use auto, never or must.", everywhere=True)
    try:
        tree = configs.read(config, sets or [])
    except UserError as fault:
        raise UserError(str(fault), everywhere=True) from None
    if launch is not None:
        from mirl_dist.distributed.launch import launcher
        from mirl_dist.training import preflight

        file, options = launcher.choose(tree, launch)
        if options:
            _check_launch(file)
            preflight.preflight(tree, file.ranks, resume, open_ticket)
            launcher.launch(tree, file, options, ["train", str(config)], sets or [], resume, stop_asked.close)
            return
    again = slip.restart_notice()
    if again is not None and os.environ.get("RANK", "0") == "0":
        warn(f"mirl-dist: {again}")
    if resume == "never" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        resume = "auto"  # these ranks are started again, and find their own run
    rank_log.begin(tree, lambda: stop_asked.phase())
    address = assemble.run(tree, resume, stop_asked, open_ticket)
    if os.environ.get("RANK", "0") == "0":
        from mirl_dist.cli import show

        with contextlib.suppress(OSError):  # of the terminal: the run itself has ended well
            show.print_tickets(tree.run.folder, as_json=False, options=options_of(tree.store))
        if address:
            say(f"MLflow: {address}")


def _check_launch(file: LaunchFile) -> None:
    """Raise UserError where this machine lacks what a launch file asks for."""
    from mirl_dist.cli.doctor import machine
    from mirl_dist.distributed.engines import requirements

    try:
        requirements.require(file.engine)
    except LookupError as error:
        raise UserError(f"{file.path}: {error}") from None
    if file.nodes == 1:
        for finding in machine.port(file):
            if finding.kind == "FAULT":
                raise UserError(f"{file.path}: main_process_port: {finding.text}")


app.command("sweep")(sweep_command.sweep)


@app.command()
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


@app.command()
def status(run: Annotated[str, typer.Argument(help="Run folder.")], as_json: Json = False) -> None:
    """Say where a run stands: its round, its step, its last commit, who writes it, what MLflow has not heard."""
    from mirl_dist.cli import show

    show.print_status(run, as_json)


@app.command()
def evaluate(
    ticket: TicketArgument,
    shards: Annotated[
        str | None,
        typer.Option(help="Built shards, a folder or URL; default: the run's. A ticket file needs it."),
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help="How to score (docs/protocols.md); may be repeated. Default: the run's.")
    ] = None,
    tile: Tile = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    compiled: Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile.")] = None,
    table: Annotated[Path | None, typer.Option(help="A CSV file to write: the scores of each image.")] = None,
    as_json: Json = False,
) -> None:
    """Score a ticket: PSNR and SSIM per task and set. Under `accelerate launch` all ranks share the images."""
    from mirl_dist.cli.evaluate import EvalOptions, print_scores

    print_scores(ticket, shards, EvalOptions(protocol, tile, precision, compiled), table, as_json)


@app.command()
def restore(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    ticket: Annotated[str, typer.Option(help="Run folder, run folder/rounds/NN, or a ticket file.")],
    out: Annotated[Path, typer.Option(help="Folder for the restored PNG files.")],
    tile: Tile = None,
) -> None:
    """Restore images with a ticket's network."""
    from mirl_dist.cli.evaluate import restore_files

    restore_files(images, ticket, out, tile)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Official checkpoint (.ckpt, .pth, .pt or .safetensors).")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    model: Annotated[str, typer.Option(help="Network name.")] = "promptir",
) -> None:
    """Convert an official checkpoint of the published size to this project's weights."""
    from mirl_dist.tickets import transfer

    transfer.import_official(file, model, out)


@shards_app.command("build")
def shards_build(
    recipe: Annotated[Path, typer.Argument(help="YAML file, for example shards/demo.yaml.")],
    out: Annotated[str, typer.Option(help="Where the shards go: a folder, or s3://bucket/prefix.")],
    workers: Workers = None,
    sets: Sets = None,
) -> None:
    """Turn folders of images into WebDataset shards of whole images and pairs, with a manifest.

    Under `accelerate launch` or torchrun all ranks share the work.
    """
    from mirl_dist.data.building import contact_sheet
    from mirl_dist.data.building.build import build
    from mirl_dist.data.building.recipe import read
    from mirl_dist.data.parallel import SINGLE_PROCESS, WorkerGroup
    from mirl_dist.distributed.hardware import processes
    from mirl_dist.observability import progress as report
    from mirl_dist.storage import open_store

    StopSignal().listen()  # what is built stays; the next build goes on from there
    ranks = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from mirl_dist.distributed.ranks import Ranks

        ranks = Ranks(device="cpu")
    crew: WorkerGroup = ranks or SINGLE_PROCESS
    # Rank 0 alone reads what the user gave: files and settings may differ from node to node.
    tree, store = crew.on_main(lambda: (read(recipe, sets or []), open_store(out)))
    with report.Bars() as bars:
        progress = bars if crew.rank == 0 else lambda done, total, what: None
        manifest = build(tree, store, workers or processes(), progress, crew)
    skipped = [f"skipped: {text}" for text in manifest.skipped]
    crew.on_main(lambda: report.say("\n".join([*skipped, *contact_sheet.lines(store, manifest)])))
    if ranks is not None:
        ranks.close()


@shards_app.command("check")
def shards_check(
    shards: Annotated[str, typer.Argument(help="Built shards: a folder, s3:// or https://.")],
    workers: Workers = None,
) -> None:
    """Hold every shard against its manifest: sizes, digests, counts, and whether every image decodes."""
    from mirl_dist.data.building.check import check
    from mirl_dist.distributed.hardware import processes
    from mirl_dist.observability import progress as report
    from mirl_dist.storage import open_store

    store = open_store(shards)
    with report.Bars() as progress:
        faults = check(store, workers or processes(), progress)
    if faults:
        raise UserError(f"{len(faults)} faults in {store.where()}:\n" + "\n".join(f"  {fault}" for fault in faults))
    report.say(f"{store.where()}: whole")


@track_app.command("resend")
def track_resend(run: Annotated[str, typer.Argument(help="Run folder, or s3://bucket/prefix.")]) -> None:
    """Send MLflow what a run that has ended could not send."""
    from mirl_dist.cli import show

    show.resend(run)
