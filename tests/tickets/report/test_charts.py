"""Charts tell what the tickets hold, look the same every time, and take no setting from anybody."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from statistics import fmean, stdev

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from mirl_dist.tickets.compare import mask_overlap, statistics
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.report import charts, mask_charts
from mirl_dist.tickets.report.charts import INK, assign_styles, swatch
from tests.factories import PARTS, comparison, entry

RAIN = "derain/rain"


@pytest.fixture(scope="module")
def tickets() -> list[Entry]:
    return comparison(("MIR-L-G", "MIR-L-LW", "control reinit"), seeds=(0, 1), rounds=3)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that charts would have written."""
    figures: list[Figure] = []
    for module in (charts, mask_charts):
        monkeypatch.setattr(module, "svg", lambda figure, name: figures.append(figure) or b"")
    yield figures


def psnr(tickets: list[Entry], method: str, round_: int) -> list[float]:
    return [s.ticket.scores[RAIN].psnr for s in tickets if (s.method, s.ticket.round) == (method, round_)]


def luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def test_the_same_tickets_give_the_same_bytes_whatever_the_users_settings(tickets: list[Entry]) -> None:
    lines = statistics.group_entries(tickets)
    styles = assign_styles(line.method for line in lines)

    def everything() -> list[bytes | None]:
        swatch.cache_clear()
        named = mask_charts.choose_entries(lines)
        return [
            charts.score(lines, styles, RAIN),
            charts.distance(lines, styles, RAIN),
            charts.curves(tickets[:3], styles["MIR-L-G"], RAIN),
            mask_charts.heat(mask_charts.by_kind(tickets[1]), "one"),
            mask_charts.scale(),
            mask_charts.grid(named, beyond=True),
            mask_charts.overlap_of_seeds(lines, styles),
            swatch(DENSE, styles[DENSE]),
        ]

    before = everything()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path", "text.usetex": True}):
        kept = dict(mpl.rcParams)
        assert everything() == before
        assert dict(mpl.rcParams) == kept, "and leave those settings as they were"


def test_text_and_lines_take_the_colour_of_the_page_and_text_stays_text(tickets: list[Entry]) -> None:
    lines = statistics.group_entries(tickets)
    chart = charts.score(lines, assign_styles(line.method for line in lines), RAIN).decode()
    assert "currentColor" in chart and INK not in chart
    assert f">{RAIN}</text>" in chart
    assert "<metadata" not in chart and chart.startswith("<svg")


def test_every_method_has_its_own_look_that_is_legible_on_light_and_dark() -> None:
    methods = [f"method {i}" for i in range(8)] + [f"control {i}" for i in range(4)]
    found = assign_styles([DENSE, *methods])
    assert list(found)[0] == DENSE and found[DENSE].colour == INK
    assert len({(look.colour, look.marker, look.line) for look in found.values()}) == 13
    assert len({found[m].colour for m in methods[:8]}) == 8
    assert {found[m].line for m in methods[8:]} == {"none"}, "a control is a single ticket: no line"
    css = (files("mirl_dist.tickets.report") / "templates/tickets.css").read_text()
    dark = luminance(css.split("(prefers-color-scheme: dark)")[1].split("--page: ")[1][:7])
    for method in methods:
        own = luminance(found[method].colour)
        assert min(1.05 / (own + 0.05), (own + 0.05) / (dark + 0.05)) >= 3


def test_a_score_chart_shows_means_spread_single_seeds_and_the_dense_band(
    tickets: list[Entry], drawn: list[Figure]
) -> None:
    lines = statistics.group_entries(tickets)
    styles = assign_styles(line.method for line in lines)
    charts.score(lines, styles, RAIN)
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log"
    colour = styles["MIR-L-G"].colour
    mine = [line for line in axes.lines if to_hex(line.get_color()) == colour]
    means = [fmean(psnr(tickets, "MIR-L-G", r)) for r in (3, 2, 1)]
    assert [list(line.get_ydata()) for line in mine if line.get_linestyle() == "-"] == [pytest.approx(means)]
    dots = next(line for line in mine if line.get_marker() == ".")
    assert sorted(dots.get_ydata()) == sorted(v for r in (1, 2, 3) for v in psnr(tickets, "MIR-L-G", r))
    dense = fmean(set(psnr(tickets, DENSE, 0)))
    assert any(to_hex(line.get_color()) == INK and line.get_ydata()[0] == pytest.approx(dense) for line in axes.lines)
    shade = [c for c in axes.collections if isinstance(c, PolyCollection) and to_hex(c.get_facecolor()[0]) == colour]
    top = max(m + stdev(psnr(tickets, "MIR-L-G", r)) for m, r in zip(means, (3, 2, 1), strict=True))
    assert shade[0].get_paths()[0].get_extents().y1 == pytest.approx(top)
    crosses = next(look.colour for method, look in styles.items() if method.startswith("control"))
    joined = [line for line in axes.lines if to_hex(line.get_color()) == crosses and line.get_linestyle() != "None"]
    assert joined == [], "a control is no path of rounds"


def test_one_seed_has_no_spread(drawn: list[Figure]) -> None:
    lines = statistics.group_entries(comparison(("MIR-L-G",), seeds=(0,)))
    styles = assign_styles(line.method for line in lines)
    charts.score(lines, styles, RAIN)
    charts.distance(lines, styles, RAIN)
    assert list(drawn[0].axes[0].collections) == [], "no shade"
    assert not any(line.get_marker() == "." for line in drawn[0].axes[0].lines)
    assert list(drawn[1].axes[0].collections) == [], "no whiskers"


def test_a_distance_is_that_to_the_dense_network_of_the_same_seed(tickets: list[Entry], drawn: list[Figure]) -> None:
    last = charts.last_rounds(statistics.group_entries(tickets))
    charts.distance(last, assign_styles(line.method for line in last), RAIN)
    axes = drawn[0].axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert [n.split(",")[0] for n in names] == ["MIR-L-G", "MIR-L-LW", "control reinit of MIR-L…"]
    dense = psnr([s for s in tickets if s.run.startswith("mir-l-g")], DENSE, 0)
    wanted = fmean(a - b for a, b in zip(psnr(tickets, "MIR-L-G", 3), dense, strict=True))
    at = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert at == [pytest.approx(wanted)]


def test_curves_count_steps_from_the_rounds_beginning_and_mark_the_best(drawn: list[Figure]) -> None:
    late = entry("magnitude rewound to step", round_=2)
    assert late.ticket.began == 2000 and late.ticket.curve is not None
    charts.curves([late], assign_styles([late.method])[late.method], RAIN)
    line, dot = drawn[0].axes[0].lines
    assert list(line.get_xdata()) == [s - 2000 for s in late.ticket.curve.steps]
    assert list(dot.get_ydata()) == [max(late.ticket.curve.psnr[RAIN])]
    assert list(dot.get_xdata()) == [late.ticket.best_steps()[RAIN]]


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("patch_embed.proj.weight", "patch_embed", "conv"),
        ("encoder_level1.0.norm1.body.weight", "encoder_level1.0", "norm1"),
        ("encoder_level1.0.norm1.body.bias", "encoder_level1.0", "norm1 bias"),
        ("encoder_level2.3.attn.qkv_dwconv.weight", "encoder_level2.3", "attn.qkv_dwconv"),
        ("noise_level3.ffn.project_in.weight", "noise_level3", "ffn.project_in"),
        ("latent.0.attn.temperature", "latent.0", "attn.temperature"),
        ("down1_2.body.0.weight", "down1_2", "conv"),
        ("prompt3.linear_layer.weight", "prompt3", "linear"),
        ("prompt3.prompt_param", "prompt3", "prompt_param"),
        ("reduce_noise_level3.weight", "reduce_noise_level3", "conv"),
        ("output.weight", "output", "conv"),
    ],
)
def test_a_tensors_name_tells_its_block_and_its_kind(name: str, block: str, kind: str) -> None:
    assert mask_charts.locate_layer(name) == (block, kind)


def test_densities_stand_in_the_networks_order_with_collapsed_tensors_marked() -> None:
    one = entry(density=0.5)
    layers = one.ticket.layer_density | {"down1_2.body.0.weight": 0.0}
    told = one.ticket.model_copy(update={"layer_density": layers, "collapsed": ("down1_2.body.0.weight",)})
    grid = mask_charts.by_kind(one._replace(ticket=told))
    assert grid.rows == ("patch_embed", "encoder_level1.0", "down1_2", "encoder_level2.0", "output")
    assert grid.columns == ("norm1", "attn.qkv", "ffn.project_in", "conv")
    qkv = grid.share[grid.rows.index("encoder_level1.0"), grid.columns.index("attn.qkv")]
    assert qkv == pytest.approx(layers["encoder_level1.0.attn.qkv.weight"])
    assert np.isnan(grid.share[grid.rows.index("output"), grid.columns.index("norm1")]), "there is no such tensor"
    assert grid.collapsed[2, 3], "named by the ticket"
    assert (grid.collapsed == (grid.share == 0)).all()


def test_densities_by_round_weigh_tensors_by_their_size(tickets: list[Entry]) -> None:
    run = [s for s in tickets if s.run == "mir-l-g_s0"]
    grid = mask_charts.by_round(list(reversed(run)))
    assert grid.columns == ("0", "1", "2", "3")
    assert (grid.share[:, 0] == 1).all()
    inside = [n for n in PARTS if n.startswith("encoder_level1.0.")]
    wanted = sum(run[3].ticket.layer_density[n] * PARTS[n] for n in inside) / sum(PARTS[n] for n in inside)
    assert grid.share[grid.rows.index("encoder_level1.0"), 3] == pytest.approx(wanted)


def test_a_grid_of_overlaps_shows_last_rounds_first_and_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = statistics.group_entries(comparison(("MIR-L-G", "MIR-L-LW"), seeds=(0, 1), rounds=4))
    assert len(mask_charts.choose_entries(lines)) == 16, "all, where they fit; the dense ones never"
    monkeypatch.setattr(mask_charts, "MAX_ENTRIES", 4)
    assert [name for name, _ in mask_charts.choose_entries(lines)] == [
        "MIR-L-G r4 s0",
        "MIR-L-G r4 s1",
        "MIR-L-LW r4 s0",
        "MIR-L-LW r4 s1",
    ]
    monkeypatch.setattr(mask_charts, "MAX_ENTRIES", 8)
    assert {s.ticket.round for _, s in mask_charts.choose_entries(lines)} == {1, 4}


def test_overlap_between_seeds_stands_beside_what_chance_gives(tickets: list[Entry], drawn: list[Figure]) -> None:
    lines = statistics.group_entries(tickets)
    styles = assign_styles(line.method for line in lines)
    mask_charts.overlap_of_seeds(lines, styles)
    last = next(line for line in lines if (line.method, line.round_) == ("MIR-L-G", 3)).entries
    mine = [x for x in drawn[0].axes[0].lines if to_hex(x.get_color()) == styles["MIR-L-G"].colour]
    found = {x.get_linestyle(): x.get_ydata()[0] for x in mine}  # the fewest weights stand first
    assert found["-"] == pytest.approx(mask_overlap.iou(last)[0, 1])
    assert found[":"] == pytest.approx(mask_overlap.expected_iou(last)[0, 1])
    assert mask_charts.overlap_of_seeds(statistics.group_entries(tickets[:4]), styles) is None, "one seed has no pair"


def test_names_that_look_like_formulas_or_tags_are_drawn_as_they_are() -> None:
    name = r"$\frac{1}{0}$ <b>&amp; 票 🎟"
    lines = statistics.group_entries(comparison((name,), seeds=(0,), rounds=1))
    chart = charts.distance(lines, assign_styles([name]), RAIN).decode()
    assert r">$\frac{1}{0}$ &lt;b&gt;&amp;amp;" in chart


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_leave_a_gap(number: float) -> None:
    lines = statistics.group_entries(comparison(("MIR-L-G",), seeds=(0,), rounds=2))
    broken = lines[1]._replace(psnr={RAIN: statistics.Statistic(number, None, 1)})
    styles = assign_styles(line.method for line in lines)
    assert b"<svg" in charts.score([lines[0], broken, lines[2]], styles, RAIN)
    assert b"<svg" in charts.score([lines[0]._replace(psnr=broken.psnr), broken], styles, RAIN)
    assert b"<svg" in charts.distance([broken._replace(against_dense=broken.psnr)], styles, RAIN)
