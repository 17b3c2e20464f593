"""The commands `mirl-dist tickets ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from mirl_dist.cli import Json, Overwrite, TicketArgument

app = typer.Typer(no_args_is_help=True, help="List, show, prove, ship, compare and judge tickets.")


@app.command("list")
def tickets_list(run: Annotated[str, Argument(help="Run folder.")], as_json: Json = False) -> None:
    """Print the tickets of a run, a line per round."""
    from mirl_dist.cli import show

    show.print_tickets(run, as_json)


@app.command("show")
def tickets_show(ticket: TicketArgument, as_json: Json = False) -> None:
    """Print one ticket: counts, digests, scores, density per layer."""
    from mirl_dist.cli import show

    show.print_ticket(ticket, as_json)


@app.command("pictures")
def tickets_pictures(
    ticket: Annotated[str, Argument(help="Run folder, or run folder/rounds/NN.")],
    out: Annotated[Path, Option(help="The PNG file to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a ticket's degraded, restored and clean images, a row per task."""
    from mirl_dist.cli import show

    show.write_pictures(ticket, out, overwrite=overwrite)


@app.command("pack")
def tickets_pack(
    ticket: Annotated[str, Argument(help="Run folder, or run folder/rounds/NN.")],
    out: Annotated[Path, Option(help="The file to write, for example mine.ticket.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a ticket as one file: mask, first and trained values, scores, config, digests."""
    from mirl_dist.tickets import transfer

    transfer.pack(ticket, out, overwrite=overwrite)


@app.command("verify")
def tickets_verify(
    ticket: TicketArgument,
    run: Annotated[str | None, Option(help="The run of a ticket file, to check its descent too.")] = None,
    as_json: Json = False,
) -> None:
    """Check a ticket by itself, and with its run that the mask follows from the parent's weights."""
    from mirl_dist.tickets import transfer

    transfer.verify(ticket, run, as_json)


@app.command("export")
def tickets_export(
    ticket: TicketArgument,
    out: Annotated[Path, Option(help="A .ckpt, .pth or .pt file for the official code, or .safetensors.")],
    compact: Annotated[bool, Option("--compact", help="A smaller file, which loads in the same way.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a ticket's trained weights as the official code loads them."""
    from mirl_dist.tickets import transfer

    transfer.export(ticket, out, compact=compact, overwrite=overwrite)


@app.command("compare")
def tickets_compare(
    tickets: Annotated[
        list[str],
        Argument(
            help="Runs, run folder/rounds/NN, ticket files, mlflow:RUN_ID or mlflow:experiment:NAME; several seeds of "
            "one method share a row."
        ),
    ],
    out: Annotated[Path | None, Option(help="A folder for the CSV, the LaTeX tables and the page.")] = None,
    title: Annotated[str, Option(help="Of the page, and of the run in MLflow.")] = "Tickets compared",
    experiment: Annotated[str | None, Option(help="Also log the files to this MLflow experiment.")] = None,
    uri: Annotated[str | None, Option(help="MLflow's address; default: MLFLOW_TRACKING_URI.")] = None,
    pictures: Annotated[bool, Option(help="Whether the page shows restored images.")] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare tickets: a table, and with --out a CSV, LaTeX tables and one self-contained HTML page."""
    from mirl_dist.cli import compare

    report = compare.Report(out, title, experiment, uri, pictures)
    compare.compare(tickets, report, overwrite=overwrite, as_json=as_json)


@app.command("judge")
def tickets_judge(
    runs: Annotated[list[str], Argument(help="Runs of one method, one for each seed.")],
    round_: Annotated[int | None, Option("--round", min=1, help="Default: the best chosen, else the last.")] = None,
    train: Annotated[
        str | None, Option(help="Train controls that are missing: a file from launch/, or 'auto'.")
    ] = None,
    tolerance: Annotated[float, Option(min=0, help="dB below dense that still count as equal.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Say whether tickets win: MIR-L's Definition 1 per task, over the seeds, and against controls."""
    from mirl_dist.cli import compare

    compare.judge_runs(runs, round_, train, tolerance, as_json)
