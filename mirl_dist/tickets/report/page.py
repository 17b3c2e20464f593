"""One HTML file that compares tickets: tables, charts and pictures inside, nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mirl_dist.errors import UserError
from mirl_dist.tickets.compare import caveats, judge, statistics
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.compare.judge import Judgement
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report import latex, page_figures, page_tables, text_tables
from mirl_dist.tickets.report.chart_style import Style, assign_styles
from mirl_dist.tickets.report.html import Html, data_uri, escape, join, section, tag
from mirl_dist.tickets.report.page_figures import missing
from mirl_dist.tickets.report.page_gallery import gallery
from mirl_dist.tickets.report.page_style import CSS, SCRIPT
from mirl_dist.tickets.report.page_verdicts import verdicts

SECTIONS = {
    "compared": "What is compared",
    "caveats": "Caveats",
    "scores": "Scores",
    "judgements": "Winning tickets?",
    "weights": "Score against weights",
    "distance": "Distance to dense",
    "pictures": "Restored images",
    "density": "Where weights stay",
    "overlap": "Overlap of masks",
    "curves": "Within rounds",
    "downloads": "Downloads",
}
"""The page's sections in their order: id -> title."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def html(entries: Sequence[Entry], title: str, made: str, judgements: Sequence[Judgement] | None = None) -> str:
    """The page as text. made: when, for its footer; judgements: of `judge.judge`, which is asked where they are None.

    Raises UserError for no tickets, and as `statistics.group_entries` for tickets that cannot stand in one table.
    """
    if not entries:
        raise UserError("found no ticket to compare, where a page is made. Name runs that have finished a round.")
    entries = [s._replace(run=_printable(s.run), method=_printable(s.method)) for s in entries]
    groups, names = statistics.group_entries(entries), statistics.task_names(entries)
    styles = assign_styles(group.method for group in groups)
    if judgements is None:
        judgements = judge.judge(entries)
    dense = [s for s in entries if s.method == DENSE]
    inside = {
        "compared": page_tables.compared(entries),
        "caveats": _notes(caveats.list_caveats(entries)),
        "scores": _scores(entries, groups, names, styles),
        "judgements": _judgements(judgements, styles),
        "weights": page_figures.scores(groups, names, styles),
        "distance": page_figures.distance(groups, names, styles),
        "pictures": gallery(groups),
        "density": page_figures.density(groups, styles),
        "overlap": page_figures.overlap(groups, styles),
        "curves": page_figures.curves(groups, names, styles, dense),
        "downloads": _downloads(entries),
    }
    assert inside.keys() == SECTIONS.keys(), "every section has its content"
    body = [
        tag("header", tag("h1", _printable(title)), tag("p", f"Tickets side by side, {made}.", class_="soft")),
        tag("nav", *(tag("a", SECTIONS[name], href=f"#{name}") for name in inside)),
        tag("main", join(section(name, SECTIONS[name], content) for name, content in inside.items())),
        tag("footer", f"Made by mirl-dist, {made}. This file needs nothing else."),
        tag("script", Html(SCRIPT)),
    ]
    return str(_document(title, body))


def _printable(name: str) -> str:
    """A user's name without what no page can show: control characters, halves of characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def _document(title: str, body: Sequence[Html]) -> Html:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", _printable(title)),
        tag("style", Html(CSS)),
    )
    return join([Html("<!DOCTYPE html>"), tag("html", head, tag("body", join(body)), lang="en")])


def _notes(notes: Sequence[str]) -> Html:
    if not notes:
        return missing("None was found: seeds, shards, protocols and steps fit together.")
    return tag("ul", *(tag("li", note[:1].upper() + note[1:]) for note in notes), class_="notes")


def _scores(
    entries: Sequence[Entry], groups: Sequence[Group], names: Sequence[str], styles: Mapping[str, Style]
) -> Html:
    if not names:
        return missing("No ticket has scores.")
    known = page_tables.scores(groups, names, styles)
    text = (
        "PSNR in dB over SSIM: mean ± standard deviation over seeds. Bold: the best ticket of a column, dense networks "
        "and controls not counted. Alive weights and sparsity are over all parameters. Click a head to sort."
    )
    paper_text = (
        " Tinted, apart: what the paper prints for a method, beside our line of the nearest density; its networks, "
        "data and training differ from these, so it is no yardstick for small runs."
    )
    parts = [_last_round_checkbox(), known, tag("p", text + (paper_text if "theirs" in known else ""), class_="soft")]
    for protocol in dict.fromkeys(p for s in entries for p in s.ticket.also):
        other = page_tables.scores(statistics.group_entries(entries, protocol), names, styles, with_published=False)
        parts.append(tag("details", tag("summary", f"The same by the protocol {protocol}"), other))
    return join(parts)


def _last_round_checkbox() -> Html:
    return tag("label", tag("input", type_="checkbox", class_="only"), "last round of each method only", class_="only")


def _judgements(judgements: Sequence[Judgement], styles: Mapping[str, Style]) -> Html:
    if not judgements:
        return missing("There is no pruned ticket to judge.")
    return join([_last_round_checkbox(), verdicts(judgements, styles)])


def _downloads(entries: Sequence[Entry]) -> Html:
    files = {"tickets.csv": ("All numbers (CSV)", text_tables.csv(entries), "text/csv;charset=utf-8")}
    if statistics.task_names(entries):
        tables = latex.tables(entries).encode()
        files["tables.tex"] = ("Tables II and III (LaTeX)", tables, "text/plain;charset=utf-8")
    return tag(
        "div",
        *(
            tag("a", title, href=data_uri(content, kind), download=name)
            for name, (title, content, kind) in files.items()
        ),
        class_="downloads",
    )
