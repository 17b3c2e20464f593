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


def legend(styles: Styles) -> Html:
    return tag("div", *(tag("span", _swatch(m, styles), m) for m in styles), class_="legend")


def _swatch(method: str, styles: Styles) -> Html:
    return picture(swatch(method, styles[method]), "")


def _titled_chart(method: str, more: str, styles: Styles, chart: Html) -> Html:
    return tag("div", tag("p", _swatch(method, styles), f"{method}{more}"), chart)


def scores(groups: Sequence[Group], names: Sequence[str], styles: Styles) -> Html:
    """PSNR and SSIM against alive weights."""
    if not names:
        return missing("No ticket has scores.")
    parts = [legend({group.method: styles[group.method] for group in groups})]
    for measure, word in (("psnr", "PSNR"), ("ssim", "SSIM")):
        drawn = [
            picture(charts.score(groups, styles, n, measure), f"{word} of {n} against alive weights") for n in names
        ]
        parts.append(
            figure(
                f"{word} against the weights that are not pruned, unprunable ones included; log axis, rounds go from "
                "right to left. Line: mean over seeds; shade: one standard deviation; faint dots: single seeds. "
                "Dashed with its shade: the dense network. Crosses without a line: controls.",
                *drawn,
            )
        )
    return join(parts)


def distance(groups: Sequence[Group], names: Sequence[str], styles: Styles) -> Html:
    """What the last ticket of each method gains or loses."""
    last = charts.last_rounds(groups)
    known = [n for n in names if any(n in group.against_dense for group in last)]
    if not known:
        return missing("No ticket has a dense network of its seed, training, data and network to be compared with.")
    return figure(
        "PSNR of the last ticket of each method minus that of the dense network of the same seed, with its alive "
        "weights. Mark: mean over seeds; whiskers: one standard deviation of the paired differences, none with one "
        "seed. Right of the dashed line is better than dense.",
        *(picture(charts.distance(last, styles, n), f"distance of {n} to the dense network") for n in known),
    )


def curves(groups: Sequence[Group], names: Sequence[str], styles: Styles, dense: Sequence[Entry]) -> Html:
    """How fast tickets learn: a row of charts per method, of one seed."""
    rows = []
    for method in dict.fromkeys(group.method for group in groups if not group.dense):
        curved = [s for group in groups if group.method == method for s in group.entries if s.ticket.curve is not None]
        seed = min((s.seed for s in curved), default=None)
        one_seed = [s for s in curved if s.seed == seed]
        one_seed += [d for d in dense if one_seed and d.run == one_seed[0].run and d.ticket.curve is not None]
        tasks = [n for n in names if any(s.ticket.curve and s.ticket.curve.psnr.get(n) for s in one_seed)][:MAX_CURVES]
        if tasks:
            style = styles[method]
            drawn = (picture(charts.curves(one_seed, style, n), f"{method}: PSNR of {n} within rounds") for n in tasks)
            rows += [tag("h3", _swatch(method, styles), f"{method}, seed {seed}"), tag("div", *drawn, class_="charts")]
    if not rows:
        return missing("No ticket has scores within its round (evaluate.every_epochs).")
    few = f" At most {MAX_CURVES} sets are shown." if len(names) > MAX_CURVES else ""
    return figure(
        "PSNR on a few images while a round trains, against the steps of that round. The later the round, the stronger "
        f"its line; dashed: the dense round 0. Dot: the best step, which Definition 1 counts. One seed each.{few}",
        *rows,
        class_="rows",
    )


def density(groups: Sequence[Group], styles: Styles) -> Html:
    """Densities by block: inside the last ticket of each method, and round by round."""
    last = [group for group in charts.last_rounds(groups) if not group.dense]
    known = [(group, _first_seed(group)) for group in last if _first_seed(group).ticket.layer_density]
    if not known:
        return missing("No ticket tells the densities of its layers." if last else "No ticket here is pruned.")
    first = [
        _titled_chart(
            group.method, f", round {group.round_}, {group.alive / group.total:.1%}", styles, _density_by_kind(group, s)
        )
        for group, s in known
    ]
    scale = picture(layer_density.scale(), "colours from 1% to 100% of weights alive")
    caption = (
        "Share of weights that is alive. Rows: blocks from the network's input (top) to its output; columns: kinds of "
        "tensors inside a block; an empty place: no such tensor. Log colours, as the scale says. A red cross marks a "
        "collapsed tensor: none of its weights is alive. One seed per method."
    )
    parts = [scale, figure(caption, *first)]
    second = []
    for group, s in known:
        rounds = [x for other in groups for x in other.entries if x.run == s.run]
        if len({x.ticket.round for x in rounds}) > 1 and not group.control:
            grid = layer_density.heat(layer_density.by_round(rounds), f"rounds {group.method}", "round")
            second.append(
                _titled_chart(group.method, "", styles, picture(grid, f"density by block and round, {group.method}"))
            )
    if second:
        caption_by_round = (
            "The same by round: a block's prunable weights together. A red cross: a tensor of the block is collapsed."
        )
        parts.append(figure(caption_by_round, *second))
    return join(parts)


def _first_seed(group: Group) -> Entry:
    return min(group.entries, key=lambda s: s.seed)


def _density_by_kind(group: Group, entry: Entry) -> Html:
    grid = layer_density.heat(layer_density.by_kind(entry), f"kinds {group.method}")
    return picture(grid, f"density by block and kind of tensor, {group.method}")


def overlap(groups: Sequence[Group], styles: Styles) -> Html:
    """How far masks agree."""
    named = overlap_grid.choose_entries(groups)
    if len(named) < 2:
        return missing("Fewer than two pruned tickets have a known mask, so there is no overlap to show.")
    total = sum(s.mask is not None for group in groups if not group.dense for s in group.entries)
    caption = (
        "Overlap of alive prunable weights, intersection over union (IoU). r: round, s: seed. Left: as it is. Right: "
        "minus what independent random masks of the same density, tensor by tensor, would have: blue is more than "
        "chance, white is chance. "
    )
    caption += f"{len(named)} of {total} tickets are shown, last rounds first. " if len(named) < total else ""
    drawn = [
        picture(overlap_grid.grid(named), "overlap of masks, two by two"),
        picture(overlap_grid.grid(named, beyond=True), "overlap of masks beyond chance"),
    ]
    parts: list[str] = [figure(caption, *drawn)]
    between = overlap_grid.overlap_of_seeds(groups, styles)
    if between is not None:
        caption_of_seeds = (
            "Mean overlap between the seeds of one method and round. Dotted: expected by chance from the densities of "
            "the tensors. Seeds draw different first values, so what is above chance is structure."
        )
        parts.append(figure(caption_of_seeds, picture(between, "overlap between seeds")))
    else:
        parts.append(missing("No method has masks of two seeds, so their overlap is unknown."))
    return join(parts)
