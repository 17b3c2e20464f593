"""The page's charts in their sections, each with a caption that says how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report import charts, layer_density, overlap_grid
from mirl_dist.tickets.report.chart_style import Style, swatch
from mirl_dist.tickets.report.html import Html, figure, join, picture, tag

Styles = Mapping[str, Style]
MAX_CURVES = 6
"""Most 'task/set' with curves."""


def missing(text: str) -> Html:
    """What a section says in place of what it lacks."""
    return tag("p", text, class_="soft")


def legend(looks: Styles) -> Html:
    return tag("div", *(tag("span", _swatch(m, looks), m) for m in looks), class_="legend")


def _swatch(method: str, looks: Styles) -> Html:
    return picture(swatch(method, looks[method]), "")


def _titled_chart(method: str, more: str, looks: Styles, chart: Html) -> Html:
    return tag("div", tag("p", _swatch(method, looks), f"{method}{more}"), chart)


def scores(lines: Sequence[Group], names: Sequence[str], looks: Styles) -> Html:
    """PSNR and SSIM against alive weights."""
    if not names:
        return missing("No ticket has scores.")
    parts = [legend({line.method: looks[line.method] for line in lines})]
    for measure, word in (("psnr", "PSNR"), ("ssim", "SSIM")):
        drawn = [picture(charts.score(lines, looks, n, measure), f"{word} of {n} against alive weights") for n in names]
        parts.append(
            figure(
                f"{word} against the weights that are not pruned, unprunable ones included; log axis, rounds go from "
                "right to left. Line: mean over seeds; shade: one standard deviation; faint dots: single seeds. "
                "Dashed with its shade: the dense network. Crosses without a line: controls.",
                *drawn,
            )
        )
    return join(parts)


def distance(lines: Sequence[Group], names: Sequence[str], looks: Styles) -> Html:
    """What the last ticket of each method gains or loses."""
    last = charts.last_rounds(lines)
    known = [n for n in names if any(n in line.against_dense for line in last)]
    if not known:
        return missing("No ticket has a dense network of its seed, training, data and network to be compared with.")
    return figure(
        "PSNR of the last ticket of each method minus that of the dense network of the same seed, with its alive "
        "weights. Mark: mean over seeds; whiskers: one standard deviation of the paired differences, none with one "
        "seed. Right of the dashed line is better than dense.",
        *(picture(charts.distance(last, looks, n), f"distance of {n} to the dense network") for n in known),
    )


def curves(lines: Sequence[Group], names: Sequence[str], looks: Styles, dense: Sequence[Entry]) -> Html:
    """How fast tickets learn: a row of charts per method, of one seed."""
    rows = []
    for method in dict.fromkeys(line.method for line in lines if not line.dense):
        held = [s for line in lines if line.method == method for s in line.entries if s.ticket.curve is not None]
        seed = min((s.seed for s in held), default=None)
        mine = [s for s in held if s.seed == seed]
        mine += [d for d in dense if mine and d.run == mine[0].run and d.ticket.curve is not None]
        told = [n for n in names if any(s.ticket.curve and s.ticket.curve.psnr.get(n) for s in mine)][:MAX_CURVES]
        if told:
            look = looks[method]
            drawn = (picture(charts.curves(mine, look, n), f"{method}: PSNR of {n} within rounds") for n in told)
            rows += [tag("h3", _swatch(method, looks), f"{method}, seed {seed}"), tag("div", *drawn, class_="charts")]
    if not rows:
        return missing("No ticket has scores within its round (evaluate.every_epochs).")
    few = f" At most {MAX_CURVES} sets are shown." if len(names) > MAX_CURVES else ""
    return figure(
        "PSNR on a few images while a round trains, against the steps of that round. The later the round, the stronger "
        f"its line; dashed: the dense round 0. Dot: the best step, which Definition 1 counts. One seed each.{few}",
        *rows,
        class_="rows",
    )


def density(lines: Sequence[Group], looks: Styles) -> Html:
    """Densities by block: inside the last ticket of each method, and round by round."""
    last = [line for line in charts.last_rounds(lines) if not line.dense]
    known = [(line, _first_seed(line)) for line in last if _first_seed(line).ticket.layer_density]
    if not known:
        return missing("No ticket tells the densities of its layers." if last else "No ticket here is pruned.")
    first = [
        _titled_chart(line.method, f", round {line.round_}, {line.alive / line.total:.1%}", looks, _density_by_kind(line, s))
        for line, s in known
    ]
    scale = picture(layer_density.scale(), "colours from 1% to 100% of weights alive")
    said = (
        "Share of weights that is alive. Rows: blocks from the network's input (top) to its output; columns: kinds of "
        "tensors inside a block; an empty place: no such tensor. Log colours, as the scale says. A red cross marks a "
        "collapsed tensor: none of its weights is alive. One seed per method."
    )
    parts = [scale, figure(said, *first)]
    second = []
    for line, s in known:
        rounds = [x for other in lines for x in other.entries if x.run == s.run]
        if len({x.ticket.round for x in rounds}) > 1 and not line.control:
            grid = layer_density.heat(layer_density.by_round(rounds), f"rounds {line.method}", "round")
            second.append(_titled_chart(line.method, "", looks, picture(grid, f"density by block and round, {line.method}")))
    if second:
        told = (
            "The same by round: a block's prunable weights together. A red cross: a tensor of the block is collapsed."
        )
        parts.append(figure(told, *second))
    return join(parts)


def _first_seed(line: Group) -> Entry:
    return min(line.entries, key=lambda s: s.seed)


def _density_by_kind(line: Group, shown: Entry) -> Html:
    grid = layer_density.heat(layer_density.by_kind(shown), f"kinds {line.method}")
    return picture(grid, f"density by block and kind of tensor, {line.method}")


def overlap(lines: Sequence[Group], looks: Styles) -> Html:
    """How far masks agree."""
    named = overlap_grid.choose_entries(lines)
    if len(named) < 2:
        return missing("Fewer than two pruned tickets have a known mask, so there is no overlap to show.")
    total = sum(s.mask is not None for line in lines if not line.dense for s in line.entries)
    said = (
        "Overlap of alive prunable weights, intersection over union (IoU). r: round, s: seed. Left: as it is. Right: "
        "minus what independent random masks of the same density, tensor by tensor, would have: blue is more than "
        "chance, white is chance. "
    )
    said += f"{len(named)} of {total} tickets are shown, last rounds first. " if len(named) < total else ""
    drawn = [
        picture(overlap_grid.grid(named), "overlap of masks, two by two"),
        picture(overlap_grid.grid(named, beyond=True), "overlap of masks beyond chance"),
    ]
    parts: list[str] = [figure(said, *drawn)]
    between = overlap_grid.overlap_of_seeds(lines, looks)
    if between is not None:
        told = (
            "Mean overlap between the seeds of one method and round. Dotted: expected by chance from the densities of "
            "the tensors. Seeds draw different first values, so what is above chance is structure."
        )
        parts.append(figure(told, picture(between, "overlap between seeds")))
    else:
        parts.append(missing("No method has masks of two seeds, so their overlap is unknown."))
    return join(parts)
