"""Compares tickets: on the terminal, as CSV and LaTeX, as an HTML page, and in MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from mirl_dist.observability import progress
from mirl_dist.observability.console import warn
from mirl_dist.observability.mlflow import reader
from mirl_dist.storage import Folder, output_paths
from mirl_dist.tickets import collect
from mirl_dist.tickets.compare import caveats, statistics
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.report import latex, page, text_tables

CSV, LATEX, PAGE, PUBLISHED = "tickets.csv", "tickets.tex", "tickets.html", "published.csv"


def compare(
    references: Sequence[str],
    out: Path | None,
    as_json: bool,
    title: str,
    to_mlflow: str | None,
    uri: str | None,
    pictures: bool,
) -> None:
    """Print a comparison of tickets, and write and log its files.

    out: folder for the files. to_mlflow: MLflow experiment to which they are also logged. pictures: show restored
    images on the page. as_json: print a list of tickets on standard output, and notes on standard error.
    """
    output_paths.check_folder(out)
    entries = collect.gather(references, uri)
    statistics.check_comparable(entries)
    if not pictures:
        entries = [one._replace(strip=None) for one in entries]
    say = warn if as_json else progress.say  # standard output is reserved for JSON
    if as_json:
        print(json.dumps(_entries_as_rows(entries), indent=1))
    else:
        console = Console()
        for table in text_tables.tables(entries):
            console.print(table)
    for note in caveats.list_caveats(entries):
        say(f"note: {note}")
    if out is None and to_mlflow is None:
        return
    made_at = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    files = {
        CSV: text_tables.csv(entries),
        PUBLISHED: text_tables.published_csv(),
        LATEX: latex.tables(entries).encode(),
        PAGE: page.html(entries, title, made_at).encode(),
    }
    if out is not None:
        for name, data in files.items():
            Folder(out).put(name, data)
        say(f"wrote {', '.join(str(out / name) for name in files)}")
    if to_mlflow is not None:
        address = reader.log_report(uri, to_mlflow, title, files)
        say(f"MLflow: {address}")


def _entries_as_rows(entries: Sequence[Entry]) -> list[dict[str, object]]:
    return [
        {"run": one.run, "method": one.method, "seed": one.seed} | one.ticket.row() | {"method": one.method}
        for one in entries
    ]
