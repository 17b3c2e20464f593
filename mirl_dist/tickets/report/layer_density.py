"""Where in the network weights survive: densities by block and kind of tensor, and by block and round."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.report.chart_style import drawing, svg

Grid = NDArray[np.float64]
_INNER = re.compile(r"^(?P<block>.+?)\.(?P<kind>(attn|ffn|norm\d*)\..+)$")
_ORDER = (
    *("norm1", "attn.qkv", "attn.qkv_dwconv", "attn.project_out", "attn.temperature"),
    *("norm2", "ffn.project_in", "ffn.dwconv", "ffn.project_out"),
)
_ALONE = {"": "conv", "proj": "conv", "body.0": "conv", "conv3x3": "conv", "linear_layer": "linear"}
LEAST = 0.01  # lower end of the colour scale; smaller densities have the same colour


class LayerLocation(NamedTuple):
    """The location of a tensor: its block ('encoder_level1.0', 'down1_2') and its kind in it ('attn.qkv', 'conv')."""

    block: str
    kind: str


def locate_layer(name: str) -> LayerLocation:
    """Derive a tensor's location from its name. Blocks are transformer blocks, or single layers between them."""
    stem, _, last = name.rpartition(".")
    if last not in ("weight", "bias"):
        stem, last = name, ""
    inner = _INNER.match(stem)
    if inner:
        block, kind = inner["block"], inner["kind"].removesuffix(".body")
    else:
        block, _, rest = stem.partition(".")
        kind = _ALONE.get(rest, rest)
    return LayerLocation(block, kind + " bias" * (last == "bias"))


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
    kinds = sorted({locate_layer(name).kind for name in names}, key=_column_order)
    return _sum_densities(tuple(kinds), [(name, locate_layer(name).kind, entry) for name in names])


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
    rows = tuple(dict.fromkeys(locate_layer(name).block for name, _, _ in tensors))
    alive, size = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
    collapsed = np.zeros(alive.shape, dtype=bool)
    for name, column, entry in tensors:
        at, share = (rows.index(locate_layer(name).block), columns.index(column)), entry.ticket.layer_density[name]
        alive[at] += share * entry.parts[name]
        size[at] += entry.parts[name]
        collapsed[at] |= name in entry.ticket.collapsed or share == 0
    shares = np.divide(alive, size, out=np.full(alive.shape, np.nan), where=size > 0)
    return Density(rows, columns, shares, collapsed)


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
        _label_axes(axes, density, below)
        return svg(figure, f"heat {name}")


def _label_axes(axes: Axes, density: Density, below: str) -> None:
    height, width = density.share.shape
    axes.set_yticks(range(height), density.rows, fontsize=8)
    if below:
        axes.set_xlabel(below)
        axes.set_xticks(range(width), density.columns, fontsize=8)
    else:
        axes.xaxis.tick_top()
        axes.set_xticks(range(width), density.columns, fontsize=8, rotation=90)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


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
