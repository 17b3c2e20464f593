"""Charts of mask overlap: pairwise between tickets, and between seeds per round, compared with random masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mirl_dist.tickets.compare import mask_overlap
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report.chart_style import Style, drawing, marker_keywords, svg
from mirl_dist.tickets.report.charts import set_weight_axis

Grid = NDArray[np.float64]
MAX_ENTRIES = 24
"""Maximum number of tickets in a grid."""


class NamedEntry(NamedTuple):
    """A ticket in a grid, with its label."""

    name: str
    entry: Entry


def choose_entries(groups: Sequence[Group]) -> list[NamedEntry]:
    """Choose at most MAX_ENTRIES pruned tickets with masks: each method's last round, and some before it."""
    methods: dict[str, list[Group]] = {}
    for group in groups:
        if not group.dense and any(s.mask is not None for s in group.entries):
            methods.setdefault(group.method, []).append(group)
    seeds = max((len(group.entries) for rounds in methods.values() for group in rounds), default=1)
    each = max(1, MAX_ENTRIES // max(1, seeds * len(methods)))
    picked = [rounds[-1 - i] for rounds in methods.values() for i in _evenly_spaced(len(rounds), each)]
    named = []
    for group in sorted(picked, key=groups.index):
        short = group.method if len(group.method) <= 24 else group.method[:23] + "…"
        masked = sorted((s for s in group.entries if s.mask is not None), key=lambda s: s.seed)
        named += [NamedEntry(f"{short} r{group.round_} s{s.seed}", s) for s in masked]
    return named[:MAX_ENTRIES]


def _evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced positions below `count`, always including 0."""
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)}) if count > most else [*range(count)]


def grid(named: Sequence[NamedEntry], beyond: bool = False) -> bytes:
    """Draw the pairwise IoU of masks as SVG. beyond: subtract the expected IoU of independent random masks."""
    entries = [x.entry for x in named]
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
        axes.set_yticks(range(len(entries)), [x.name for x in named], fontsize=8)
        axes.set_xticks(range(len(entries)), [x.name for x in named], fontsize=8, rotation=90)
        axes.tick_params(length=0)
        for edge in axes.spines.values():
            edge.set_visible(False)
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
