"""Charts of masks as SVG: where in the network weights survive, and how masks of different tickets overlap."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mirl_dist.tickets.compare import mask_overlap
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report.charts import Style, drawing, marker_keywords, set_weight_axis, shorten, svg

Grid = NDArray[np.float64]
_INNER = re.compile(r"^(?P<block>.+?)\.(?P<kind>(attn|ffn|norm\d*)\..+)$")
_ORDER = (
    *("norm1", "attn.qkv", "attn.qkv_dwconv", "attn.project_out", "attn.temperature"),
    *("norm2", "ffn.project_in", "ffn.dwconv", "ffn.project_out"),
)
_ALONE = {"": "conv", "proj": "conv", "body.0": "conv", "conv3x3": "conv", "linear_layer": "linear"}
MAX_ENTRIES = 24
"""Maximum number of tickets in a grid."""
LEAST = 0.01  # lower end of the colour scale; smaller densities have the same colour


def locate_layer(name: str) -> tuple[str, str]:
    """Derive a tensor's block ('encoder_level1.0', 'down1_2') and its kind in it ('attn.qkv', 'conv') from its name.

    Blocks are transformer blocks, or single layers between them.
    """
    stem, _, last = name.rpartition(".")
    if last not in ("weight", "bias"):
        stem, last = name, ""
    inner = _INNER.match(stem)
    if inner:
        block, kind = inner["block"], inner["kind"].removesuffix(".body")
    else:
        block, _, rest = stem.partition(".")
        kind = _ALONE.get(rest, rest)
    return block, kind + " bias" * (last == "bias")


class Density(NamedTuple):
    """Densities on a grid. rows: blocks, in the network's order.

    share: surviving / all weights of a cell, float64 (rows, columns), NaN for a cell without a tensor. collapsed: cells
    with a tensor that has no surviving weight, bool (rows, columns).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    share: Grid
    collapsed: NDArray[np.bool_]


def by_kind(entry: Entry) -> Density:
    """Return the densities of one ticket by block and kind of tensor."""
    names = [name for name in entry.parts if name in entry.ticket.layer_density]
    kinds = sorted({locate_layer(name)[1] for name in names}, key=_column_order)
    return _sum_densities(tuple(kinds), [(name, locate_layer(name)[1], entry) for name in names])


def by_round(tickets: Sequence[Entry]) -> Density:
    """Return the densities of one run's tickets by block and round."""
    tickets = sorted(tickets, key=lambda s: s.ticket.round)
    cells = [(n, str(s.ticket.round), s) for s in tickets for n in s.parts if n in s.ticket.layer_density]
    return _sum_densities(tuple(str(s.ticket.round) for s in tickets), cells)


def _column_order(kind: str) -> tuple[int, int, str]:
    base = kind.removesuffix(" bias")
    return (_ORDER.index(base) if base in _ORDER else len(_ORDER), kind != base, kind)


def _sum_densities(columns: tuple[str, ...], tensors: Sequence[tuple[str, str, Entry]]) -> Density:
    """Aggregate densities over the tensors of each cell. tensors: (name, column, ticket with its density)."""
    rows = tuple(dict.fromkeys(locate_layer(name)[0] for name, _, _ in tensors))
    alive, size = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
    collapsed = np.zeros(alive.shape, dtype=bool)
    for name, column, entry in tensors:
        at, share = (rows.index(locate_layer(name)[0]), columns.index(column)), entry.ticket.layer_density[name]
        alive[at] += share * entry.parts[name]
        size[at] += entry.parts[name]
        collapsed[at] |= name in entry.ticket.collapsed or share == 0
    shares = np.divide(alive, size, out=np.full(alive.shape, np.nan), where=size > 0)
    return Density(rows, columns, shares, collapsed)


def _set_cell_labels(axes: Axes, rows: Sequence[str], columns: Sequence[str], rotation: int = 90) -> None:
    """Label the rows and columns of a grid of cells, without ticks and frame."""
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=rotation)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def heat(density: Density, name: str, below: str = "") -> bytes:
    """Draw a grid of densities as SVG, with log colours from LEAST to 1; a red cross marks a collapsed tensor.

    below: axis label of the columns, whose names are then below the grid; if empty, they are above it, rotated.
    """
    with drawing():
        height, width = density.share.shape
        left, above, under = 1.6, 0.1 if below else 1.25, 0.45 if below else 0.1
        size = (left + 0.22 * max(width, 3) + 0.1, under + 0.17 * height + above)
        figure = Figure(figsize=size)
        axes = figure.add_axes((left / size[0], under / size[1], 0.22 * width / size[0], 0.17 * height / size[1]))
        drawn = np.where(density.share > 0, density.share, np.nan)
        axes.imshow(drawn, cmap="viridis", norm=LogNorm(LEAST, 1.0), aspect="auto", interpolation="none")
        for row, column in zip(*np.nonzero(density.collapsed), strict=True):
            axes.plot(column, row, "x", color="white", markersize=7, markeredgewidth=3.4)
            axes.plot(column, row, "x", color="#d7191c", markersize=5.5, markeredgewidth=1.8)
        if below:
            axes.set_xlabel(below)
        else:
            axes.xaxis.tick_top()
        _set_cell_labels(axes, density.rows, density.columns, rotation=0 if below else 90)
        return svg(figure, f"heat {name}")


def scale() -> bytes:
    """Draw the colour bar of `heat` as SVG."""
    with drawing():
        figure = Figure(figsize=(3.4, 0.42))
        axes = figure.add_axes((0.07, 0.62, 0.86, 0.34))
        axes.imshow(np.linspace(0, 1, 128)[None], cmap="viridis", aspect="auto", interpolation="none")
        ticks = {LEAST: f"≤ {LEAST:.0%}", 0.03: "3%", 0.1: "10%", 0.3: "30%", 1.0: "100%"}
        axes.set_xticks([127 * (1 - np.log10(t) / np.log10(LEAST)) for t in ticks], list(ticks.values()), fontsize=9)
        axes.set_yticks([])
        axes.tick_params(length=2)
        return svg(figure, "scale of densities")


def choose_entries(groups: Sequence[Group]) -> list[tuple[str, Entry]]:
    """Choose and name at most MAX_ENTRIES pruned tickets with masks: each method's last round, and some before it."""
    methods: dict[str, list[Group]] = {}
    for group in groups:
        if not group.dense and any(s.mask is not None for s in group.entries):
            methods.setdefault(group.method, []).append(group)
    seeds = max((len(group.entries) for rounds in methods.values() for group in rounds), default=1)
    each = max(1, MAX_ENTRIES // max(1, seeds * len(methods)))
    picked = [
        rounds[-1 - int(i)]
        for rounds in methods.values()
        for i in np.unique(np.linspace(0, len(rounds) - 1, min(each, len(rounds))).round())
    ]
    named: list[tuple[str, Entry]] = []
    for group in sorted(picked, key=groups.index):
        masked = sorted((s for s in group.entries if s.mask is not None), key=lambda s: s.seed)
        named += [(f"{shorten(group.method)} r{group.round_} s{s.seed}", s) for s in masked]
    return named[:MAX_ENTRIES]


def grid(named: Sequence[tuple[str, Entry]], beyond: bool = False) -> bytes:
    """Draw the pairwise IoU of masks as SVG. beyond: subtract the expected IoU of independent random masks."""
    entries = [s for _, s in named]
    values = mask_overlap.iou(entries)
    if beyond:
        values -= mask_overlap.expected_iou(entries)
        np.fill_diagonal(values, np.nan)
    with drawing():
        side, margin = max(0.2 * len(entries), 1.5), 2.2
        size = (side + margin + 0.1, side + margin + 0.35)
        figure = Figure(figsize=size)
        axes = figure.add_axes((margin / size[0], margin / size[1], side / size[0], side / size[1]))
        norm = TwoSlopeNorm(0, -0.5, 0.5) if beyond else Normalize(0, 1)
        axes.imshow(values, cmap="RdBu" if beyond else "cividis", norm=norm, aspect="auto", interpolation="none")
        _write_percents(axes, values, beyond)
        labels = [name for name, _ in named]
        _set_cell_labels(axes, labels, labels)
        title = "IoU minus chance, in %" if beyond else "IoU of masks, in %"
        figure.text(margin / size[0], 1 - 0.16 / size[1], title, weight="bold", va="center")
        return svg(figure, f"overlap {beyond}")


def _write_percents(axes: Axes, values: Grid, beyond: bool) -> None:
    """Write each known value in its cell, in percent."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = abs(value) > 0.3 if beyond else value < 0.55
            text = str(round(100 * value))
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else "#111111")


def overlap_of_seeds(groups: Sequence[Group], styles: Mapping[str, Style]) -> bytes | None:
    """Plot the IoU between seeds over surviving weights as SVG; dotted: random masks. None without pairs of seeds."""
    pairs = _seed_overlaps(groups)
    if not pairs:
        return None
    with drawing():
        figure = Figure(figsize=(4.05, 3.0), layout="constrained")
        axes = figure.add_subplot(title="overlap between seeds", xlabel="alive weights", ylabel="IoU")
        axes.grid(True)
        for method, points in pairs.items():
            x, measured, chance = np.array(sorted(points)).T
            style, single = styles[method], len(points) == 1
            axes.plot(x, chance, marker="_" if single else "none", markersize=11, linestyle=":", color=style.colour)
            axes.plot(x, measured, linestyle=style.line, color=style.colour)
            axes.plot(x, measured, linestyle="none", **marker_keywords(style, 5))
        axes.set_ylim(0, 1.02)
        set_weight_axis(axes, [x for points in pairs.values() for x, _, _ in points])
        return svg(figure, "overlap of seeds")


def _seed_overlaps(groups: Sequence[Group]) -> dict[str, list[tuple[float, float, float]]]:
    """Return method -> (surviving weights, mean IoU, mean expected IoU) per round with at least two seeds."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for group in groups:
        entries = list({s.seed: s for s in group.entries if s.mask is not None}.values())
        if group.dense or len(entries) < 2:
            continue
        upper = np.triu_indices(len(entries), 1)
        measured, chance = mask_overlap.iou(entries)[upper], mask_overlap.expected_iou(entries)[upper]
        if np.isfinite(measured).all() and np.isfinite(chance).all():
            points.setdefault(group.method, []).append((group.alive, float(measured.mean()), float(chance.mean())))
    return points
