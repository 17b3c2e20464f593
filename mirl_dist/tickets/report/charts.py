"""Charts of scores as deterministic SVG, one colour and marker per method and text in the page's colour.

Scores are plotted against surviving weights, as differences to the dense network, and within rounds.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from mirl_dist.tickets.compare.entry import CONTROL_PREFIX, DENSE, Entry
from mirl_dist.tickets.compare.statistics import MAX_DB, Group, Statistic, scores_of

AXIS_LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
INK = "#0d1b2b"
"""Placeholder colour, replaced by the page's text colour (currentColor) for light and dark themes."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5539c", "#a67c00", "#2f93bd", "#8a63d2", "#8c6a5a")
# After Okabe and Ito, adjusted to a contrast ratio of at least 3 against white and near-black.
_MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">")
_CROSSES = ("x", "+", "1", "2", "3", "4")
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
_SETTINGS: Any = dict.fromkeys(_INKED, INK) | {
    "svg.fonttype": "none",
    "text.parse_math": False,  # user-defined names may contain "$"
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
}


class Style(NamedTuple):
    """Style of one method. line: 'none' for a control, which is a single ticket."""

    colour: str
    marker: str
    line: str


def assign_styles(methods: Iterable[str]) -> dict[str, Style]:
    """Assign a style to each method, in order: the dense network in the text colour, controls as crosses."""
    crosses, dashes = cycle(_CROSSES), ("-", "--", ":", "-.")
    styles = {DENSE: Style(INK, "none", "--")}
    for at, method in enumerate(m for m in dict.fromkeys(methods) if m != DENSE):
        turn, place = divmod(at, len(_COLOURS))
        if method.startswith(CONTROL_PREFIX):
            styles[method] = Style(_COLOURS[place], next(crosses), "none")
        else:
            styles[method] = Style(_COLOURS[place], _MARKERS[place], dashes[turn % len(dashes)])
    return styles


@contextmanager
def drawing() -> Iterator[None]:
    """Apply this style to charts drawn in the block, overriding the user's matplotlib settings."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        warnings.simplefilter("ignore", UserWarning)  # about glyphs missing in our font; the browser renders the text
        yield


def svg(figure: Figure, name: str) -> bytes:
    """Render a figure as deterministic SVG with text elements. name: makes its ids unique on the page."""
    mpl.rcParams["svg.hashsalt"] = f"mirl_dist {name}"
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = data.getvalue().decode("utf-8")
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r"""(?:#|url\(#)([\w-]+)""", text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", text)
    return re.sub(r"\n\s*", "\n", text).encode()


@lru_cache(maxsize=64)
def swatch(method: str, style: Style) -> bytes:
    """Render the line and marker of a method as a small SVG for legends."""
    with drawing():
        figure = Figure(figsize=(0.42, 0.17))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, 1), axes.set_ylim(-1, 1)
        axes.plot([0.08, 0.92], [0, 0], linestyle=style.line, color=style.colour)
        axes.plot([0.5], [0], linestyle="none", **marker_keywords(style))
        return svg(figure, f"swatch {method}")


def shorten(method: str) -> str:
    return method if len(method) <= 24 else method[:23] + "…"


def marker_keywords(style: Style, size: float = 6.5) -> Mapping[str, Any]:
    """Return keyword arguments of `Axes.plot` for the marker of a style."""
    cross = style.marker in _CROSSES
    return {
        "marker": style.marker,
        "color": style.colour,
        "markersize": size + 1.5 * cross,
        "markeredgewidth": 2.0 if cross else 0.8,
    }


def score(groups: Sequence[Group], styles: Mapping[str, Style], name: str, measure: str = "psnr") -> bytes:
    """Plot PSNR (dB) or SSIM of a 'task/set' over surviving weights (log): mean, SD and seeds; dense as a band."""
    with drawing():
        figure = Figure(figsize=(4.05, 3.0), layout="constrained")
        axes = figure.add_subplot(title=name, xlabel="alive weights", ylabel=AXIS_LABELS[measure])
        axes.grid(True)
        for method, style in styles.items():
            rows = [r for r in groups if r.method == method and name in getattr(r, measure)]
            if method == DENSE:
                _draw_dense(axes, [getattr(r, measure)[name] for r in rows])
            elif rows:
                _draw_method(axes, sorted(rows, key=lambda r: r.alive), style, name, measure)
        set_weight_axis(axes, [r.alive for r in groups])
        return svg(figure, f"score {name} {measure}")


def _draw_dense(axes: Axes, statistics: Sequence[Statistic]) -> None:
    for statistic in statistics:
        if math.isfinite(statistic.mean):
            axes.axhline(statistic.mean, color=INK, linestyle="--", linewidth=1.2, alpha=0.8, zorder=1)
            sd = statistic.sd or 0.0
            axes.axhspan(statistic.mean - sd, statistic.mean + sd, color=INK, alpha=0.12, linewidth=0, zorder=0)


def _draw_method(axes: Axes, rows: Sequence[Group], style: Style, name: str, measure: str) -> None:
    statistics = [getattr(r, measure)[name] for r in rows]
    x, mean = np.array([r.alive for r in rows]), np.array([s.mean for s in statistics], dtype=float)
    sd = np.array([s.sd or 0.0 for s in statistics], dtype=float)
    several = any(s.count > 1 for s in statistics)
    if several:
        scored = [s.ticket for r in rows for s in r.entries if name in scores_of(s.ticket)]
        dots = [(t.alive_total, getattr(scores_of(t)[name], measure)) for t in scored]
        axes.plot(*zip(*dots, strict=True), ".", color=style.colour, alpha=0.4, markersize=5, zorder=2)
    if style.line == "none" or len(rows) == 1:
        if several:
            axes.errorbar(x, mean, sd, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2, alpha=0.7, zorder=3)
    else:
        if several:
            axes.fill_between(x, mean - sd, mean + sd, color=style.colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(x, mean, linestyle=style.line, color=style.colour, zorder=3)
    axes.plot(x, mean, linestyle="none", **marker_keywords(style, 5 if len(rows) > 1 else 6.5), zorder=4)


def set_weight_axis(axes: Axes, weights: Sequence[float]) -> None:
    """Make the x axis logarithmic, for numbers of weights."""
    axes.set_xscale("log")
    low, high = max(1.0, min(weights, default=1.0)), max(1.0, max(weights, default=10.0))
    axes.set_xlim(low / 1.15, high * 1.15)
    wide = high / low > 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def distance(groups: Sequence[Group], styles: Mapping[str, Style], name: str) -> bytes:
    """Plot PSNR (dB) of a 'task/set' minus the dense network's: one row per group, with mean and SD."""
    with drawing():
        rows = [r for r in groups if name in r.against_dense]  # never a dense network
        figure = Figure(figsize=(4.05, 0.85 + 0.27 * max(len(rows), 2)), layout="constrained")
        axes = figure.add_subplot(title=name, xlabel="dB from the dense network")
        axes.axvline(0, color=INK, linestyle="--", linewidth=1.2, alpha=0.8)
        axes.grid(True, axis="x")
        for at, row in enumerate(rows):
            style, statistic = styles[row.method], row.against_dense[name]
            axes.plot([0, statistic.mean], [at, at], color=style.colour, linewidth=2.2, alpha=0.35)
            if statistic.sd is not None:
                axes.errorbar(statistic.mean, at, xerr=statistic.sd, fmt="none", ecolor=style.colour, capsize=2.5)
            axes.plot(statistic.mean, at, linestyle="none", **marker_keywords(style))
        axes.set_yticks(range(len(rows)), [_label(r) for r in rows])
        axes.set_ylim(max(len(rows), 2) - 0.5, -0.5)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return svg(figure, f"distance {name}")


def _label(group: Group) -> str:
    return f"{shorten(group.method)}, {EngFormatter(sep='')(float(f'{group.alive:.3g}'))}"


def curves(tickets: Sequence[Entry], style: Style, name: str) -> bytes:
    """Plot PSNR (dB) of a 'task/set' over the steps of a round: one line per ticket, the best step as a dot.

    Later rounds are more opaque; the dense ticket is dashed. tickets: of one method and seed, and the dense one. Steps
    count from the start of the round.
    """
    with drawing():
        figure = Figure(figsize=(3.0, 2.3), layout="constrained")
        axes = figure.add_subplot(title=name, xlabel="step of the round", ylabel="PSNR (dB)")
        axes.grid(True)
        drawn = [s for s in tickets if s.ticket.curve is not None and s.ticket.curve.psnr.get(name)]
        last = max((s.ticket.round for s in drawn), default=0)
        for s in sorted(drawn, key=lambda s: s.ticket.round):
            curve = s.ticket.curve
            assert curve is not None, "only tickets with a curve are drawn"
            steps = [at - s.ticket.began for at in curve.steps]
            strength = 1.0 if s.dense or not last else 0.25 + 0.75 * s.ticket.round / last
            line_style: dict[str, Any] = {"color": INK if s.dense else style.colour, "alpha": strength}
            values = [v if abs(v) <= MAX_DB else math.nan for v in curve.psnr[name]]
            axes.plot(steps, values, linestyle="--" if s.dense else "-", linewidth=1.3, **line_style)
            best = s.ticket.best_steps()[name]
            axes.plot(best, values[steps.index(best)], "o", markersize=5, **line_style)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return svg(figure, f"curves {name} {tickets[0].name if tickets else ''}")


def last_rounds(groups: Sequence[Group]) -> list[Group]:
    """Return the last round of each method, in the order of the methods, with controls at the end."""
    last: dict[str, Group] = {}
    for group in groups:
        if group.method not in last or group.round_ >= last[group.method].round_:
            last[group.method] = group
    return sorted(last.values(), key=lambda r: r.control)
