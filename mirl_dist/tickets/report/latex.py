"""LaTeX tables in the layout of MIR-L's Tables II and III: one per data set, published results in separate columns.

The template is templates/tables.tex.j2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mirl_dist.errors import UserError
from mirl_dist.tickets.compare import caveats, published, statistics
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.published import Published
from mirl_dist.tickets.compare.statistics import Group

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def escape(text: str) -> str:
    """Escape text for LaTeX; line breaks and control characters become spaces."""
    return "".join(_SPECIAL.get(c, c) if c.isprintable() else " " for c in text)


def tables(entries: Sequence[Entry]) -> str:
    """Return a floating table per data set and kind of task: a row per method and round, PSNR and SSIM per level.

    Among tickets, the best value is bold and the second best underlined, compared as printed; dense networks and
    controls are excluded. Published results are grey and slanted in separate columns, in our row of the closest
    density. Raises UserError as `statistics.group_entries`, and if no ticket has a score.
    """
    groups, names = statistics.group_entries(entries), statistics.task_names(entries)
    if not names:
        raise UserError(
            "no ticket here has a score, so there is nothing for a table. Compare tickets that were scored."
        )
    figures = {(m.group.method, m.group.round_): m.figures for m in published.match_groups(groups, names)}
    sets: dict[tuple[str, str], list[str]] = {}
    for name in names:
        task, _, set_ = name.partition("/")
        sets.setdefault((task.partition("_")[0], set_), []).append(name)

    def cited(names: Sequence[str]) -> list[Published]:
        return [figure for by_name in figures.values() for name, figure in by_name.items() if name in names]

    def best_values(group: Group, measure: str, name: str, digits: int) -> dict[str, str]:
        return {} if group.dense or group.control else _best_values(groups, measure, name, digits)

    return (
        _environment()
        .get_template("tables.tex.j2")
        .render(
            groups=groups,
            figures=figures,
            sets=sets,
            cited=cited,
            best_values=best_values,
            most_seeds=max(len(group.seeds) for group in groups),
            notes=[*caveats.list_caveats(entries), f"protocol: {entries[0].ticket.protocol}"],
        )
    )


def make_environment(**options: Any) -> Environment:
    """Return an environment for the templates of this folder, in which a missing value is an error."""
    loader = PackageLoader("mirl_dist.tickets.report")
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)


@cache
def _environment() -> Environment:
    marks = {"block": ("<%", "%>"), "variable": ("<<", ">>"), "comment": ("<#", "#>")}
    delimiters = {f"{what}_{at}_string": mark[at == "end"] for what, mark in marks.items() for at in ("start", "end")}
    environment = make_environment(keep_trailing_newline=True, **delimiters)
    environment.filters |= {"tex": escape, "level": _level, "network": lambda f: f"{f.method} {f.params}"}
    environment.globals |= {
        "dataset_of": published.dataset_of,
        "published_title": published.TITLE,
        "label": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()),
    }
    return environment


def _level(name: str) -> str:
    kind, _, level = name.partition("/")[0].partition("_")
    return rf"$\sigma={level}$" if kind == "denoise" and level.isdigit() else escape(level)


def _best_values(groups: Sequence[Group], measure: str, name: str, digits: int) -> dict[str, str]:
    """Return the best two values of a column, as printed -> LaTeX command; empty if there is only one value."""
    ranked = [getattr(group, measure) for group in groups if not (group.dense or group.control)]
    means = {round(column[name].mean, digits) for column in ranked if name in column}
    values = [f"{value:.{digits}f}" for value in sorted(means, reverse=True)] if len(means) > 1 else []
    return dict(zip(values, ("textbf", "underline"), strict=False))
