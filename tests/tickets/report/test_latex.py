"""Laws of the LaTeX tables, read by a small parser of their own: cells, braces, bold, and whose figures stand where."""

from __future__ import annotations

import re

import pytest

from mirl_dist.errors import UserError
from mirl_dist.tickets.compare.entry import DENSE
from mirl_dist.tickets.report import latex
from tests.tickets.compare.test_compare import FIVE, NOISE, RAIN, five_tasks, one, scores

COMMANDS = {
    *("begin", "end", "centering", "footnotesize", "setlength", "tabcolsep", "caption", "label", "toprule", "midrule"),
    *("bottomrule", "cmidrule", "multicolumn", "textbf", "underline", "textcolor", "textit", "scriptsize", "pm"),
    *("sigma", "par", "smallskip", "raggedright", "textbackslash", "textasciitilde", "textasciicircum"),
    *("textless", "textgreater", "textbar"),
}


def check_braces(source: str) -> None:
    """Braces balance, dollars pair, environments nest, every command is one that we know."""
    bare = re.sub(r"\\[\\&%$#_{}]", "", source)
    depth = 0
    for c in bare:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0
    open_: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{([^}]*)\}", bare):
        if kind == "begin":
            open_.append(name)
        else:
            assert open_.pop() == name
    assert not open_
    assert set(re.findall(r"\\([A-Za-z]+)", re.sub(r"(?m)^%.*$", "", bare))) <= COMMANDS


def grid(tabular: str) -> list[list[str]]:
    """The rows of one tabular, each with as many cells as it has columns; spans are followed by empty ones."""
    match = re.fullmatch(r"\\begin\{tabular\}\{([lrc]+)\}(.*)\\end\{tabular\}", tabular, re.DOTALL)
    assert match is not None
    body = re.sub(r"\\(toprule|midrule|bottomrule)|\\cmidrule\(lr\)\{\d+-\d+\}", "", match[2])
    rows = []
    for row in filter(str.strip, re.split(r"\\\\(?![A-Za-z])", body)):
        cells = []
        for cell in re.split(r"(?<!\\)&", row):
            span = re.match(r"\s*\\multicolumn\{(\d+)\}\{c\}\{(.*)\}\s*$", cell, re.DOTALL)
            cells += [span[2], *[""] * (int(span[1]) - 1)] if span else [cell.strip()]
        assert len(cells) == len(match[1]), row
        rows.append(cells)
    for first, last in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", match[2]):
        assert 1 <= int(first) < int(last) <= len(match[1])
    return rows


def tabulars(source: str) -> list[list[list[str]]]:
    check_braces(source)
    return [grid(t) for t in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", source, re.DOTALL)]


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_row_has_the_columns_of_its_table(seeds: int) -> None:
    noise, rain, haze = tabulars(latex.tables(five_tasks(seeds)))
    assert len(noise[0]) == 2 + 3 * 2 * 2 and len(rain[0]) == len(haze[0]) == 2 + 2 * 2
    assert noise[0][2] == "BSD68" and rain[0][2] == "Rain100L" and haze[0][2] == "SOTS"
    assert noise[1][2::2] == [r"$\sigma=15$", r"$\sigma=25$", r"$\sigma=50$"] * 2
    assert noise[2] == ["Method", "Params (M)", *["PSNR", "SSIM"] * 6]


def test_best_is_bold_and_second_underlined_among_our_tickets_alone() -> None:
    shown = [
        one(DENSE, psnr={RAIN: 33.0}),
        one("control reinit", 0, 0, {RAIN: 32.0}),
        one("MIR-L-G floor 0.1", 0, 1, {RAIN: 30.0}),
        one("MIR-L-G", 0, 1, {RAIN: 30.004}),
        one("MIR-L-LW", 0, 1, {RAIN: 29.0}),
        one("A", 0, 1, {RAIN: 20.0}),
    ]
    [rows] = tabulars(latex.tables(shown))
    psnr = {row[0]: row[2] for row in rows[2:]}
    assert psnr == {
        DENSE: "33.00",
        "control reinit (200 alive)": "32.00",
        "MIR-L-G floor 0.1, round 1": r"\textbf{30.00}",
        "MIR-L-G, round 1": r"\textbf{30.00}",  # equal as printed
        "MIR-L-LW, round 1": r"\underline{29.00}",
        "A, round 1": "20.00",
    }
    paper = [cell for row in rows[2:] for cell in row[4:]]
    assert not any("textbf" in cell or "underline" in cell for cell in paper)


def test_a_lone_value_is_not_called_best() -> None:
    assert "textbf" not in latex.tables([one("A", 0, 1)])


def test_the_papers_figures_are_grey_in_own_columns_as_the_caption_says() -> None:
    source = latex.tables(five_tasks(1))
    noise, rain, _ = tabulars(source)
    grey = re.compile(r"\\textcolor\{gray\}\{\\textit\{(.*)\}\}")
    heading = grey.fullmatch(noise[0][8])
    assert heading is not None and heading[1] == "published (full size, other training)"
    found = {row[0]: row[4] for row in rain[2:]}
    assert found == {
        DENSE: r"\textcolor{gray}{\textit{32.17}}",
        "MIR-L-G, round 1": r"\textcolor{gray}{\textit{32.43}}",
        r"PIR-OSM 70\%, round 1": r"\textcolor{gray}{\textit{26.59}}",
        "magnitude global iterative rewound to 20000 floor 0.05, round 1": "",
    }
    assert all(grey.search(cell) is None for row in noise[1:] for cell in row[:8])
    assert source.count("the paper's own figures (MIR-L, Table III") == 3
    assert source.count("measured under other conditions") == 3 and "MIR-L-G 4.7M" in source


def test_without_figures_of_the_paper_there_is_no_column_for_them() -> None:
    source = latex.tables([one("A", 0, 1, {"derain/photos": 30.0}), one("B", 0, 1, {"derain/photos": 31.0})])
    [rows] = tabulars(source)
    assert len(rows[0]) == 4 and "gray" not in source and "paper" not in source


def test_names_of_users_are_words_and_no_commands() -> None:
    evil = '50% of $x_1$ & {more} #1 \\input{a}~^<|>"\n\\\\ end'
    source = latex.tables([one(evil, 0, 1, {"derain/my_set%": 30.0}), one("B", 0, 1, {"derain/my_set%": 31.0})])
    [rows] = tabulars(source)
    assert len(rows) == 4
    assert rows[2][0].startswith(r"50\% of \$x\_1\$ \& \{more\} \#1 \textbackslash{}input\{a\}")
    assert r"my\_set\%" in rows[0][2]


@pytest.mark.parametrize("name", ["[2em] A", "*A"])
def test_a_row_is_no_argument_of_the_line_end_before_it(name: str) -> None:
    source = latex.tables([one(name, 0, 1), one("B", 0, 1), one(name, 0, 2)])
    assert [row[0] for row in tabulars(source)[0][2:]] == [f"{{}}{name}, round 1", f"{{}}{name}, round 2", "B, round 1"]
    assert re.search(r"(\\\\|midrule)\s*[\[*]", source) is None


def test_spreads_and_missing_scores_have_their_cells() -> None:
    shown = [one("A", seed, 1, {RAIN: 30.0 + seed, NOISE: 25.0}) for seed in range(2)] + [one("B", 0, 1, {RAIN: 20.0})]
    rain, noise = tabulars(latex.tables(shown))
    assert rain[2][2] == r"\textbf{30.50} {\scriptsize $\pm$0.71}"
    assert [row[0] for row in noise[3:]] == ["A, round 1"]
    two = {FIVE[0]: 33.0, FIVE[1]: 30.0}
    [both] = tabulars(latex.tables([one("A", 0, 1, two), one("B", 0, 1, {FIVE[0]: 32.0})]))
    assert both[4][4:6] == ["--", "--"]
    assert scores(two).keys() == set(FIVE[:2])


def test_parameters_are_millions_of_weights_that_are_not_pruned() -> None:
    big = {"total": 35_592_263, "prunable": 33_199_064, "alive": 2_281_421}
    [rows] = tabulars(
        latex.tables([one("MIR-L-G", 0, 12)._replace(ticket=one("MIR-L-G", 0, 12).ticket.model_copy(update=big))])
    )
    assert rows[2][:2] == ["MIR-L-G, round 12", "4.67"]


def test_tickets_without_scores_make_no_table() -> None:
    with pytest.raises(UserError, match="no ticket here has a score"):
        latex.tables([one("A", 0, 1, {})])
