"""Chart style: one colour and marker per method, text in the page's colour, deterministic SVG output."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from mirl_dist.tickets.compare.entry import CONTROL_PREFIX, DENSE

INK = "#0d1b2b"
"""Placeholder colour, replaced by the page's text colour (currentColor) for light and dark themes."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5539c", "#a67c00", "#2f93bd", "#8a63d2", "#8c6a5a")
# After Okabe and Ito, adjusted to a contrast ratio of at least 3 against white and near-black.
_MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">")
_CROSSES = ("x", "+", "1", "2", "3", "4")
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # user-defined names may contain "$"
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": INK,
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
    styles: dict[str, Style] = {}
    named = [m for m in dict.fromkeys(methods) if m != DENSE]
    crosses = 0
    for at, method in enumerate(named):
        colour = _COLOURS[at % len(_COLOURS)]
        if method.startswith(CONTROL_PREFIX):
            styles[method] = Style(colour, _CROSSES[crosses % len(_CROSSES)], "none")
            crosses += 1
        else:
            dashes = ("-", "--", ":", "-.")
            styles[method] = Style(colour, _MARKERS[at % len(_MARKERS)], dashes[at // len(_COLOURS) % len(dashes)])
    return {DENSE: Style(INK, "none", "--"), **styles}


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
        line = "none" if style.line == "none" else style.line
        axes.plot([0.08, 0.92], [0, 0], linestyle=line, color=style.colour)
        axes.plot([0.5], [0], linestyle="none", **marker_keywords(style))
        return svg(figure, f"swatch {method}")


def marker_keywords(style: Style, size: float = 6.5) -> Mapping[str, Any]:
    """Return keyword arguments of `Axes.plot` for the marker of a style."""
    cross = style.marker in _CROSSES
    return {
        "marker": style.marker,
        "color": style.colour,
        "markersize": size + 1.5 * cross,
        "markeredgewidth": 2.0 if cross else 0.8,
    }
