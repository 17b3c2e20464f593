"""Tables for a terminal, of at most 100 columns, and CSV with all digits."""

from __future__ import annotations

import csv as csv_files
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mirl_dist.tickets.compare import published, statistics
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.statistics import Group, Statistic

WIDTH = 100
_WIDEST_LABEL, _WIDEST_TASK = 18, 12

COLUMNS = (
    *("run", "method", "seed", "round", "alive", "total", "sparsity", "task", "set", "protocol", "psnr", "ssim"),
    *("degraded_psnr", "degraded_ssim", "images", "best_step", "mask_digest", "ticket_digest"),
)


class TableRow(NamedTuple):
    """What stands in the fixed columns, and a cell for each 'task/set' that has one."""

    fixed: tuple[str, ...]
    cells: Mapping[str, str]


@dataclass(frozen=True)
class TextTable:
    """Rows below the fixed columns and a column per 'task/set', in as many tables as the terminal's width asks for.

    At most WIDTH columns are used; where the fixed columns leave no room for a task, rows are told as lines instead,
    so that no number is ever broken. The first fixed column is wrapped; every table repeats the fixed ones. remarks
    stand below, a line each.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[TableRow]
    names: Sequence[str]
    remarks: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(WIDTH, options.max_width)
        fixed = [max(_widest_line([head, *(row.fixed[i] for row in self.rows)]), 1) for i, head in enumerate(self.heads)]
        fixed = [min(one, _WIDEST_LABEL) for one in fixed]
        wide = {n: _widest_line([_head(n), *(row.cells.get(n, "") for row in self.rows)]) for n in self.names}
        cut = {n: min(one, _WIDEST_TASK) for n, one in wide.items()}
        room = width - 1 - sum(one + 3 for one in fixed)
        if room < max((one + 3 for one in cut.values()), default=0):
            yield Text("\n".join(self._as_lines()))
            return
        groups: list[list[str]] = [[]]
        for name in self.names:
            if groups[-1] and sum(cut[n] + 3 for n in [*groups[-1], name]) > room:
                groups.append([])
            groups[-1].append(name)
        columns = list(zip(self.heads, fixed, strict=True))
        found = [
            _rich_table(self.title + " (continued)" * (part > 0), columns, self.rows, {n: cut[n] for n in group})
            for part, group in enumerate(groups)
        ]
        if self.remarks:
            found[-1].caption = Text("\n".join(self.remarks), justify="left")
        yield from found

    def _as_lines(self) -> list[str]:
        said = [self.title]
        for row in self.rows:
            said += ["", *(f"{head}: {_on_one_line(word)}" for head, word in zip(self.heads, row.fixed, strict=True) if word)]
            said += [f"  {name}: {_on_one_line(row.cells[name])}" for name in self.names if name in row.cells]
        return [*said, "", *self.remarks]


def tables(shown: Sequence[Entry]) -> list[TextTable]:
    """Alive weights, PSNR over SSIM per method and round; then the paper's figures, in tables of their own.

    Over several seeds: means, each above its sample standard deviation. `summary.notes` says what else to know.
    Raises UserError as `summary.lines`.
    """
    lines, names = statistics.group_entries(shown), statistics.task_names(shown)
    many = any(len(line.seeds) > 1 for line in lines)
    heads = ("method", "round", "alive", "sparsity") + (("seeds",) if many else ())
    rows = [_group_row(line, many) for line in lines] + _degraded_rows(shown, len(heads))
    title = "PSNR in dB over SSIM" + (", means over seeds, ± sample standard deviation" if many else "")
    ours = TextTable(title, heads, rows, names, [f"protocol: {s.ticket.protocol}" for s in shown[:1]])
    return [ours, *_published_tables(lines, names)]


def _group_row(line: Group, many: bool) -> TableRow:
    fixed = (line.method, str(line.round_), f"{line.alive:,.0f}", f"{line.sparsity:.1%}")
    cells = {name: "\n".join((*format_statistic(psnr, 2), *format_statistic(line.ssim[name], 4))) for name, psnr in line.psnr.items()}
    return TableRow(fixed + ((str(len(line.seeds)),) if many else ()), cells)


def format_statistic(spread: Statistic, digits: int, sign: str = "") -> list[str]:
    """The mean, and where it is known the standard deviation, as lines of a cell. sign: '+' to show it always."""
    said = [f"{spread.mean:{sign},.{digits}f}"]
    return said if spread.sd is None else [*said, f"±{spread.sd:,.{digits}f}"]


def _degraded_rows(shown: Sequence[Entry], fixed: int) -> list[TableRow]:
    """The scores of the degraded images themselves."""
    given = {n: s for one in reversed(shown) for n, s in statistics.scores_of(one.ticket).items()}
    cells = {n: f"{s.degraded_psnr:.2f}\n{s.degraded_ssim:.4f}" for n, s in given.items()}
    return [TableRow(("input",) + ("",) * (fixed - 1), cells)] if cells else []


def _published_tables(lines: Sequence[Group], names: Sequence[str]) -> list[TextTable]:
    """The paper's figures, in a table of their own; nothing where it has none."""
    rows, where = [], dict[str, None]()
    for beside in published.match_groups(lines, names):
        line, figures = beside.group, beside.figures
        one = beside.network
        round_ = published.round_of(one)
        paper = f"{one.method} {one.params}" + ("" if round_ is None else f"\n(round {round_})")
        where |= dict.fromkeys(figure.table for figure in figures.values())
        cells = {name: f"{figure.psnr:.2f}\n{figure.ssim:.4f}" for name, figure in figures.items()}
        rows.append(TableRow((f"{line.method}, round {line.round_}", paper), cells))
    if not rows:
        return []
    used = [name for name in names if any(name in row.cells for row in rows)]
    setting = published.setting_of(names)
    said = f"the figures of MIR-L, Table {', '.join(where)} ({setting}), as printed: no yardstick for other training"
    return [TextTable(published.TITLE, ("beside", "MIR-L's"), rows, used, [said])]


def _rich_table(title: str, fixed: Sequence[tuple[str, int]], rows: Sequence[TableRow], tasks: Mapping[str, int]) -> Table:
    made = Table(title=Text(title), show_lines=any("\n" in cell for row in rows for cell in row.cells.values()))
    for place, (head, width) in enumerate(fixed):
        made.add_column(Text(head), width=width, justify="right" if place else "left", overflow="fold")
    for name, width in tasks.items():
        made.add_column(Text(_head(name)), width=width, justify="right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(word) for word in row.fixed), *(Text(row.cells.get(name, "-")) for name in tasks))
    return made


def _head(name: str) -> str:
    return name.replace("/", "\n").replace("_", "\n")


def _on_one_line(cell: str) -> str:
    return cell.replace("\n", " ")


def _widest_line(cells: Iterable[str]) -> int:
    return max((len(line) for cell in cells for line in cell.split("\n")), default=0)


def csv(shown: Sequence[Entry]) -> bytes:
    """A line per ticket, protocol and 'task/set', all digits, columns COLUMNS, UTF-8; published figures are not in it.

    run: its name here. method: 'dense' or the papers' word. alive: weights that are not pruned, unprunable ones
    included, of `total`; sparsity: 1 - alive / total. protocol: its name, its text for a ticket that knows no names.
    psnr in dB and ssim of the restored images, degraded_* of the degraded ones, means over `images`. best_step: steps
    of this round's training up to the best score on its curve; empty without one, and for other protocols than the
    headline, by which curves are drawn. Digests are hex SHA-256.
    """
    out = io.StringIO()
    writer = csv_files.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for s in shown:
        t, head = s.ticket, statistics.headline_protocol(s.ticket)
        steps, digest = t.best_steps(), t.digest()
        for protocol, scores in {head: t.scores, **t.also}.items():
            for name, score in scores.items():
                task, _, set_ = name.partition("/")
                step = steps.get(name, "") if protocol == head else ""
                writer.writerow(
                    [
                        *(s.run, s.method, s.seed, t.round, t.alive_total, t.total, t.total_sparsity, task, set_),
                        *(protocol, score.psnr, score.ssim, score.degraded_psnr, score.degraded_ssim, score.images),
                        *(step, t.mask_digest, digest),
                    ]
                )
    return out.getvalue().encode()


def published_csv() -> bytes:
    """The figures of MIR-L's Tables II and III, a line each."""
    out = io.StringIO()
    writer = csv_files.writer(out, lineterminator="\n")
    writer.writerow(("paper", *published.Published._fields))
    writer.writerows(("MIR-L", *row) for row in published.all_figures())
    return out.getvalue().encode()
