"""The page: whole, self-contained, honest about what it lacks, and deaf to what names want from it."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest

from mirl_dist.data import image_strip
from mirl_dist.errors import UserError
from mirl_dist.tickets.compare import caveats, judge, statistics
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.report import latex, page, page_gallery, text_tables
from tests.factories import comparison, entry

MADE = "2030-01-02 03:04 UTC"
ONE = {"derain/Rain100L": 29.0}
SECTIONS = [
    *("compared", "caveats", "scores", "judgements", "weights", "distance", "pictures", "density", "overlap"),
    *("curves", "downloads"),
]
EMPTY = ("br", "img", "input", "meta")
SCRIPT = (files("mirl_dist.tickets.report") / "templates/tickets.js").read_text().rstrip()


class Read(HTMLParser):
    """A page taken apart: elements with their attributes and texts; tags that do not close in order are `wrong`."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, str] = {}
        self.all_text = ""
        self.cells: list[list[tuple[str, str]]] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(html)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.elements.append((tag, found))
        if tag == "section":
            self._section = found["id"]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append((found.get("class", ""), ""))
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "script" in self._open or "style" in self._open:
            return
        self.all_text += data
        self.text[self._section] = self.text.get(self._section, "") + data
        if ("td" in self._open or "th" in self._open) and self.cells and self.cells[-1]:
            kind, said = self.cells[-1][-1]
            self.cells[-1][-1] = (kind, (said + data).strip())

    def named(self, tag: str) -> list[dict[str, str]]:
        return [found for name, found in self.elements if name == tag]


def read(tickets: Sequence[Entry]) -> Read:
    return Read(page.html(tickets, "A comparison", MADE))


@pytest.fixture(scope="module")
def tickets() -> list[Entry]:
    return comparison(("MIR-L-G", "MIR-L-LW", "control reinit"), rounds=2, tasks=ONE, side=24)


@pytest.fixture(scope="module")
def html(tickets: list[Entry]) -> str:
    return page.html(tickets, "A comparison", MADE)


@pytest.fixture(scope="module")
def whole(html: str) -> Read:
    return Read(html)


def test_every_section_is_there_and_every_element_closes(whole: Read) -> None:
    assert whole.wrong == []
    sections = [s["id"] for s in whole.named("section")]
    assert sections == SECTIONS
    assert [a["href"] for a in whole.named("a") if "download" not in a] == [f"#{name}" for name in sections]
    assert MADE in whole.all_text
    assert len(whole.named("figcaption")) == len(whole.named("figure")) >= 8, "every figure says how to read it"


def test_nothing_is_fetched_from_anywhere(whole: Read, html: str) -> None:
    addresses = [v for _, found in whole.elements for k, v in found.items() if k in ("src", "href", "xlink:href")]
    assert len(addresses) > 10
    assert [a[:60] for a in addresses if not a.startswith(("data:", "#"))] == []
    assert not {"link", "iframe", "object", "base", "form"} & {name for name, _ in whole.elements}
    assert re.findall(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", html) == []
    policy = next(m["content"] for m in whole.named("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'"), "and the browser is told to hold to it"


def test_what_is_compared_is_told_in_full_words(whole: Read, tickets: list[Entry]) -> None:
    told = whole.text["compared"]
    for s in tickets:
        assert s.run in told and s.ticket.manifest_digest[:12] in told and s.ticket.fingerprint[:12] in told
    assert tickets[0].ticket.protocol in told
    assert "torch 2.13.0" in told and "2 seeds (0, 1)" in told
    section = whole.text["caveats"].lower()
    assert all(note.lower() in section for note in caveats.list_caveats(tickets))


def test_the_best_ticket_of_a_column_is_bold_and_the_dense_network_never(whole: Read, tickets: list[Entry]) -> None:
    pruned = [line for line in statistics.group_entries(tickets) if line.method != DENSE]
    best = max(line.psnr["derain/Rain100L"].mean for line in pruned)
    bold = [found for name, found in whole.elements if name == "b"]
    assert len(bold) == 2, "one PSNR and one SSIM"
    row = next(r for r in whole.cells if len(r) > 5 and f"{best:.2f}" in r[5][1])
    assert row[0][1] != DENSE


def test_the_papers_figures_stand_in_columns_of_their_own(whole: Read, tickets: list[Entry]) -> None:
    rows = [r for r in whole.cells if any("theirs" in kind for kind, _ in r)]
    mir_l_g = [r for r in rows if r[0][1] == "MIR-L-G"]
    theirs = [[said for kind, said in r if "theirs" in kind] for r in mir_l_g]
    assert theirs == [["", ""], ["MIR-L-G4.7M", "34.720.9652"]], "beside the sparsest round alone"
    ours = [said for r in mir_l_g for kind, said in r if "theirs" not in kind]
    assert not any("34.72" in said for said in ours)
    assert "published (full size, other training)" in whole.text["scores"]
    without = read(comparison(("MIR-L-G",), (0,), 1, tasks={"derain/rain": 29.0}))
    assert not any("theirs" in kind for r in without.cells for kind, _ in r), "no figure fits: no columns"


def test_definition_1_is_judged_with_its_controls(whole: Read, tickets: list[Entry]) -> None:
    found = next(j for j in judge.judge(tickets) if (j.method, j.round_) == ("MIR-L-G", 2))
    gain, control = found.answers["derain/Rain100L"].gain, found.controls[0]
    assert gain is not None and control.mean is not None
    row = next(r for r in whole.cells if len(r) == 7 and r[0][1] == "MIR-L-G" and r[1][1] == "2")
    assert row[3][1] == found.overall
    assert row[4][1].startswith(f"{gain.mean:+.2f}".replace("-", "−"))
    assert (
        row[5][1].startswith(f"{control.mean.mean:+.2f}".replace("-", "−"))
        and control.verdict in row[5][1] + " the spread"
    )
    assert "random_layer, random_global" in whole.text["judgements"].split("not run:")[1]


def test_pictures_stand_side_by_side_with_the_psnr_of_what_is_shown(whole: Read, tickets: list[Entry]) -> None:
    last = next(s for s in tickets if (s.method, s.seed, s.ticket.round) == ("MIR-L-G", 0, 2))
    assert last.strip is not None
    degraded, restored, clean = (i.astype(float) for i in image_strip.rows(last.strip)[0].images)
    row = next(r for r in whole.cells if r and r[-1][1] == "clean" and r[0][1].endswith("dB"))
    wanted = [10 * np.log10(255**2 / np.mean((x - clean) ** 2)) for x in (degraded, restored)]
    assert [said for _, said in row[:2]] == [f"{w:.2f} dB" for w in wanted]
    assert len(row) == 6, "degraded, three methods, dense, clean"
    assert "derain/Rain100L astronaut" in whole.text["pictures"] and "Pixels are exact" in whole.text["pictures"]
    assert all(i["src"].startswith("data:image/png;base64,") for i in whole.named("img"))


def test_pictures_are_limited_in_number_and_size_and_the_page_says_so(
    tickets: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_gallery, "MAX_ROWS", 1)
    few = read(tickets).text["pictures"]
    assert "1 of 2 images are shown" in few and "cat" not in few
    monkeypatch.setattr(page_gallery, "MAX_ROWS", 12)
    monkeypatch.setattr(page_gallery, "MAX_BYTES", 10_000)
    small = read(tickets)
    assert "JPEG" in small.text["pictures"]
    assert {i["src"].partition(";")[0] for i in small.named("img")} == {"data:image/jpeg"}
    assert "More images would make the page too large" in small.text["pictures"]


def test_tables_can_be_downloaded(whole: Read, tickets: list[Entry]) -> None:
    files = {a["download"]: base64.b64decode(a["href"].partition(",")[2]) for a in whole.named("a") if "download" in a}
    assert files == {"tickets.csv": text_tables.csv(tickets), "tables.tex": latex.tables(tickets).encode()}


def test_the_same_tickets_make_the_same_page(html: str, tickets: list[Entry]) -> None:
    assert page.html(tickets, "A comparison", MADE) == html


HOSTILE = '"><img src=x onerror=alert(1)></style></svg><script>alert(2)</script> $\\frac{$ 票 \udcff\x00-->'


def test_names_of_users_are_shown_and_do_nothing() -> None:
    mine = comparison((HOSTILE,), (0,), 1, tasks=ONE)
    strip = image_strip.strip(
        [image_strip.Row(f"derain/Rain100L {HOSTILE[:60]}", (np.zeros((16, 16, 3), np.uint8),) * 3)]
    )
    mine = [s._replace(run=f"{HOSTILE}{i}", strip=strip) for i, s in enumerate(mine)]
    html = page.html(mine, HOSTILE, MADE)
    found = Read(html)
    assert found.wrong == []
    assert len(found.named("script")) == 1 and SCRIPT in html
    assert [k for _, attributes in found.elements for k in attributes if k.startswith("on")] == []
    assert [i["src"] for i in found.named("img") if not i["src"].startswith("data:")] == []
    assert found.all_text.count("<script>alert(2)</script> $\\frac{$ 票 \ufffd\ufffd-->") > 5
    html.encode()  # nothing that no file can hold


def _without(**changes: object) -> Callable[[list[Entry]], list[Entry]]:
    return lambda tickets: [s._replace(**changes) for s in tickets]


def _told(**changes: object) -> Callable[[list[Entry]], list[Entry]]:
    return lambda tickets: [s._replace(ticket=s.ticket.model_copy(update=changes)) for s in tickets]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda t: _told(curve=None, layer_density={})(_without(mask=None, strip=None)(t)),
            {
                "overlap": "Fewer than two pruned tickets have a known mask",
                "pictures": "No ticket came with pictures",
                "curves": "No ticket has scores within its round",
                "density": "No ticket tells the densities",
                "caveats": "One seed only",
            },
        ),
        (
            lambda t: [s for s in _without(strip=b"no picture")(t) if s.method != DENSE],
            {
                "compared": "There is no dense network",
                "distance": "No ticket has a dense network",
                "pictures": "is no PNG file",
                "overlap": "No method has masks of two seeds",
            },
        ),
        (
            lambda t: [s for s in t if s.method == DENSE],
            {"judgements": "no pruned ticket to judge", "density": "No ticket here is pruned"},
        ),
        (
            _told(scores={}, curve=None),
            {"scores": "No ticket has scores.", "weights": "No ticket has scores.", "compared": "scored on nothing"},
        ),
    ],
    ids=["bare tickets", "no dense network", "only a dense network", "no scores"],
)
def test_what_is_missing_is_said(spoil: Callable[[list[Entry]], list[Entry]], said: dict[str, str]) -> None:
    found = read(spoil(comparison(("MIR-L-G",), (0,), 2, tasks=ONE)))
    assert found.wrong == []
    assert [s["id"] for s in found.named("section")] == SECTIONS
    for section, text_ in said.items():
        assert text_ in found.text[section]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1e308])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_a_score_that_is_no_number_is_a_dash_on_a_whole_page(number: float, seeds: tuple[int, ...]) -> None:
    mine = comparison(("MIR-L-G",), seeds, 2, tasks=ONE)
    score = mine[1].ticket.scores["derain/Rain100L"].model_copy(update={"psnr": number})
    assert mine[1].ticket.curve is not None
    curve = mine[1].ticket.curve.model_copy(update={"psnr": {"derain/Rain100L": (number,) * 8}})
    update = {"scores": {"derain/Rain100L": score}, "curve": curve}
    mine[1] = mine[1]._replace(ticket=mine[1].ticket.model_copy(update=update))
    found = read(mine)
    assert found.wrong == []
    assert "count as unknown" in found.text["caveats"] and "no number" in found.text["judgements"]
    row = next(r for r in found.cells if len(r) > 5 and r[0][1] == "MIR-L-G" and r[1][1] == "1")
    assert row[5][1].startswith("–") == (seeds == (0,)) and "nan" not in found.text["scores"]


def test_experiments_have_own_lines_on_the_page_and_dense_ones_are_never_bold() -> None:
    mine = comparison(("MIR-L-G",), (0, 1), 1, tasks=ONE)
    mine = [s._replace(training=f"t{s.seed}", experiment=f"e{s.seed}") for s in mine]
    found = read(mine)
    assert found.wrong == []
    assert "MIR-L-G (2) is another experiment than MIR-L-G" in found.text["caveats"]
    assert {"dense (2)", "MIR-L-G (2)"} <= {r[0][1] for r in found.cells if len(r) > 5}
    judged = {r[0][1] for r in found.cells if any(said.startswith("one seed:") for _, said in r)}
    assert judged == {"MIR-L-G", "MIR-L-G (2)"}


def test_other_protocols_have_tables_of_their_own() -> None:
    mine = comparison(("MIR-L-G",), (0,), 1, tasks=ONE)
    other = {"basicsr_y": {n: s.model_copy(update={"psnr": 41.25}) for n, s in mine[0].ticket.scores.items()}}
    texts = mine[0].ticket.protocols | {"basicsr_y": "luma of the 8-bit image"}
    found = read(_told(also=other, protocols=texts)(mine))
    assert "The same by the protocol basicsr_y" in found.text["scores"] and "41.25" in found.text["scores"]
    assert "luma of the 8-bit image" in found.text["compared"] and "promptir (headline)" in found.text["compared"]


def test_one_ticket_is_enough_for_a_page_and_none_is_refused() -> None:
    assert read([entry("control reinit", round_=0, tasks=ONE)]).wrong == []
    with pytest.raises(UserError, match="found no ticket to compare"):
        page.html([], "nothing", MADE)
