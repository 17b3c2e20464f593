"""Shows tickets: the tickets of a run as a table, one ticket in detail, its image strip as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score
from mirl_dist.observability import progress
from mirl_dist.storage import Folder, Options, output_paths
from mirl_dist.tickets.runs import open_run

_DEFAULT_OPTIONS = Options()


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=Text(title, style="table.title"))  # Text: do not parse names as markup
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_tickets(run: str, as_json: bool, options: Options = _DEFAULT_OPTIONS) -> None:
    """Print one line per round: surviving weights, sparsity, PSNR and SSIM per task and set."""
    checkpoints, _ = open_run(run, options)
    tickets, best = checkpoints.tickets(), checkpoints.best()
    if as_json:
        print(json.dumps([t.row() | {"best": t.round == best} for t in tickets], indent=1))
        return
    if not tickets:
        progress.say(f"{run} has no finished round yet.")
        return
    names = list(tickets[0].scores)
    columns = ["round", "alive", "sparsity"] + [name.replace("/", "\n") for name in names]
    rows = []
    for t in tickets:
        cells = [f"{t.scores[n].psnr:.2f}\n{t.scores[n].ssim:.4f}" for n in names]
        rows.append([f"{t.round}{'*' * (t.round == best)}", f"{t.alive_total:,}", f"{t.total_sparsity:.1%}", *cells])
    inputs = [f"{score.degraded_psnr:.2f}\n{score.degraded_ssim:.4f}" for score in tickets[0].scores.values()]
    rows.append(["input", "", "", *inputs])
    _print_table(f"tickets of {run} (PSNR in dB over SSIM)", columns, rows)
    if best is not None:
        progress.say("* best by validation")


def print_ticket(reference: str, as_json: bool) -> None:
    """Print the counts, digests, scores and density per layer of one ticket."""
    from mirl_dist.tickets.open import open_ticket

    ticket = open_ticket(reference).ticket()
    if as_json:
        print(json.dumps(ticket.row() | {"layer_density": ticket.layer_density}, indent=1))
        return
    for name, value in ticket.row().items():
        if name not in ("scores", "also"):
            progress.say(f"{name:16} {in_words(value)}")
    print_score_table(reference, ticket.scores)
    for protocol, scores in ticket.also.items():
        print_score_table(f"{reference}, {protocol}", scores)
    rows = [[name, f"{value:.4f}"] for name, value in ticket.layer_density.items()]
    _print_table("density per layer", ["tensor", "alive share"], rows)


def write_pictures(reference: str, out: Path, *, overwrite: bool = False) -> None:
    """Write a ticket's strip of restored images as a PNG file."""
    from mirl_dist.tickets.open import FileTicket, open_ticket

    output_paths.check_file(out, overwrite=overwrite, reads=[reference])
    opened = open_ticket(reference)
    if isinstance(opened, FileTicket):
        raise UserError(f"found {reference}, a ticket file, which holds no pictures. Name its run, as RUN/rounds/NN.")
    strip = opened.checkpoints.pictures(opened.round_)
    if strip is None:
        raise UserError(f"{reference} drew no pictures: its shards have no evaluation sets. Build shards with some.")
    Folder(out.parent).put(out.name, strip)
    progress.say(f"degraded, restored and clean images of round {opened.round_}: {out}")


def print_score_table(title: str, scores: dict[str, Score]) -> None:
    """Print one line of scores per task and set."""
    rows = [
        [name, str(s.images), f"{s.psnr:.2f}", f"{s.ssim:.4f}", f"{s.degraded_psnr:.2f}", f"{s.degraded_ssim:.4f}"]
        for name, s in scores.items()
    ]
    _print_table(title, ["task/set", "images", "PSNR", "SSIM", "input PSNR", "input SSIM"], rows)


def in_words(value: Any) -> str:
    """Format a value as one line of text, with at most four digits; None is '-', and empty dict entries are omitted."""
    if isinstance(value, dict):
        return ", ".join(f"{in_words(key)} {in_words(one)}" for key, one in value.items() if one not in ("", None))
    if isinstance(value, str):  # it may come from damaged data: remove terminal control characters
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
