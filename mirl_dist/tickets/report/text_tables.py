"""Tables for a terminal, at most WIDTH characters wide, and CSV with all digits."""

from __future__ import annotations

import csv as csv_files
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mirl_dist.tickets.compare import published, statistics
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.judge import NOT_RUN, Judgement
from mirl_dist.tickets.compare.statistics import Group, Statistic

WIDTH = 100
_WIDEST_LABEL, _WIDEST_TASK = 18, 12

COLUMNS = (
    *("run", "method", "seed", "round", "alive", "total", "sparsity", "task", "set", "protocol", "psnr", "ssim"),
    *("degraded_psnr", "degraded_ssim", "images", "best_step", "mask_digest", "ticket_digest"),
)


class TableRow(NamedTuple):
    """Texts of the fixed columns, and the cells by 'task/set'."""

    fixed: tuple[str, ...]
    cells: Mapping[str, str]


@dataclass(frozen=True)
class TextTable:
    """A table with fixed columns and a column per 'task/set', split into several tables to fit the terminal.

    Each table is at most WIDTH characters wide and repeats the fixed columns; long texts wrap. If the fixed columns
    leave no room for a task, rows are printed as lines instead, so that no number is broken. remarks: lines printed
    below.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[TableRow]
    names: Sequence[str]
    remarks: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(WIDTH, options.max_width)
        columns = [[head, *(row.fixed[at] for row in self.rows)] for at, head in enumerate(self.heads)]
        fixed = [min(_widest_line(column), _WIDEST_LABEL) for column in columns]
        tasks = {n: [_head(n), *(row.cells.get(n, "") for row in self.rows)] for n in self.names}
        widths = {n: min(_widest_line(column), _WIDEST_TASK) for n, column in tasks.items()}
        room = width - 1 - sum(one + 3 for one in fixed)
        if room < max((one + 3 for one in widths.values()), default=0):
            yield Text("\n".join(self._as_lines()))
            return
        parts: list[dict[str, int]] = [{}]
        for name, one in widths.items():
            if parts[-1] and sum(other + 3 for other in parts[-1].values()) + one + 3 > room:
                parts.append({})
            parts[-1][name] = one
        tables = [self._as_table(self.title + " (continued)" * (at > 0), fixed, part) for at, part in enumerate(parts)]
        if self.remarks:
            tables[-1].caption = Text("\n".join(self.remarks), justify="left")
        yield from tables

    def _as_table(self, title: str, fixed: Sequence[int], tasks: Mapping[str, int]) -> Table:
        lines = any("\n" in cell for row in self.rows for cell in row.cells.values())
        table = Table(title=Text(title), show_lines=lines)
        for at, (head, width) in enumerate(zip(self.heads, fixed, strict=True)):
            table.add_column(Text(head), width=width, justify="right" if at else "left", overflow="fold")
        for name, width in tasks.items():
            table.add_column(Text(_head(name)), width=width, justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row.fixed), *(Text(row.cells.get(name, "-")) for name in tasks))
        return table

    def _as_lines(self) -> list[str]:
        lines = [self.title]
        for row in self.rows:
            fixed = [f"{head}: {text}" for head, text in zip(self.heads, row.fixed, strict=True) if text]
            tasks = [f"  {name}: {row.cells[name]}" for name in self.names if name in row.cells]
            lines += ["", *(line.replace("\n", " ") for line in fixed + tasks)]
        return [*lines, "", *self.remarks]


def tables(entries: Sequence[Entry]) -> list[TextTable]:
    """Return a table of surviving weights, PSNR and SSIM per method and round, then tables of published results.

    With several seeds, cells show the mean above its sample standard deviation. `caveats.list_caveats` returns the
    caveats. Raises UserError as `statistics.group_entries`.
    """
    groups, names = statistics.group_entries(entries), statistics.task_names(entries)
    many = any(len(group.seeds) > 1 for group in groups)
    heads = ("method", "round", "alive", "sparsity") + (("seeds",) if many else ())
    rows = [_group_row(group, many) for group in groups]
    scored = {n: s for one in reversed(entries) for n, s in statistics.scores_of(one.ticket).items()}
    degraded = {n: f"{s.degraded_psnr:.2f}\n{s.degraded_ssim:.4f}" for n, s in scored.items()}
    rows += [TableRow(("input",) + ("",) * (len(heads) - 1), degraded)] if degraded else []
    title = "PSNR in dB over SSIM" + (", means over seeds, ± sample standard deviation" if many else "")
    ours = TextTable(title, heads, rows, names, [f"protocol: {s.ticket.protocol}" for s in entries[:1]])
    return [ours, *_published_tables(groups, names)]


def _group_row(group: Group, many: bool) -> TableRow:
    fixed = (group.method, str(group.round_), f"{group.alive:,.0f}", f"{group.sparsity:.1%}")
    cells = {
        name: "\n".join((*format_statistic(psnr, 2), *format_statistic(group.ssim[name], 4)))
        for name, psnr in group.psnr.items()
    }
    return TableRow(fixed + ((str(len(group.seeds)),) if many else ()), cells)


def format_statistic(statistic: Statistic, digits: int, sign: str = "") -> list[str]:
    """Return the lines of a cell: the mean, and the standard deviation if known. sign: '+' always shows the sign."""
    lines = [f"{statistic.mean:{sign},.{digits}f}"]
    return lines if statistic.sd is None else [*lines, f"±{statistic.sd:,.{digits}f}"]


def _published_tables(groups: Sequence[Group], names: Sequence[str]) -> list[TextTable]:
    """Return a table of published results; an empty list without any."""
    rows, matches = [], published.match_groups(groups, names)
    for match in matches:
        round_ = published.round_of(match.network)
        paper = f"{match.network.method} {match.network.params}" + ("" if round_ is None else f"\n(round {round_})")
        cells = {name: f"{figure.psnr:.2f}\n{figure.ssim:.4f}" for name, figure in match.figures.items()}
        rows.append(TableRow((f"{match.group.method}, round {match.group.round_}", paper), cells))
    if not rows:
        return []
    used = [name for name in names if any(name in row.cells for row in rows)]
    cited = ", ".join(dict.fromkeys(figure.table for match in matches for figure in match.figures.values()))
    remark = f"the figures of MIR-L, Table {cited} ({published.setting_of(names)}), as printed: "
    remark += "no yardstick for other training"
    return [TextTable(published.TITLE, ("beside", "MIR-L's"), rows, used, [remark])]


def judgement_tables(judgements: Sequence[Judgement]) -> list[TextTable]:
    """Return tables of conditions (1) and, with curves, (2) of Definition 1 (see judge.py), then of controls."""
    names = list(dict.fromkeys(name for j in judgements for name in j.answers))
    gains, steps, controls = [], [], []
    for j in judgements:
        line, answers = (j.method, str(j.round_)), j.answers.items()
        fixed = (*line, f"{j.density:.1%}", j.overall)
        gains.append(TableRow(fixed, {n: _verdict_cell(a.gain, 2, a.score) for n, a in answers}))
        steps.append(TableRow(fixed, {n: _verdict_cell(a.later, 0, a.steps) for n, a in answers if a.later}))
        if any(c.verdict != NOT_RUN for c in j.controls):
            for c in j.controls:
                cells = {n: _verdict_cell(gain, 2, c.verdicts[n]) for n, gain in c.gains.items()}
                controls.append(TableRow((*line, c.kind, c.verdict), cells))
    heads = ("method", "round", "density", "winning?")
    tables = [TextTable("PSNR against the dense network, dB: at least as good?", heads, gains, names)]
    if any(row.cells for row in steps):
        tables.append(TextTable("steps to the best score against the dense network's: no more?", heads, steps, names))
    if controls:
        heads = ("method", "round", "control", "verdict")
        tables.append(TextTable("PSNR against controls, dB (ticket minus control)", heads, controls, names))
    remarks = [f"{j.method}, round {j.round_}: {'; '.join(j.remarks)}" for j in judgements if j.remarks]
    remarks += [] if controls else ["no control was run"]
    remarks.append(
        "within the spread: a difference, with any tolerance, no larger than its ±: neither a win nor a loss"
    )
    tables[-1] = replace(tables[-1], remarks=remarks)
    return tables


def _verdict_cell(statistic: Statistic | None, digits: int, verdict: str) -> str:
    numbers = [] if statistic is None else format_statistic(statistic, digits, "+")
    return "\n".join([*numbers, verdict.replace(" the ", "\n").replace(" (", "\n(")])


def _head(name: str) -> str:
    return name.replace("/", "\n").replace("_", "\n")


def _widest_line(cells: Iterable[str]) -> int:
    return max((len(line) for cell in cells for line in cell.split("\n")), default=0)


def csv(entries: Sequence[Entry]) -> bytes:
    """Return UTF-8 CSV with columns COLUMNS and all digits: a line per ticket, protocol and 'task/set'.

    run: short name in this comparison. method: 'dense' or the run's method. alive: surviving weights of `total`,
    including unprunable ones. sparsity: 1 - alive / total. protocol: name, or the full text for a ticket without
    protocol names. psnr (dB), ssim: of the restored images; degraded_*: of the degraded ones; means over `images`.
    best_step: steps of this round up to the best score on its curve; empty without a curve, and for protocols other
    than the headline, which curves use. Digests are hex SHA-256. Published results are not included.
    """
    lines: list[Sequence[object]] = [COLUMNS]
    for s in entries:
        t, head = s.ticket, statistics.headline_protocol(s.ticket)
        steps, digest = t.best_steps(), t.digest()
        for protocol, scores in {head: t.scores, **t.also}.items():
            for name, score in scores.items():
                task, _, set_ = name.partition("/")
                step = steps.get(name, "") if protocol == head else ""
                lines.append(
                    [
                        *(s.run, s.method, s.seed, t.round, t.alive_total, t.total, t.total_sparsity, task, set_),
                        *(protocol, score.psnr, score.ssim, score.degraded_psnr, score.degraded_ssim, score.images),
                        *(step, t.mask_digest, digest),
                    ]
                )
    return _write_csv(lines)


def published_csv() -> bytes:
    """Return the published results of MIR-L's Tables II and III as UTF-8 CSV, a line each."""
    head = ("paper", *published.Published._fields)
    return _write_csv([head, *(("MIR-L", *figure) for figure in published.all_figures())])


def _write_csv(lines: Iterable[Sequence[object]]) -> bytes:
    out = io.StringIO()
    csv_files.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue().encode()
