"""A self-contained HTML page that compares tickets, with tables, charts and images embedded.

Markup and captions are in templates/tickets.html.j2, which escapes every value. This module computes the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment
from markupsafe import Markup, escape

from mirl_dist.errors import UserError
from mirl_dist.tickets.compare import caveats, judge, published, statistics
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.judge import Judgement
from mirl_dist.tickets.compare.published import PublishedMatch
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report import charts, latex, mask_charts, page_gallery, text_tables
from mirl_dist.tickets.report.charts import Style, assign_styles, swatch
from mirl_dist.tickets.report.page_gallery import data_uri

_Styles = Mapping[str, Style]
MAX_CURVES = 6
"""Maximum number of 'task/set' with curves, per method."""


class Chart(NamedTuple):
    """A chart. heading: title next to the swatch of `method`; empty if the SVG contains its title."""

    svg: Markup
    method: str = ""
    heading: str = ""


def html(entries: Sequence[Entry], title: str, made: str) -> str:
    """Return the page as text. made: creation time, for the footer.

    Raises UserError without tickets, and as `statistics.group_entries` for tickets that are not comparable.
    """
    if not entries:
        raise UserError("found no ticket to compare, where a page is made. Name runs that have finished a round.")
    entries = [s._replace(run=_printable(s.run), method=_printable(s.method)) for s in entries]
    groups, names = statistics.group_entries(entries), statistics.task_names(entries)
    styles = assign_styles(group.method for group in groups)
    by_round = sorted(entries, key=lambda s: s.ticket.round)
    other_protocols = dict.fromkeys(protocol for s in entries for protocol in s.ticket.also)
    protocols = [{statistics.headline_protocol(s.ticket): s.ticket.protocol} | s.ticket.protocols for s in entries]
    values = {
        "title": _printable(title),
        "made": made,
        "entries": entries,
        "names": names,
        "runs": {run: [s for s in by_round if s.run == run] for run in dict.fromkeys(s.run for s in entries)},
        "methods": list(dict.fromkeys(s.method for s in entries if not s.dense)),
        "seeds": sorted({s.seed for s in entries}),
        "dense": any(s.dense for s in entries),
        "masked": sum(s.mask is not None for s in entries if not s.dense),
        "protocols": {name: text for stated in protocols for name, text in stated.items()},
        "caveats": caveats.list_caveats(entries),
        "scores": _score_table(groups, names, published.match_groups(groups, names)),
        "other_scores": {p: _score_table(statistics.group_entries(entries, p), names, []) for p in other_protocols},
        "figures": _draw(groups, names, styles),
        "gallery": page_gallery.gallery(groups),
        "downloads": _downloads(entries, bool(names)),
        "swatch": lambda method: _embed(swatch(method, styles[method]), "") if method in styles else "",
    }
    values |= _judged(judge.judge(entries))
    return _environment().get_template("tickets.html.j2").render(values)


@cache
def _environment() -> Environment:
    environment = latex.make_environment(autoescape=True)
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
        "max_curves": MAX_CURVES,
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


def _score_table(groups: Sequence[Group], names: Sequence[str], matches: Sequence[PublishedMatch]) -> dict[str, Any]:
    """Return the contents of a score table.

    matches: published results by (method, round). cited: 'task/set' -> source of its published results. last: method ->
    its last round. best: (measure, 'task/set') -> highest mean of a ticket.
    """
    figures = {name: m.figures[name] for m in matches for name in names if name in m.figures}
    return {
        "groups": groups,
        "matches": {(m.group.method, m.group.round_): m for m in matches},
        "cited": {name: f"{figure.dataset}, {figure.table}" for name, figure in figures.items()},
        "last": {group.method: group.round_ for group in groups},
        "best": {(measure, n): _best_mean(groups, measure, n) for measure in ("psnr", "ssim") for n in names},
    }


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


def _downloads(entries: Sequence[Entry], scored: bool) -> list[tuple[str, str, str]]:
    """Return name, title and data URI of the files embedded in the page."""
    table = data_uri(text_tables.csv(entries), "text/csv;charset=utf-8")
    files = [("tickets.csv", "All numbers (CSV)", table)]
    if scored:
        tex = data_uri(latex.tables(entries).encode(), "text/plain;charset=utf-8")
        files.append(("tables.tex", "Tables II and III (LaTeX)", tex))
    return files


def _embed(svg: bytes, label: str) -> Markup:
    """Return an SVG as an inline element, so that it inherits the page's colours. label: for screen readers."""
    return Markup(svg.decode().replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def _draw(groups: Sequence[Group], names: Sequence[str], styles: _Styles) -> dict[str, Any]:
    """Return all charts of a page for its template. Lists are empty if the tickets lack the data.

    scores: 'PSNR' or 'SSIM' -> charts. curves: a list of charts per method. overlapping: number of tickets in the
    overlap grids.
    """
    last = charts.last_rounds(groups)
    known = [(group, s) for group in last if not group.dense and (s := _first_seed(group)).ticket.layer_density]
    named = mask_charts.choose_entries(groups)
    grids = {"overlap of masks, two by two": False, "overlap of masks beyond chance": True}
    between = mask_charts.overlap_of_seeds(groups, styles)
    return {
        "scores": {
            word: [
                Chart(_embed(charts.score(groups, styles, n, word.lower()), f"{word} of {n} against alive weights"))
                for n in names
            ]
            for word in ("PSNR", "SSIM")
        },
        "distance": [
            Chart(_embed(charts.distance(last, styles, n), f"distance of {n} to the dense network"))
            for n in names
            if any(n in group.against_dense for group in last)
        ],
        "curves": _curves(groups, names, styles),
        "scale": _embed(mask_charts.scale(), "colours from 1% to 100% of weights alive"),
        "by_kind": [_density_by_kind(group, s) for group, s in known],
        "by_round": [chart for group, s in known for chart in _density_by_round(groups, group, s)],
        "overlap": [Chart(_embed(mask_charts.grid(named, beyond), label)) for label, beyond in grids.items()]
        if len(named) > 1
        else [],
        "overlapping": len(named),
        "between_seeds": [] if between is None else [Chart(_embed(between, "overlap between seeds"))],
    }


def _curves(groups: Sequence[Group], names: Sequence[str], styles: _Styles) -> list[list[Chart]]:
    """Draw training curves: a row of charts per method, for its lowest seed and the dense network of the same run."""
    rows = []
    curved = [(group, s) for group in groups for s in group.entries if s.ticket.curve is not None]
    for method in dict.fromkeys(group.method for group, _ in curved if not group.dense):
        of_method = [s for group, s in curved if group.method == method]
        seed = min(s.seed for s in of_method)
        one_seed = [s for s in of_method if s.seed == seed]
        one_seed += [s for group, s in curved if group.dense and s.run == one_seed[0].run]
        tasks = [n for n in names if any(s.ticket.curve and s.ticket.curve.psnr.get(n) for s in one_seed)][:MAX_CURVES]
        drawn = [(charts.curves(one_seed, styles[method], n), f"{method}: PSNR of {n} within rounds") for n in tasks]
        if drawn:
            rows.append([Chart(_embed(*each), method, f"{method}, seed {seed}") for each in drawn])
    return rows


def _first_seed(group: Group) -> Entry:
    return min(group.entries, key=lambda s: s.seed)


def _density_by_kind(group: Group, entry: Entry) -> Chart:
    grid = mask_charts.heat(mask_charts.by_kind(entry), f"kinds {group.method}")
    heading = f"{group.method}, round {group.round_}, {group.alive / group.total:.1%}"
    return Chart(_embed(grid, f"density by block and kind of tensor, {group.method}"), group.method, heading)


def _density_by_round(groups: Sequence[Group], group: Group, entry: Entry) -> list[Chart]:
    """Draw densities over rounds; an empty list for a control, or for a run with a single round here."""
    rounds = [s for other in groups for s in other.entries if s.run == entry.run]
    if group.control or len({s.ticket.round for s in rounds}) < 2:
        return []
    grid = mask_charts.heat(mask_charts.by_round(rounds), f"rounds {group.method}", "round")
    return [Chart(_embed(grid, f"density by block and round, {group.method}"), group.method, group.method)]
