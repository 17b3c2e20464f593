"""HTML by construction: every text is escaped unless it already is HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

_EMPTY = ("br", "img", "input", "meta")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: str) -> Html:
    return text if isinstance(text, Html) else Html(html.escape(text))


def tag(name: str, *inside: str, **attributes: str | bool) -> Html:
    """An element. Attributes: `class_` is class, `data_x` is data-x; True stands alone, False is left out."""
    text = "".join(
        f" {key.strip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(value)}"')
        for key, value in attributes.items()
        if value is not False
    )
    if name in _EMPTY:
        return Html(f"<{name}{text}>")
    return Html(f"<{name}{text}>{''.join(map(escape, inside))}</{name}>")


def join(parts: Iterable[str], between: str = "\n") -> Html:
    return Html(between.join(map(escape, parts)))


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as the address of themselves. kind: their media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(svg: bytes, label: str) -> Html:
    """A chart inside the page, so that it takes the page's colours. said: what it shows, for who cannot see it."""
    return Html(svg.decode().replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1))


def row(cells: Sequence[str], name: str = "td", **attributes: str | bool) -> Html:
    """A row of a table; cells that are `td` or `th` elements already stay as they are."""
    placed = (c if isinstance(c, Html) and c.startswith(("<td", "<th")) else tag(name, c) for c in cells)
    return tag("tr", *placed, **attributes)


def table(head: Sequence[Sequence[str]], body: Sequence[Html], **attributes: str | bool) -> Html:
    """A table that scrolls sideways where it is too wide. head: rows of cells; body: rows."""
    above = tag("thead", *(row(cells, "th") for cells in head))
    return tag("div", tag("table", above, tag("tbody", *body), **attributes), class_="scroll")


def broken(name: str) -> Html:
    """A 'task/set' on two lines, for the head of a column; another text as it is."""
    task, slash, set_ = name.partition("/")
    return join([task, tag("br"), set_], "") if slash else escape(name)


def section(name: str, title: str, *inside: str) -> Html:
    return tag("section", tag("h2", title), join(inside), id=name)


def figure(caption: str, *inside: str, class_: str = "charts") -> Html:
    """Charts with a caption that says how to read them."""
    return tag("figure", tag("div", *inside, class_=class_), tag("figcaption", caption))
