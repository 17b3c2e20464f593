"""How charts look: one colour and marker per method, text in the page's colour, equal bytes for equal input."""

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

from mirl_dist.tickets.compare.entry import DENSE
from mirl_dist.tickets.compare.grouping import CONTROL_PREFIX

INK = "#0d1b2b"
"""Drawn with this, text and lines take the colour of the page's text (currentColor), on light and dark."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5539c", "#a67c00", "#2f93bd", "#8a63d2", "#8c6a5a")
# After Okabe and Ito, darkened or lightened to a contrast of 3 with white and with near-black.
_MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">")
_CROSSES = ("x", "+", "1", "2", "3", "4")
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from users, and may hold dollars
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
    """How one method is drawn. line: 'none' for a control, which is a single ticket."""

    colour: str
    marker: str
    line: str


def assign_styles(methods: Iterable[str]) -> dict[str, Style]:
    """Method -> its look, in the order of the methods: the whole network in the colour of text, controls as crosses."""
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
    """Inside, charts are drawn in our style, whatever the user's own settings are."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        warnings.simplefilter("ignore", UserWarning)  # of letters that our font lacks: the page's fonts draw the text
        yield


def svg(figure: Figure, name: str) -> bytes:
    """A figure as SVG with text as text, deterministic; `name` tells its ids from other figures' on one page."""
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
    """The line and marker of a method as a small SVG, for legends."""
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
    """Keywords of `Axes.plot` for the marker of a look."""
    cross = style.marker in _CROSSES
    return {
        "marker": style.marker,
        "color": style.colour,
        "markersize": size + 1.5 * cross,
        "markeredgewidth": 2.0 if cross else 0.8,
    }
