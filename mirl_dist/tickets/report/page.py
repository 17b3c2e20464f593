"""A self-contained HTML page that compares tickets, with tables, charts and images embedded.

Markup and captions are in templates/tickets.html.j2, which escapes every value. This module computes the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment

from mirl_dist.errors import UserError
from mirl_dist.tickets.compare import caveats, judge, published, statistics
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.compare.judge import Judgement
from mirl_dist.tickets.compare.published import PublishedMatch
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report import latex, page_figures, page_gallery, text_tables
from mirl_dist.tickets.report.chart_style import assign_styles, swatch
from mirl_dist.tickets.report.environment import make_environment
from mirl_dist.tickets.report.page_figures import data_uri, embed


class ScoreTable(NamedTuple):
    """Contents of a score table.

    matches: published results by (method, round). cited: 'task/set' -> source of its published results. last: method ->
    its last round. best: (measure, 'task/set') -> highest mean of a ticket.
    """

    groups: Sequence[Group]
    matches: Mapping[tuple[str, int], PublishedMatch]
    cited: Mapping[str, str]
    last: Mapping[str, int]
    best: Mapping[tuple[str, str], float | None]


class Download(NamedTuple):
    """A file embedded in the page. source: its content as a data URI."""

    name: str
    title: str
    source: str


def html(entries: Sequence[Entry], title: str, made: str) -> str:
    """Return the page as text. made: creation time, for the footer.

    Raises UserError without tickets, and as `statistics.group_entries` for tickets that are not comparable.
    """
    if not entries:
        raise UserError("found no ticket to compare, where a page is made. Name runs that have finished a round.")
    entries = [s._replace(run=_printable(s.run), method=_printable(s.method)) for s in entries]
    groups, names = statistics.group_entries(entries), statistics.task_names(entries)
    styles = assign_styles(group.method for group in groups)
    protocols = dict.fromkeys(protocol for s in entries for protocol in s.ticket.also)
    values = {
        "title": _printable(title),
        "made": made,
        "entries": entries,
        "names": names,
        "runs": _tickets_by_run(entries),
        "methods": list(dict.fromkeys(s.method for s in entries if s.method != DENSE)),
        "seeds": sorted({s.seed for s in entries}),
        "dense": any(s.method == DENSE for s in entries),
        "masked": sum(s.mask is not None for s in entries if s.method != DENSE),
        "protocols": _protocol_texts(entries),
        "caveats": caveats.list_caveats(entries),
        "scores": _score_table(groups, names, published.match_groups(groups, names)),
        "other_scores": {p: _score_table(statistics.group_entries(entries, p), names, []) for p in protocols},
        "figures": page_figures.draw(groups, names, styles),
        "gallery": page_gallery.gallery(groups),
        "downloads": _downloads(entries, bool(names)),
        "swatch": lambda method: embed(swatch(method, styles[method]), "") if method in styles else "",
    }
    values |= _judged(judge.judge(entries))
    return _environment().get_template("tickets.html.j2").render(values)


@cache
def _environment() -> Environment:
    environment = make_environment(autoescape=True)
    environment.filters |= {
        "thousands": "{:,.0f}".format,
        "percent": "{:.1%}".format,
        "signed": _signed,
        "short": lambda digest: digest[:12],
        "ranges": _range_of_rounds,
        "versions": lambda versions: ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    }
    environment.globals |= {
        "isfinite": math.isfinite,
        "good": (judge.YES, judge.WINNING, judge.BEATS),
        "bad": (judge.NO, judge.LOSES),
        "published_title": published.TITLE,
        "max_curves": page_figures.MAX_CURVES,
    }
    return environment


def _signed(value: float, form: str) -> str:
    """Format a number with its sign and a true minus sign (U+2212); '0' if it rounds to an integer zero."""
    text = f"{value:+{form}}".replace("-", "−")
    return "0" if text in ("+0", "−0") else text


def _range_of_rounds(rounds: Sequence[int]) -> str:
    known = sorted(set(rounds))
    whole = known == list(range(known[0], known[-1] + 1))
    return f"{known[0]}–{known[-1]}" if whole and len(known) > 2 else ", ".join(map(str, known))


def _printable(name: str) -> str:
    """Replace unprintable characters (control characters, lone surrogates) in a user's name with U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def _tickets_by_run(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    runs: dict[str, list[Entry]] = {}
    for s in entries:
        runs.setdefault(s.run, []).append(s)
    return {run: sorted(tickets, key=lambda s: s.ticket.round) for run, tickets in runs.items()}


def _protocol_texts(entries: Sequence[Entry]) -> dict[str, str]:
    """Return protocol name -> text, the headline protocol first."""
    texts: dict[str, str] = {}
    for s in entries:
        texts |= {statistics.headline_protocol(s.ticket): s.ticket.protocol} | s.ticket.protocols
    return texts


def _score_table(groups: Sequence[Group], names: Sequence[str], matches: Sequence[PublishedMatch]) -> ScoreTable:
    figures = {name: m.figures[name] for m in matches for name in names if name in m.figures}
    return ScoreTable(
        groups,
        {(m.group.method, m.group.round_): m for m in matches},
        {name: f"{figure.dataset}, {figure.table}" for name, figure in figures.items()},
        {group.method: group.round_ for group in groups},
        {(measure, name): _best_mean(groups, measure, name) for measure in ("psnr", "ssim") for name in names},
    )


def _best_mean(groups: Sequence[Group], measure: str, name: str) -> float | None:
    """Return the highest mean of a column, excluding dense networks and controls; None without one."""
    column = [getattr(group, measure).get(name) for group in groups if not (group.dense or group.control)]
    return max((s.mean for s in column if s is not None and math.isfinite(s.mean)), default=None)


def _judged(judgements: Sequence[Judgement]) -> dict[str, Any]:
    run = {c.kind for j in judgements for c in j.controls if c.verdict != judge.NOT_RUN}
    return {
        "judgements": judgements,
        "judged_names": list(dict.fromkeys(name for j in judgements for name in j.answers)),
        "last_judged": {j.method: j.round_ for j in judgements},
        "kinds": [kind for kind in judge.CONTROLS if kind in run],
        "not_run": [kind for kind in judge.CONTROLS if kind not in run],
    }


def _downloads(entries: Sequence[Entry], scored: bool) -> list[Download]:
    table = data_uri(text_tables.csv(entries), "text/csv;charset=utf-8")
    files = [Download("tickets.csv", "All numbers (CSV)", table)]
    if scored:
        tex = data_uri(latex.tables(entries).encode(), "text/plain;charset=utf-8")
        files.append(Download("tables.tex", "Tables II and III (LaTeX)", tex))
    return files
