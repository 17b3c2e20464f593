"""Draws the page's charts as inline SVG."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.tickets.report import charts, layer_density, overlap_grid
from mirl_dist.tickets.report.chart_style import Style

Styles = Mapping[str, Style]
MAX_CURVES = 6
"""Maximum number of 'task/set' with curves, per method."""


class Chart(NamedTuple):
    """A chart. heading: title next to the swatch of `method`; empty if the SVG contains its title."""

    svg: Markup
    method: str = ""
    heading: str = ""


class Figures(NamedTuple):
    """All charts of a page. Lists are empty if the tickets lack the data.

    scores: 'PSNR' or 'SSIM' -> charts. curves: a list of charts per method. overlapping: number of tickets in the
    overlap grids.
    """

    scores: dict[str, list[Chart]]
    distance: list[Chart]
    curves: list[list[Chart]]
    scale: Markup
    by_kind: list[Chart]
    by_round: list[Chart]
    overlap: list[Chart]
    overlapping: int
    between_seeds: list[Chart]


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def embed(svg: bytes, label: str) -> Markup:
    """Return an SVG as an inline element, so that it inherits the page's colours. label: for screen readers."""
    return Markup(svg.decode().replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def draw(groups: Sequence[Group], names: Sequence[str], styles: Styles) -> Figures:
    last = charts.last_rounds(groups)
    compared = [n for n in names if any(n in group.against_dense for group in last)]
    known = [(group, s) for group in last if not group.dense and (s := _first_seed(group)).ticket.layer_density]
    named = overlap_grid.choose_entries(groups)
    between = overlap_grid.overlap_of_seeds(groups, styles)
    return Figures(
        scores={word: [_score(groups, styles, n, word) for n in names] for word in ("PSNR", "SSIM")},
        distance=[
            Chart(embed(charts.distance(last, styles, n), f"distance of {n} to the dense network")) for n in compared
        ],
        curves=_curves(groups, names, styles),
        scale=embed(layer_density.scale(), "colours from 1% to 100% of weights alive"),
        by_kind=[_density_by_kind(group, s) for group, s in known],
        by_round=[chart for group, s in known for chart in _density_by_round(groups, group, s)],
        overlap=[
            Chart(embed(overlap_grid.grid(named), "overlap of masks, two by two")),
            Chart(embed(overlap_grid.grid(named, beyond=True), "overlap of masks beyond chance")),
        ]
        if len(named) > 1
        else [],
        overlapping=len(named),
        between_seeds=[] if between is None else [Chart(embed(between, "overlap between seeds"))],
    )


def _score(groups: Sequence[Group], styles: Styles, name: str, word: str) -> Chart:
    return Chart(embed(charts.score(groups, styles, name, word.lower()), f"{word} of {name} against alive weights"))


def _curves(groups: Sequence[Group], names: Sequence[str], styles: Styles) -> list[list[Chart]]:
    """Draw training curves: a row of charts per method, for its lowest seed and the dense network of the same run."""
    rows = []
    curved = [(group, s) for group in groups for s in group.entries if s.ticket.curve is not None]
    for method in dict.fromkeys(group.method for group, _ in curved if not group.dense):
        of_method = [s for group, s in curved if group.method == method]
        seed = min(s.seed for s in of_method)
        one_seed = [s for s in of_method if s.seed == seed]
        one_seed += [s for group, s in curved if group.dense and s.run == one_seed[0].run]
        tasks = [n for n in names if any(s.ticket.curve and s.ticket.curve.psnr.get(n) for s in one_seed)][:MAX_CURVES]
        drawn = [(charts.curves(one_seed, styles[method], n), f"{method}: PSNR of {n} within rounds") for n in tasks]
        if drawn:
            rows.append([Chart(embed(*each), method, f"{method}, seed {seed}") for each in drawn])
    return rows


def _first_seed(group: Group) -> Entry:
    return min(group.entries, key=lambda s: s.seed)


def _density_by_kind(group: Group, entry: Entry) -> Chart:
    grid = layer_density.heat(layer_density.by_kind(entry), f"kinds {group.method}")
    heading = f"{group.method}, round {group.round_}, {group.alive / group.total:.1%}"
    return Chart(embed(grid, f"density by block and kind of tensor, {group.method}"), group.method, heading)


def _density_by_round(groups: Sequence[Group], group: Group, entry: Entry) -> list[Chart]:
    """Draw densities over rounds; an empty list for a control, or for a run with a single round here."""
    rounds = [s for other in groups for s in other.entries if s.run == entry.run]
    if group.control or len({s.ticket.round for s in rounds}) < 2:
        return []
    grid = layer_density.heat(layer_density.by_round(rounds), f"rounds {group.method}", "round")
    return [Chart(embed(grid, f"density by block and round, {group.method}"), group.method, group.method)]
