"""Laws of comparisons: seeds together, differences paired, masks counted bit by bit, the paper's figures apart."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score
from mirl_dist.tickets.compare import caveats, judge, mask_overlap, published, statistics
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.compare.statistics import Statistic
from mirl_dist.tickets.report import latex
from mirl_dist.tickets.report import text_tables as text
from mirl_dist.training.ticket import Curve, Ticket

RAIN, NOISE = "derain/rain100l", "denoise_25/cbsd68"
PARTS = {"a.weight": 100, "b.weight": 60, "c.weight": 3}
FIVE = ("denoise_15/cbsd68", NOISE, "denoise_50/cbsd68", RAIN, "dehaze/sots_outdoor")


def scores(psnr: Mapping[str, float], images: int = 50) -> dict[str, Score]:
    """SSIM is a hundredth of PSNR; the degraded images have 20 dB and 0.5."""
    return {
        n: Score(psnr=p, ssim=p / 100, degraded_psnr=20.0, degraded_ssim=0.5, images=images) for n, p in psnr.items()
    }


def one(
    method: str,
    seed: int = 0,
    round_: int = 0,
    psnr: Mapping[str, float] = {RAIN: 30.0},
    *,
    alive: int = 163,
    run: str | None = None,
    images: int = 50,
    best: int | None = None,
    mask: Mapping[str, NDArray[np.bool_]] | None = None,
    parts: Mapping[str, int] = PARTS,
    training: str = "training",
    experiment: str | None = None,
    **more: Any,
) -> Entry:
    """A ticket of a network of 200 weights. best: the step of 100, 200, 300 at which every curve is highest."""
    prunable = sum(parts.values())
    curve = (
        None
        if best is None
        else Curve(
            steps=(100, 200, 300), psnr={n: tuple(30.0 - abs(at - best) for at in (100, 200, 300)) for n in psnr}
        )
    )
    density = {n: alive / prunable for n in parts} if mask is None else {n: float(m.mean()) for n, m in mask.items()}
    fields: dict[str, Any] = {
        "round": round_,
        "alive": alive,
        "prunable": prunable,
        "total": prunable + 37,
        "threshold": 0.0,
        "layer_density": density,
        "mask_digest": f"mask {method} {round_}",
        "initial_digest": "initial",
        "weights_digest": f"weights {method} {seed} {round_} {sorted(psnr.items())}",
        "parent": None,
        "fingerprint": "f" * 16,
        "manifest_digest": "m" * 64,
        "protocol": "the first protocol",
        "protocols": {"first": "the first protocol"},
        "scores": scores(psnr, images),
        "updates": 300,
        "samples": 1200,
        "method": method,
        "seed": seed,
        "curve": curve,
        "seconds": 1.0,
        "world": 1,
        "versions": {},
    }
    ticket = Ticket.model_validate(fields | more)
    packed = None if mask is None else {n: np.packbits(m) for n, m in mask.items()}
    likeness = training, f"experiment of {method}" if experiment is None else experiment
    return Entry(run or f"{method} s{seed}", method, seed, *likeness, ticket, parts, packed, None)


def spoilt(s: Entry, **numbers: float) -> Entry:
    """The same with numbers in its scores that `Score` itself would refuse."""
    told = {name: score.model_copy(update=numbers) for name, score in s.ticket.scores.items()}
    return s._replace(ticket=s.ticket.model_copy(update={"scores": told}))


def at(shown: list[Entry], method: str, round_: int = 1, protocol: str | None = None) -> statistics.Group:
    [line] = [x for x in statistics.group_entries(shown, protocol) if (x.method, x.round_) == (method, round_)]
    return line


def printed(tables: list[Any], width: int = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    for table in tables:
        console.print(table)
    return out.getvalue()


def said(shown: list[Entry]) -> str:
    return "\n".join(caveats.list_caveats(shown))


# Seeds.


def test_one_seed_has_no_spread_and_two_have_the_sample_deviation() -> None:
    assert Statistic.of([30.0]) == (30.0, None, 1)
    mean, sd, count = Statistic.of([30.0, 31.0])
    assert (mean, count) == (30.5, 2)
    assert sd == pytest.approx(math.sqrt(0.5))


def test_seeds_of_a_method_and_round_are_one_line() -> None:
    shown = [one("A", seed, 1, {RAIN: 30 + seed}, alive=100 + seed) for seed in range(3)]
    line = at(shown, "A")
    assert line.psnr[RAIN] == (31.0, 1.0, 3)
    assert line.ssim[RAIN].mean == pytest.approx(0.31)
    assert (line.alive, line.total, line.seeds) == (101 + 37, 200, (0, 1, 2))
    assert line.sparsity == pytest.approx(1 - 138 / 200)
    assert line.entries == tuple(shown)


def test_a_network_seen_in_two_runs_of_one_seed_is_one_value() -> None:
    shown = [one(DENSE, 0, psnr={RAIN: 30}, run=run) for run in ("A", "B")] + [one(DENSE, 1, psnr={RAIN: 32})]
    assert at(shown, DENSE, 0).psnr[RAIN] == Statistic.of([30.0, 32.0])
    assert "count once" not in said(shown)
    assert "count once, by their mean: dense, round 0, seed 0 (2 tickets)" in said(
        [*shown[:1], one(DENSE, 0, psnr={RAIN: 31}, run="B")]
    )


def test_lines_are_dense_first_then_methods_as_they_came_with_rounds_ascending() -> None:
    shown = [one("B", 0, 2), one("B", 0, 1), one("A", 0, 1), one(DENSE, 0, 0)]
    assert [(x.method, x.round_) for x in statistics.group_entries(shown)] == [(DENSE, 0), ("B", 1), ("B", 2), ("A", 1)]
    assert statistics.group_entries([]) == []


def test_a_task_that_some_seeds_lack_counts_the_others_alone() -> None:
    shown = [one("A", 0, 1, {RAIN: 30, NOISE: 25}), one("A", 1, 1, {RAIN: 32})]
    line = at(shown, "A")
    assert (line.psnr[RAIN].count, line.psnr[NOISE]) == (2, (25.0, None, 1))
    assert statistics.task_names(shown) == [RAIN, NOISE]


# Differences to the dense network.


def test_differences_are_taken_seed_by_seed() -> None:
    shown = [one(DENSE, seed, psnr={RAIN: 30 + 3 * seed}) for seed in range(3)]
    shown += [one("A", seed, 1, {RAIN: 29.5 + 3 * seed}) for seed in range(3)]
    assert at(shown, "A").psnr[RAIN].sd == 3.0
    assert at(shown, "A").against_dense[RAIN] == (-0.5, 0.0, 3)
    assert at(shown, DENSE, 0).against_dense == {}


def test_a_seed_without_a_dense_ticket_is_no_pair() -> None:
    shown = [one(DENSE, 0), one("A", 0, 1, {RAIN: 29, NOISE: 20}), one("A", 1, 1, {RAIN: 10})]
    assert at(shown, "A").against_dense == {RAIN: (-1.0, None, 1)}
    assert "no difference to it: A s1, round 1" in said(shown)
    assert at(shown[1:], "A").against_dense == {}


def test_the_dense_ticket_of_the_same_run_is_the_pair_where_there_is_one() -> None:
    dense = [one(DENSE, 0, psnr={RAIN: 30}, run="mine"), one(DENSE, 0, psnr={RAIN: 20}, run="other")]
    assert at([*dense, one("A", 0, 1, {RAIN: 31}, run="mine")], "A").against_dense[RAIN].mean == 1
    assert at([*dense, one("A", 0, 1, {RAIN: 31}, run="third")], "A").against_dense[RAIN].mean == 6


@pytest.mark.parametrize(
    "other",
    [
        *({"training": "another"}, {"updates": 301}, {"manifest_digest": "n" * 64}),
        *({"total": 201}, {"prunable": 162, "total": 200}),
    ],
)
def test_the_dense_ticket_of_another_run_is_a_pair_only_if_it_trained_alike(other: dict[str, Any]) -> None:
    mine = one("A", 0, 1, {RAIN: 31}, run="mine")
    assert at([one(DENSE, 0, run="other"), mine], "A").against_dense[RAIN].mean == 1
    assert at([one(DENSE, 0, run="other", **other), mine], "A").against_dense == {}
    assert "no dense ticket of the same seed, training, data and network" in said([one(DENSE, 0, **other), mine])


def test_the_dense_ticket_of_the_same_run_may_have_taken_more_steps() -> None:
    shown = [one(DENSE, 0, run="mine"), one("PIR-OSM 70%", 0, 1, {RAIN: 29}, run="mine", updates=60)]
    assert at(shown, "PIR-OSM 70%").against_dense[RAIN].mean == -1


# Experiments.


def test_only_seeds_of_one_experiment_share_a_line() -> None:
    shown = [one("A", seed, 1, {RAIN: 30 + 5 * (seed > 1)}, experiment=f"e{seed > 1}") for seed in range(4)]
    found = {(x.method, x.round_): (x.psnr[RAIN], x.seeds) for x in statistics.group_entries(shown)}
    assert found == {("A", 1): ((30, 0, 2), (0, 1)), ("A (2)", 1): ((35, 0, 2), (2, 3))}
    assert "A (2) is another experiment than A: the configs differ, so these runs are no seeds of it: A s2; A s3" in (
        caveats.list_caveats(shown)
    )
    assert "another experiment" not in said(shown[:2])
    assert [(j.method, j.seeds) for j in judge.judge(shown)] == [("A", (0, 1)), ("A (2)", (2, 3))]


def test_dense_networks_of_one_training_share_a_line_whatever_is_done_to_them_later() -> None:
    shown = [one(DENSE, seed, experiment=f"e{seed}") for seed in range(2)]
    assert [(x.method, x.seeds) for x in statistics.group_entries(shown)] == [(DENSE, (0, 1))]
    other = [*shown, one(DENSE, 2, psnr={RAIN: 20}, training="another"), one("A", 2, 1)]
    lines = statistics.group_entries(other)
    assert [(x.method, x.seeds) for x in lines] == [(DENSE, (0, 1)), ("dense (2)", (2,)), ("A", (2,))]
    assert [x.dense for x in lines] == [True, True, False] and lines[1].against_dense == {}
    assert [j.method for j in judge.judge(other)] == ["A"]


def test_controls_stand_by_the_experiment_of_their_ticket() -> None:
    tickets = [one("A", 0, 1, experiment="e"), one("A", 1, 1, experiment="f")]
    controls = [
        one("control reinit", t.seed, 0, run=f"c{t.seed}", experiment="c", parent=t.ticket.digest()) for t in tickets
    ]
    assert [x.method for x in statistics.group_entries([*tickets, *controls])] == [
        "A",
        "A (2)",
        "control reinit of A",
        "control reinit of A (2)",
    ]


# Controls.


def test_a_control_stands_beside_the_ticket_that_it_controls() -> None:
    tickets = [one("A", 0, 1, alive=80), one("A", 0, 2, alive=60), one("B", 0, 2, alive=60)]
    controls = [
        one("control reinit", 0, 0, run=f"c{i}", alive=t.ticket.alive, parent=t.ticket.digest())
        for i, t in enumerate(tickets)
    ]
    found = {(x.method, x.round_): len(x.entries) for x in statistics.group_entries([*tickets, *controls])}
    assert found == {
        ("A", 1): 1,
        ("A", 2): 1,
        ("B", 2): 1,
        ("control reinit of A", 1): 1,
        ("control reinit of A", 2): 1,
        ("control reinit of B", 2): 1,
    }


def test_controls_of_tickets_that_are_not_shown_are_told_apart_by_density() -> None:
    lines = statistics.group_entries([one("control reinit", seed, 0, alive=60 + 20 * (seed > 1)) for seed in range(4)])
    assert [(x.method, x.seeds) for x in lines] == [
        ("control reinit (97 alive)", (0, 1)),
        ("control reinit (117 alive)", (2, 3)),
    ]


# Protocols, and what cannot stand in one table.


def second(psnr: float, text: str = "the second protocol", images: int = 50) -> dict[str, Any]:
    return {
        "protocols": {"first": "the first protocol", "second": text},
        "also": {"second": scores({RAIN: psnr}, images)},
    }


def test_another_protocol_gives_its_own_scores_and_differences() -> None:
    shown = [one(DENSE, 0, **second(25)), one("A", 0, 1, {RAIN: 31}, **second(24.5)), one("B", 0, 1)]
    assert at(shown, "A", protocol="second").psnr[RAIN].mean == 24.5
    assert at(shown, "A", protocol="second").against_dense[RAIN].mean == -0.5
    assert at(shown, "A", protocol="first") == at(shown, "A")
    assert at(shown, "B", protocol="second").psnr == {}
    with pytest.raises(UserError, match=r"no ticket here was scored by third; there are first, second\."):
        statistics.group_entries(shown, "third")


def test_the_headline_is_known_by_its_text_whatever_the_order() -> None:
    ticket = one("A", protocols={"a": "another", "first": "the first protocol"}).ticket
    assert statistics.headline_protocol(ticket) == "first"
    assert statistics.headline_protocol(ticket.model_copy(update={"protocols": {}})) == "the first protocol"


@pytest.mark.parametrize(
    ("a", "b", "complaint"),
    [
        ({}, {"protocol": "another"}, "two protocols: A s0, round 1 has 'the first protocol', B s0, round 1"),
        ({}, {"images": 49}, "derain/rain100l scored on 50 images in A s0, round 1 and on 49 in B s0, round 1"),
        (second(1), second(1, "what else"), "two meanings of the protocol second: A s0, round 1 has"),
        (second(1), second(1, images=49), "on 50 images in A s0, round 1 and on 49 in B s0, round 1"),
    ],
)
def test_scores_that_were_measured_differently_are_refused(
    a: dict[str, Any], b: dict[str, Any], complaint: str
) -> None:
    shown = [one("A", 0, 1, **a), one("B", 0, 1, **b)]
    for compare in (
        statistics.check_comparable,
        statistics.group_entries,
        caveats.list_caveats,
        text.tables,
        latex.tables,
        judge.judge,
    ):
        with pytest.raises(UserError, match=complaint):
            compare(shown)


# What a reader must know.


def test_there_is_nothing_to_note_of_three_plain_seeds() -> None:
    shown = [one(DENSE, seed) for seed in range(3)] + [one("A", seed, 1) for seed in range(3)]
    usual = {"precision": "fp32", "compile": "no", "tile": "whole image"}
    assert (
        caveats.list_caveats([s._replace(ticket=s.ticket.model_copy(update={"measured": usual})) for s in shown]) == []
    )


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({"manifest_digest": "n" * 64}, "different shards: mmmmmmmm (dense s0); nnnnnnnn (A s0)"),
        ({"total": 201}, "different networks: 200 weights, 163 prunable (dense s0); 201 weights, 163 prunable (A s0)"),
        (
            {"measured": {"precision": "bf16", "tile": "256 pixels"}},
            "scored with precision bf16, tile 256 pixels: A s0",
        ),
        ({"skipped": 4}, "damaged samples were replaced in training (A s0, round 1: 4)"),
        ({"bad": 2}, "not finite) (A s0, round 1: 2)"),
        ({"collapsed": ("c.weight",)}, "tensors have no alive weight (A s0, round 1: 1)"),
    ],
)
def test_what_sets_a_ticket_apart_is_noted(more: dict[str, Any], note: str) -> None:
    assert note in said([one(DENSE, 0), one("A", 0, 1, **more)])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e308])
@pytest.mark.parametrize("what", ["psnr", "ssim", "degraded_psnr"])
def test_scores_that_are_no_numbers_are_unknown_and_noted(number: float, what: str) -> None:
    shown = [one(DENSE, 0), one(DENSE, 1), one("A", 0, 1), spoilt(one("A", 1, 1), **{what: number})]
    line = at(shown, "A")
    assert (line.psnr[RAIN], line.ssim[RAIN].count, line.against_dense[RAIN].count) == ((30, None, 1), 1, 1)
    assert "count as unknown and are in no mean: A s1, round 1, derain/rain100l" in said(shown)
    assert "30.00" in printed(text.tables(shown)) and "30.00" in latex.tables(shown)
    assert "inf" not in printed(text.tables(shown)) and "nan" not in latex.tables(shown)
    text.csv(shown)


def test_few_seeds_and_few_images_are_noted() -> None:
    shown = [one(DENSE, seed, images=11) for seed in range(2)] + [one("A", 0, 1, images=11)]
    assert "one seed only (A): no spread is known" in said(shown)
    assert "two seeds only (dense): the spread itself is uncertain" in said(shown)
    assert "few images: derain/rain100l 11" in said(shown)


def test_seeds_that_took_other_steps_or_have_other_sizes_are_noted() -> None:
    shown = [one("A", 0, 1, alive=80), one("A", 1, 1, alive=81, updates=301)]
    assert "different numbers of steps within a line, though its configs are equal: A, round 1" in said(shown)
    assert "different numbers of alive weights within a line" in said(shown)


# Masks.


def masks(*seeds: int, density: float = 0.5, parts: Mapping[str, int] = PARTS) -> list[dict[str, NDArray[np.bool_]]]:
    chance = [np.random.default_rng(seed) for seed in seeds]
    return [{name: rng.random(size) < density for name, size in parts.items()} for rng in chance]


def brute(a: Mapping[str, NDArray[np.bool_]], b: Mapping[str, NDArray[np.bool_]]) -> float:
    x, y = (np.concatenate([m[name] for name in PARTS]) for m in (a, b))
    return float((x & y).sum() / (x | y).sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.05, 0.5, 1.0]))
def test_overlap_is_that_of_the_weights_one_by_one(seed: int, density: float) -> None:
    drawn = [*masks(seed, density=0.3), *masks(seed + 1, seed + 2, density=density)]
    drawn[0]["a.weight"][0] = drawn[1]["b.weight"][0] = drawn[2]["c.weight"][0] = True
    found = mask_overlap.iou([one("A", i, 1, mask=m) for i, m in enumerate(drawn)])
    np.testing.assert_allclose(found, [[brute(a, b) for b in drawn] for a in drawn], rtol=1e-15)


def test_large_masks_are_counted_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [one("A", i, 1, mask=m) for i, m in enumerate(masks(1, 2))]
    whole = mask_overlap.iou(shown)
    monkeypatch.setattr(mask_overlap, "_BYTES_AT_A_TIME", 1)
    np.testing.assert_array_equal(mask_overlap.iou(shown), whole)


def test_overlap_with_an_unknown_or_another_networks_mask_is_unknown() -> None:
    [mask] = masks(1)
    other = {"a.weight": 100, "b.weight": 61, "c.weight": 2}
    [strange] = masks(1, parts=other)
    nothing = {name: np.zeros_like(bits) for name, bits in mask.items()}
    shown = [
        one("A", 0, 1, mask=mask),
        one("A", 1, 1),
        one("A", 2, 1, mask=strange, parts=other),
        one("A", 3, 1, mask=nothing),
        one("A", 4, 1, mask=mask),
    ]
    nan = math.nan
    np.testing.assert_array_equal(
        mask_overlap.iou(shown),
        [[1, nan, nan, 0, 1], [nan] * 5, [nan, nan, 1, nan, nan], [0, nan, nan, nan, 0], [1, nan, nan, 0, 1]],
    )


def test_the_expected_overlap_is_what_random_masks_have() -> None:
    parts = {"a.weight": 100_000, "b.weight": 20_000}
    drawn = masks(1, 2, density=0.2, parts=parts)
    for m, seed in zip(drawn, (5, 6), strict=True):
        m["b.weight"] = np.random.default_rng(seed).random(20_000) < 0.9
    shown = [one("A", i, 1, mask=m, parts=parts) for i, m in enumerate(drawn)]
    assert mask_overlap.expected_iou(shown)[0, 1] == pytest.approx(mask_overlap.iou(shown)[0, 1], rel=0.02)
    # By hand: both 0.04 x 100,000 + 0.81 x 20,000; either 0.36 x 100,000 + 0.99 x 20,000.
    assert mask_overlap.expected_iou(shown)[0, 1] == pytest.approx(20_200 / 55_800, rel=0.01)


def test_the_expected_overlap_needs_densities_of_one_network_and_no_mask() -> None:
    shown = [one("A", 0, 1, alive=0), one("A", 1, 1), one("A", 2, 1, parts={"z.weight": 9}, alive=9)]
    nan = math.nan
    np.testing.assert_array_equal(mask_overlap.expected_iou(shown), [[nan, 0, nan], [0, 1, nan], [nan, nan, 1]])
    for density in (nan, math.inf, -0.5, 1.5):
        told = shown[1].ticket.layer_density | {"a.weight": density}
        odd = shown[1]._replace(ticket=shown[1].ticket.model_copy(update={"layer_density": told}))
        np.testing.assert_array_equal(mask_overlap.expected_iou([shown[1], odd]), [[1, nan], [nan, nan]])


# The paper's figures.


def test_the_papers_tables_are_there_whole() -> None:
    rows = published.all_figures()
    counts = {table: sum(row.table == table for row in rows) for table in dict.fromkeys(r.table for r in rows)}
    assert counts == {"IIa": 10, "IIb": 10, "IIc": 60, "IIIa": 10, "IIIb": 10, "IIIc": 30}
    assert all(10 < row.psnr < 50 and 0 < row.ssim < 1 and row.weights > 1e5 for row in rows)


@pytest.mark.parametrize(
    ("method", "name", "setting", "psnr"),
    [
        (DENSE, "denoise_15/cbsd68", published.ALL_IN_ONE, 33.50),
        (DENSE, "denoise_15/bsd68", published.SINGLE, 33.97),
        (DENSE, "denoise_50/urban100", published.SINGLE, 28.23),
        (DENSE, "denoise_50/urban100", published.ALL_IN_ONE, None),
        ("MIR-L-G", "derain/rain100l", published.ALL_IN_ONE, 32.43),
        ("MIR-L-LW", "derain/rain100l", published.SINGLE, 32.14),
        ("MIR-L-G", "dehaze/sots_outdoor", published.ALL_IN_ONE, 27.45),
        ("MIR-L-G", "dehaze/sots_indoor", published.ALL_IN_ONE, None),
        ("PIR-OSM 30%", "derain/rain100l", published.ALL_IN_ONE, 31.85),
        ("PIR-OSR 70%", "denoise_25/cbsd68", published.ALL_IN_ONE, 20.56),
        ("PIR-OSM 50%", "derain/rain100l", published.ALL_IN_ONE, None),
        ("MIR-L-G floor 0.05", "derain/rain100l", published.ALL_IN_ONE, None),
        ("control reinit", "derain/rain100l", published.ALL_IN_ONE, None),
        ("MIR-L-G", "denoise_30/cbsd68", published.ALL_IN_ONE, None),
        ("MIR-L-G", "desnow/rain100l", published.ALL_IN_ONE, None),
        ("MIR-L-G", "derain/photos", published.ALL_IN_ONE, None),
    ],
)
def test_our_words_find_the_papers_figure_or_none(method: str, name: str, setting: str, psnr: float | None) -> None:
    found = published.find_figure(method, name, setting)
    assert (None if found is None else found.psnr) == psnr


def test_the_papers_pruned_networks_are_those_of_round_12() -> None:
    found = published.find_figure("MIR-L-G", RAIN, published.ALL_IN_ONE)
    assert found is not None and published.round_of(found) == 12
    dense = published.find_figure(DENSE, RAIN, published.ALL_IN_ONE)
    assert dense is not None and published.round_of(dense) is None
    assert published.round_counts()[0] == published.DENSE_WEIGHTS


def test_one_kind_of_task_is_set_beside_the_single_task_tables() -> None:
    assert published.setting_of(["denoise_15/cbsd68", "denoise_50/urban100"]) == published.SINGLE
    assert published.setting_of([NOISE, RAIN]) == published.ALL_IN_ONE


def test_the_papers_figure_stands_beside_the_nearest_density() -> None:
    shown = [one(DENSE)] + [one("MIR-L-G", 0, r, alive=alive) for r, alive in enumerate((100, 25, 0), 1)]
    lines = statistics.group_entries(shown)
    assert [round(x.alive / x.total, 2) for x in lines] == [1, 0.69, 0.31, 0.18]  # the paper's: 0.13
    assert [(b.group.method, b.group.round_) for b in published.match_groups(lines, [RAIN])] == [
        (DENSE, 0),
        ("MIR-L-G", 3),
    ]
    other = [*shown, one("MIR-L-G", 0, 1, alive=0, experiment="another")]
    assert [b.group.method for b in published.match_groups(statistics.group_entries(other), [RAIN])] == [
        DENSE,
        "MIR-L-G",
        "MIR-L-G (2)",
    ]


# Tables and CSV.


def five_tasks(seeds: int) -> list[Entry]:
    psnr = {name: 30.0 + i for i, name in enumerate(FIVE)}
    methods = ("MIR-L-G", "PIR-OSM 70%", "magnitude global iterative rewound to 20000 floor 0.05")
    shown = [one(DENSE, seed, psnr=psnr) for seed in range(seeds)]
    return shown + [
        one(m, s, 1, {n: p - i - s for n, p in psnr.items()}) for i, m in enumerate(methods) for s in range(seeds)
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_table_fits_100_columns_and_shows_every_task(seeds: int) -> None:
    shown = five_tasks(seeds)
    more = {"deblur_k19s4/[bold]a_set_of_a_long_name": 23.45, "superres_4/set14": 24.5, "dejpeg_40/kodak24": 25.25}
    told = shown[-1].ticket.model_copy(update={"scores": shown[-1].ticket.scores | scores(more)})
    shown[-1] = shown[-1]._replace(ticket=told)
    shown_text = printed(text.tables(shown), 200)
    assert max(map(len, shown_text.splitlines())) <= 100
    assert shown_text == printed(text.tables(shown), 100)  # nothing had to give way
    for word in ("23.45", "24.50", "25.25", "[bold]a", "input"):
        assert word in shown_text
    judged = printed(text.judgement_tables(judge.judge(shown)), 200)
    assert max(map(len, judged.splitlines())) <= 100


@pytest.mark.parametrize("width", [30, 40, 60, 80])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_narrow_terminal_breaks_no_number_and_drops_none(seeds: int, width: int) -> None:
    shown = five_tasks(seeds)
    narrow = printed(text.tables(shown), width)
    assert max(map(len, narrow.splitlines())) <= width
    ours = re.findall(r"[\d.,±%]*\d", printed(text.tables(shown)[:1], 100))
    words = set(re.findall(r"[\d.,±%]*\d", narrow))
    assert words >= {word for word in ours if "." in word or "," in word}
    assert ("round: 1" in narrow) == (width < 60 or (width, seeds) == (60, 3))
    judged = [printed(text.judgement_tables(judge.judge(shown)), w) for w in (width, 100)]
    numbers = [{word for word in re.findall(r"[+-][\d.,]*\d", lines)} for lines in judged]
    assert numbers[0] >= numbers[1] and max(map(len, judged[0].splitlines())) <= max(width, 100)


def test_a_table_shows_spreads_only_of_several_seeds() -> None:
    assert "±" not in printed(text.tables(five_tasks(1)))
    several = printed(text.tables(five_tasks(3)))
    assert "±1.00" in several and "±0.0100" in several and "seeds" in several


def test_the_papers_figures_are_in_a_table_of_their_own() -> None:
    ours, *theirs = text.tables(five_tasks(1))
    assert str(ours.title) == "PSNR in dB over SSIM" and "33.53" not in printed([ours])
    assert {str(t.title) for t in theirs} == {"published (full size, other training)"} and len(theirs) == 1
    shown = printed(theirs)
    assert "33.53" in shown and "4.7M" in shown and "PromptIR" in shown  # Table IIIc
    assert "IIIa" in shown and "IIIb" in shown and "IIIc" in shown
    assert len(text.tables([one("A", 0, 1)])) == 1


def test_csv_has_a_line_per_ticket_protocol_and_score_with_all_digits() -> None:
    exact = 30 + 1 / 3
    shown = [
        one('odd "name", µ', 3, 1, {RAIN: exact, NOISE: 25.1}, best=200, began=50, **second(24.5)),
        one(DENSE, 3, protocols={}),
    ]
    rows = list(csv.DictReader(io.StringIO(text.csv(shown).decode("utf-8"))))
    assert tuple(rows[0]) == text.COLUMNS
    assert [(r["method"], r["task"], r["set"], r["protocol"], r["best_step"]) for r in rows] == [
        ('odd "name", µ', "derain", "rain100l", "first", "150"),
        ('odd "name", µ', "denoise_25", "cbsd68", "first", "150"),
        ('odd "name", µ', "derain", "rain100l", "second", ""),
        (DENSE, "derain", "rain100l", "the first protocol", ""),
    ]
    assert (float(rows[0]["psnr"]), float(rows[0]["ssim"])) == (exact, exact / 100)
    assert (rows[0]["seed"], rows[0]["round"], rows[0]["alive"], rows[0]["total"]) == ("3", "1", "200", "200")
    assert (rows[0]["degraded_psnr"], rows[0]["images"]) == ("20.0", "50")
    assert rows[0]["ticket_digest"] == shown[0].ticket.digest()
    assert rows[0]["mask_digest"] == shown[0].ticket.mask_digest


def test_published_figures_have_a_csv_of_their_own() -> None:
    rows = list(csv.DictReader(io.StringIO(text.published_csv().decode())))
    assert len(rows) == len(published.all_figures()) and {row["paper"] for row in rows} == {"MIR-L"}
    assert b"PromptIR" not in text.csv(five_tasks(1))
