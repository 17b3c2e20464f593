"""The page's tables: what is compared, scores beside the paper's figures, and what was judged."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from mirl_dist.tickets.compare import published, statistics
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.compare.statistics import Group, Statistic
from mirl_dist.tickets.report.chart_style import Style, swatch
from mirl_dist.tickets.report.html import Html, broken, join, picture, row, table, tag

DASH = "–"


def compared(entries: Sequence[Entry]) -> Html:
    """Runs with their methods, seeds, configs, shards and versions; protocols in full words."""
    runs: dict[str, list[Entry]] = {}
    for s in entries:
        runs.setdefault(s.run, []).append(s)
    head = ("run", "method", "seed", "rounds", "weights", "prunable", "steps a round", "config", "shards", "versions")
    return join(
        [
            tag("p", _inventory(entries, len(runs))),
            table([head], [_run_row(name, of_run) for name, of_run in runs.items()]),
            tag("dl", *_protocols(entries)),
        ]
    )


def _inventory(entries: Sequence[Entry], runs: int) -> str:
    methods = list(dict.fromkeys(s.method for s in entries if s.method != DENSE))
    seeds = sorted({s.seed for s in entries})
    dense = any(s.method == DENSE for s in entries)
    return (
        f"{_count_of(len(entries), 'ticket')} of {_count_of(runs, 'run')}: {_count_of(len(methods), 'method')}"
        f"{f' ({chr(44).join([chr(32) + m for m in methods]).strip()})' if methods else ''}, "
        f"{_count_of(len(seeds), 'seed')} ({', '.join(map(str, seeds))}), scored on "
        f"{', '.join(statistics.task_names(entries)) or 'nothing'}. "
        + ("The dense network is round 0 of a run." if dense else "There is no dense network to compare with.")
    )


def _count_of(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


def _run_row(name: str, entries: Sequence[Entry]) -> Html:
    tickets = sorted((s.ticket for s in entries), key=lambda t: t.round)
    methods = dict.fromkeys(s.method for s in entries if s.method != DENSE) or {DENSE: None}
    first = tickets[0]

    def all_of(values: Sequence[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return row(
        [
            tag("td", name, class_="run"),
            ", ".join(methods),
            all_of([str(s.seed) for s in entries]),
            _rounds([t.round for t in tickets]),
            _number_cell(f"{first.total:,}", first.total),
            _number_cell(f"{first.prunable:,}", first.prunable),
            all_of([f"{t.updates:,}" for t in tickets]),
            tag("td", tag("code", all_of([t.fingerprint[:12] for t in tickets]))),
            tag("td", tag("code", all_of([t.manifest_digest[:12] for t in tickets]))),
            all_of([", ".join(f"{k} {v}" for k, v in sorted(t.versions.items())) for t in tickets]),
        ]
    )


def _rounds(rounds: Sequence[int]) -> str:
    known = sorted(set(rounds))
    whole = known == list(range(known[0], known[-1] + 1))
    return f"{known[0]}–{known[-1]}" if whole and len(known) > 2 else ", ".join(map(str, known))


def _protocols(entries: Sequence[Entry]) -> list[Html]:
    texts: dict[str, str] = {}
    for s in entries:
        texts |= {statistics.headline_protocol(s.ticket): s.ticket.protocol} | s.ticket.protocols
    first = statistics.headline_protocol(entries[0].ticket)
    items = []
    for name, text in texts.items():
        title = "protocol" if name == text else name
        items += [tag("dt", f"{title}{' (headline)' * (name == first and len(texts) > 1)}"), tag("dd", text)]
    return items


def scores(
    groups: Sequence[Group], names: Sequence[str], styles: Mapping[str, Style], with_published: bool = True
) -> Html:
    """Methods and rounds with PSNR over SSIM; the paper's figures, where it has any, in columns of their own."""
    matches = published.match_groups(groups, names) if with_published else []
    figures = {(b.group.method, b.group.round_): b for b in matches}
    cited = {
        name: f"{b.figures[name].dataset}, {b.figures[name].table}"
        for b in matches
        for name in names
        if name in b.figures
    }
    last = {group.method: group.round_ for group in groups}
    best = {(m, n): _best_mean(groups, m, n) for m in ("psnr", "ssim") for n in names}
    body, before = [], ""
    for group in groups:
        cells = [
            *_measured_cells(group, names, styles, best),
            *_published_cells(figures.get((group.method, group.round_)), cited),
        ]
        early = group.round_ != last[group.method] and (group.method, group.round_) not in figures
        words = ["first"] * (group.method != before) + ["early"] * early
        body.append(row(cells, class_=" ".join(words) if words else False))
        before = group.method
    return table(_head_rows(names, cited), body)


def _head_rows(names: Sequence[str], cited: Mapping[str, str]) -> list[list[Html]]:
    plain = ("method", "round", "alive weights", "sparsity", "seeds", *names)
    ours = [
        tag("th", broken(text), data_sorts=str(at), scope="col", class_="number" if at > 0 else False)
        for at, text in enumerate(plain)
    ]
    if not cited:
        return [ours]
    paper = [tag("th", "method, weights", class_="number theirs")]
    for name, source in cited.items():
        paper.append(tag("th", name.partition("/")[0], tag("br"), tag("small", source), class_="number theirs"))
    sides = [
        tag("th", "measured here", colspan=str(len(plain))),
        tag("th", class_="gap"),
        tag("th", published.TITLE, class_="theirs head", colspan=str(len(paper))),
    ]
    return [sides, [*ours, tag("th", class_="gap"), *paper]]


def _measured_cells(
    group: Group, names: Sequence[str], styles: Mapping[str, Style], best: Mapping[tuple[str, str], float | None]
) -> list[Html]:
    legend = picture(swatch(group.method, styles[group.method]), "")
    cells = [
        tag("td", legend, group.method, class_="method", data_value=group.method),
        _number_cell(str(group.round_), group.round_),
        _number_cell(f"{group.alive:,.0f}", group.alive),
        _number_cell(f"{group.sparsity:.1%}", group.sparsity),
        _number_cell(str(len(group.seeds)), len(group.seeds)),
    ]
    for name in names:
        psnr, ssim = group.psnr.get(name), group.ssim.get(name)
        top = not (group.dense or group.control)
        inside = join(
            [
                _format_statistic(psnr, 2, top and psnr is not None and psnr.mean == best["psnr", name]),
                tag("br"),
                tag("small", _format_statistic(ssim, 4, top and ssim is not None and ssim.mean == best["ssim", name])),
            ],
            "",
        )
        known = psnr is not None and math.isfinite(psnr.mean)
        cells.append(tag("td", inside, class_="number", data_value=f"{psnr.mean:.6f}" if psnr and known else ""))
    return cells


def _published_cells(match: published.PublishedMatch | None, cited: Collection[str]) -> list[Html]:
    if not cited:
        return []
    if match is None:
        return [tag("td", class_="gap"), *(tag("td", class_="theirs") for _ in range(len(cited) + 1))]
    cells = [
        tag("td", f"{match.network.method}", tag("br"), tag("small", match.network.params), class_="number theirs")
    ]
    for name in cited:
        figure = match.figures.get(name)
        content = (f"{figure.psnr:.2f}", tag("br"), tag("small", f"{figure.ssim:.4f}")) if figure else (DASH,)
        cells.append(tag("td", *content, class_="number theirs"))
    return [tag("td", class_="gap"), *cells]


def _best_mean(groups: Sequence[Group], measure: str, name: str) -> float | None:
    """The highest mean of a column, dense networks and controls not counted."""
    column = [getattr(group, measure).get(name) for group in groups if not (group.dense or group.control)]
    return max((s.mean for s in column if s is not None and math.isfinite(s.mean)), default=None)


def _format_statistic(statistic: Statistic | None, digits: int, best: bool) -> Html:
    if statistic is None or not math.isfinite(statistic.mean):
        return Html(DASH)
    mean = tag("b", f"{statistic.mean:.{digits}f}", class_="best") if best else Html(f"{statistic.mean:.{digits}f}")
    return mean if statistic.sd is None else join([mean, tag("small", f" ± {statistic.sd:.{digits}f}")], "")


def _number_cell(text: str, value: float) -> Html:
    return tag("td", text, class_="number", data_value=f"{value:.6f}")
