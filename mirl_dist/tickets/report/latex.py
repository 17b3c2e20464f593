"""LaTeX in the shape of MIR-L's Tables II and III: a table per data set, ours and the paper's figures apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from mirl_dist.errors import UserError
from mirl_dist.tickets.compare import caveats, published, statistics
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.published import Published
from mirl_dist.tickets.compare.statistics import Group, Statistic

_HEAD = "% Needs \\usepackage{booktabs} and \\usepackage{xcolor}.\n"
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
} | {c: f"\\{c}" for c in "&%$#_{}"}
_MEASURES = (("psnr", 2), ("ssim", 4))

Figures: TypeAlias = dict[tuple[str, int], dict[str, Published]]
"""Method and round of our line -> 'task/set' -> the paper's figure beside it."""


def escape(text: str) -> str:
    """Words as LaTeX sets them; line ends and control characters become spaces."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return "".join(_SPECIAL.get(c, c) for c in plain)


def tables(entries: Sequence[Entry]) -> str:
    """A floating table for every data set and kind of task: a row per method and round, PSNR and SSIM per level.

    Best value bold and second underlined, as printed, among tickets: dense networks and controls have no part in it.
    The paper's figures, where it has any, stand grey and slanted in columns of their own, beside our line of the
    nearest density. Raises UserError as `statistics.group_entries`, and where nothing was scored.
    """
    groups, names = statistics.group_entries(entries), statistics.task_names(entries)
    if not names:
        raise UserError(
            "no ticket here has a score, so there is nothing for a table. Compare tickets that were scored."
        )
    notes = [*caveats.list_caveats(entries), f"protocol: {entries[0].ticket.protocol}"]
    matches = published.match_groups(groups, names)
    figures = {(b.group.method, b.group.round_): b.figures for b in matches}
    tables_of_sets: dict[tuple[str, str], list[str]] = {}
    for name in names:
        task, _, set_ = name.partition("/")
        tables_of_sets.setdefault((task.partition("_")[0], set_), []).append(name)
    return _HEAD + "\n".join(_table(key, members, groups, figures, notes) for key, members in tables_of_sets.items())


def _table(key: tuple[str, str], names: list[str], groups: Sequence[Group], figures: Figures, notes: list[str]) -> str:
    kind, set_ = key
    theirs = any(name in by_name for by_name in figures.values() for name in names)
    paper = "" if not theirs else _multicolumn(2 * len(names), _grey(published.TITLE))
    columns = 2 * len(names) * (2 if theirs else 1)
    data = escape(published.dataset_of(set_) or set_)
    rows = [
        _row(group, names, groups, figures if theirs else None) for group in groups if group.psnr.keys() & set(names)
    ]
    label = re.sub(r"[^a-z0-9]+", "-", f"{kind}-{set_}".lower())
    return "\n".join(
        [
            r"\begin{table*}[t]",
            r"\centering\footnotesize",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_caption(kind, data, names, groups, figures if theirs else {})}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{ll{'r' * columns}}}",
            r"\toprule",
            *_head_lines(names, data, paper),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\smallskip\raggedright " + escape(". ".join(notes) + "."),
            r"\end{table*}",
            "",
        ]
    )


def _head_lines(names: list[str], data: str, paper: str) -> list[str]:
    """Ours and the paper's over the levels over PSNR and SSIM."""
    sides = 2 if paper else 1
    top = f" & & {_multicolumn(2 * len(names), data)}" + (f" & {paper}" if paper else "") + r" \\"
    levels = [_level(name) for name in names] * sides
    spans = [rf"\cmidrule(lr){{{3 + 2 * i}-{4 + 2 * i}}}" for i in range(len(levels))]
    rows = [top]
    if any(levels):
        rows.append(" & & " + " & ".join(_multicolumn(2, level) for level in levels) + r" \\")
    rows.append("".join(spans))
    return [*rows, "Method & Params (M) & " + " & ".join(["PSNR & SSIM"] * len(levels)) + r" \\"]


def _multicolumn(columns: int, words: str) -> str:
    return rf"\multicolumn{{{columns}}}{{c}}{{{words}}}"


def _level(name: str) -> str:
    kind, _, level = name.partition("/")[0].partition("_")
    return rf"$\sigma={level}$" if kind == "denoise" and level.isdigit() else escape(level)


def _row(group: Group, names: list[str], groups: Sequence[Group], figures: Figures | None) -> str:
    method = escape(group.method) + (f", round {group.round_}" if group.round_ else "")
    if method.startswith(("[", "*")):  # the line before ends in \\, whose argument or star it would be
        method = "{}" + method
    cells = [method, f"{group.alive / 1e6:.2f}"]
    for name in names:
        for what, digits in _MEASURES:
            ranks = _best_values(groups, what, name, digits) if _is_ranked(group) else []
            cells.append(_cell(getattr(group, what).get(name), ranks, digits))
    if figures is not None:
        beside = figures.get((group.method, group.round_), {})
        for name in names:
            figure = beside.get(name)
            cells += ["", ""] if figure is None else [_grey(f"{figure.psnr:.2f}"), _grey(f"{figure.ssim:.4f}")]
    return " & ".join(cells) + r" \\"


def _is_ranked(group: Group) -> bool:
    return not (group.dense or group.control)


def _best_values(groups: Sequence[Group], what: str, name: str, digits: int) -> list[str]:
    """The best and the second best value of a column, as printed; none of a column with one value."""
    column = [getattr(group, what)[name] for group in groups if _is_ranked(group) and name in getattr(group, what)]
    means = {round(statistic.mean, digits) for statistic in column}
    return [f"{value:.{digits}f}" for value in sorted(means, reverse=True)[:2]] if len(means) > 1 else []


def _cell(statistic: Statistic | None, ranks: Sequence[str], digits: int) -> str:
    if statistic is None:
        return "--"
    printed = f"{statistic.mean:.{digits}f}"
    style = dict(zip(ranks, (r"\textbf", r"\underline"), strict=False)).get(printed)
    text = f"{style}{{{printed}}}" if style else printed
    return text if statistic.sd is None else rf"{text} {{\scriptsize $\pm${statistic.sd:.{digits}f}}}"


def _grey(words: str) -> str:
    return rf"\textcolor{{gray}}{{\textit{{{words}}}}}"


def _caption(kind: str, data: str, names: list[str], groups: Sequence[Group], figures: Figures) -> str:
    most = max(len(group.seeds) for group in groups)
    text = f"PSNR (dB) and SSIM of {escape(kind)} on {data}. Params: weights that are not pruned. "
    text += "Best ticket bold, second underlined; dense networks and controls have no part in it. "
    if most > 1:
        text += rf"Means over at most {most} seeds, $\pm$ sample standard deviation. "
    cited = [figure for theirs in figures.values() for name, figure in theirs.items() if name in names]
    if cited:
        tables = ", ".join(dict.fromkeys(figure.table for figure in cited))
        sizes = ", ".join(dict.fromkeys(f"{f.method} {f.params}" for f in cited))
        text += (
            f"Grey and slanted: the paper's own figures (MIR-L, Table {tables}; {sizes}), measured under other "
            "conditions: networks of full size, other training. They take no part in bold and underlined."
        )
    return text.strip()
