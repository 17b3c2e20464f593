"""Laws of judging: a winning ticket needs scores, steps and pairs; what the spread of seeds explains is no verdict."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_compare import NOISE, RAIN, one, printed

from mirl_dist.compare import judge
from mirl_dist.compare.judge import Judgement
from mirl_dist.compare.shown import DENSE, Shown


def pairs(differences: list[float], dense: list[float] | None = None, **more: Any) -> list[Shown]:
    """A dense network and a ticket of round 1 for each seed. dense: PSNR of the dense ones, 30 by default."""
    values = dense or [30.0] * len(differences)
    shown = [one(DENSE, seed, psnr={RAIN: p}, best=200) for seed, p in enumerate(values)]
    for seed, (p, d) in enumerate(zip(values, differences, strict=True)):
        shown.append(one("MIR-L-G", seed, 1, {RAIN: p + d}, **{"alive": 63, "best": 200} | more))
    return shown


def only(shown: list[Shown], tolerance_db: float = 0.0) -> Judgement:
    [found] = judge.judge(shown, tolerance_db)
    return found


def test_a_ticket_as_good_as_dense_after_as_many_steps_wins() -> None:
    found = only(pairs([0.0, 0.5, 0.25]))
    assert found.overall == "winning ticket"
    assert found.answers[RAIN].score == found.answers[RAIN].steps == "yes"
    gain = found.answers[RAIN].gain
    assert gain is not None and gain == (0.25, 0.25, 3)
    assert (found.method, found.round_, found.seeds, found.density) == ("MIR-L-G", 1, (0, 1, 2), 0.5)
    assert found.remarks == ()


@pytest.mark.parametrize(
    ("differences", "dense", "word", "overall"),
    [
        ([-0.5, 0.25, -0.5], [30.0, 30.0, 30.0], "within the spread", "within the spread of seeds"),
        ([-0.5, -0.5, -0.5], [29.0, 30.0, 31.0], "within the spread", "within the spread of seeds"),
        ([-0.5, -0.5, -0.5], [30.0, 30.0, 30.0], "no", "no"),
        ([-1.5, -1.5, -1.5], [29.0, 30.0, 31.0], "no", "no"),
        ([-0.5, 0.25], [30.0, 30.0], "within the spread", "within the spread of seeds"),
    ],
)
def test_what_is_less_than_dense_is_a_loss_only_beyond_the_spread(
    differences: list[float], dense: list[float], word: str, overall: str
) -> None:
    found = only(pairs(differences, dense))
    assert (found.answers[RAIN].score, found.overall) == (word, overall)


def test_one_seed_gives_a_verdict_that_says_so() -> None:
    for difference, overall in ((0.0, "winning ticket"), (-0.01, "no")):
        found = only(pairs([difference]))
        assert (found.overall, found.remarks) == (overall, ("one seed: no spread known",))


def test_a_loss_within_the_tolerance_is_none() -> None:
    assert only(pairs([-0.125])).overall == "no"
    assert only(pairs([-0.125]), 0.125).overall == "winning ticket"
    assert only(pairs([-0.125]), 0.1).overall == "no"


def test_more_steps_to_the_best_score_are_a_loss_and_fewer_are_none() -> None:
    slow, quick = only(pairs([1.0, 1.0], best=300)), only(pairs([1.0, 1.0], best=100))
    assert (slow.answers[RAIN].steps, slow.overall) == ("no", "no")
    assert slow.answers[RAIN].later == (100.0, 0.0, 2)
    assert (quick.answers[RAIN].steps, quick.overall) == ("yes", "winning ticket")
    shown = pairs([1.0, 1.0], best=300)
    shown[-1] = one("MIR-L-G", 1, 1, {RAIN: 31.0}, best=200)  # 100 and 0 steps later
    assert only(shown).answers[RAIN].steps == "within the spread"
    assert only(shown).overall == "within the spread of seeds"


def test_without_curves_steps_are_unknown_and_the_scores_alone_decide() -> None:
    found = only(pairs([1.0, 1.0], best=None))
    assert (found.answers[RAIN].steps, found.answers[RAIN].later, found.overall) == ("unknown", None, "winning ticket")
    assert found.remarks == ("steps to the best score unknown (no curves): by scores alone",)


def test_without_a_dense_ticket_nothing_is_known() -> None:
    found = only(pairs([1.0])[1:])
    assert found.overall == "unknown" and found.answers[RAIN] == (None, "unknown", None, "unknown")
    assert "no dense score of the same seed, data and network: derain/rain100l" in found.remarks
    other = [one(DENSE, 7), *pairs([1.0])[1:]]
    assert only(other).overall == "unknown"


def test_one_lost_task_is_enough_to_lose_and_a_missing_one_to_know_nothing() -> None:
    dense = one(DENSE, psnr={RAIN: 30.0, NOISE: 25.0}, best=200)
    assert only([dense, one("A", 0, 1, {RAIN: 31.0, NOISE: 24.0}, best=200)]).overall == "no"
    part = one(DENSE, psnr={RAIN: 30.0}, best=200)
    found = only([part, one("A", 0, 1, {RAIN: 31.0, NOISE: 24.0}, best=200)])
    assert (found.answers[RAIN].score, found.answers[NOISE].score, found.overall) == ("yes", "unknown", "unknown")


def test_unequal_seeds_are_judged_by_their_pairs() -> None:
    found = only([*pairs([0.5]), one("MIR-L-G", 1, 1, {RAIN: 1.0}, alive=63, best=200)])
    gain = found.answers[RAIN].gain
    assert gain == (0.5, None, 1) and found.seeds == (0, 1)
    assert found.remarks == ("one seed: no spread known", "a dense pair for 1 of 2 seeds")


@pytest.mark.parametrize(
    "method", ["PIR-OSM 70%", "magnitude global iterative rate", "random layer one-shot finetune 30%"]
)
def test_networks_that_kept_their_trained_values_are_no_tickets(method: str) -> None:
    found = only([one(DENSE, best=200), one(method, 0, 1, {RAIN: 35.0}, best=100)])
    assert found.answers[RAIN].score == "yes" and found.overall == "no"
    assert "kept its trained values" in found.remarks[-1]


def test_rewound_networks_are_tickets_whatever_their_criterion() -> None:
    for method in ("MIR-L-LW", "snip global iterative rewound to 200", "gradient layer iterative rewound floor 0.1"):
        assert only([one(DENSE, best=200), one(method, 0, 1, {RAIN: 30.0}, best=200)]).overall == "winning ticket"


def test_dense_networks_and_controls_are_not_judged() -> None:
    assert judge.judge([one(DENSE), one("control reinit", 0, 0), one("control random_global", 0, 0)]) == []


# Controls.


def control(kind: str, of: Shown, psnr: float, **more: Any) -> Shown:
    return one(f"control {kind}", of.seed, 0, {RAIN: psnr}, run=f"{kind} {psnr}", parent=of.ticket.digest(), **more)


def verdicts(shown: list[Shown]) -> dict[str, str]:
    return {c.kind: c.verdict for c in only(shown).controls}


def test_a_ticket_is_held_against_the_controls_of_itself_alone() -> None:
    shown = pairs([0.0, 0.0])
    tickets = [s for s in shown if s.method == "MIR-L-G"]
    stranger = one("MIR-L-G", 0, 2, {RAIN: 40.0})
    shown += [control("reinit", t, 29.0) for t in tickets] + [control("reinit", stranger, 40.0)]
    assert verdicts(shown) == {"reinit": "beats", "random_layer": "not run", "random_global": "not run"}
    found = only(shown).controls[0]
    assert found.gains == {RAIN: (1.0, 0.0, 2)} and found.mean == (1.0, 0.0, 2)


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((29.0, 29.5), "beats"),
        ((29.0, 30.5), "within the spread"),
        ((31.0, 31.5), "loses"),
        ((30.0,), "within the spread"),
        ((29.99,), "beats"),
    ],
)
def test_a_control_within_the_spread_is_neither_beaten_nor_better(scores: tuple[float, ...], verdict: str) -> None:
    shown = pairs([0.0] * len(scores))
    tickets = [s for s in shown if s.method == "MIR-L-G"]
    shown += [control("random_layer", t, score) for t, score in zip(tickets, scores, strict=True)]
    found = only(shown)
    assert found.controls[1].verdict == found.controls[1].verdicts[RAIN] == verdict
    assert ("control random_layer does as well" in found.remarks) == (verdict != "beats")


def test_several_controls_of_one_ticket_are_one_value() -> None:
    shown = pairs([0.0])
    shown += [control("reinit", shown[1], score) for score in (28.0, 29.0)]
    assert only(shown).controls[0].mean == (1.5, None, 1)


def test_the_verdict_on_a_control_is_that_of_the_mean_over_tasks() -> None:
    ticket = one("MIR-L-G", 0, 1, {RAIN: 30.0, NOISE: 25.0})
    other = one("control reinit", 0, 0, {RAIN: 30.5, NOISE: 22.0}, parent=ticket.ticket.digest())
    found = only([ticket, other]).controls[0]
    assert found.verdicts == {RAIN: "loses", NOISE: "beats"}
    assert found.verdict == "beats" and found.mean is not None and found.mean.mean == 1.25


def test_a_control_of_other_data_is_none() -> None:
    shown = pairs([0.0])
    assert verdicts([*shown, control("reinit", shown[1], 20.0, manifest_digest="n" * 64)])["reinit"] == "not run"


# For people and programs.


def test_tables_say_differences_words_controls_and_remarks() -> None:
    shown = pairs([-0.5, 0.25])
    said = printed(judge.tables(judge.judge(shown)))
    for word in ("-0.12", "±0.53", "within the", "steps to the best score", "50.0%", "no control was run"):
        assert word in said
    shown += [control("reinit", t, 29.0) for t in shown if t.method == "MIR-L-G"]
    said = printed(judge.tables(judge.judge(shown)))
    assert "ticket minus control" in said and "not run" in said and "no control was run" not in said
    assert "one seed: no spread known" in printed(judge.tables(judge.judge(pairs([1.0]))))
    assert judge.tables([]) is not None


def test_json_says_all_and_is_json() -> None:
    shown = pairs([0.0, 1.0])
    shown.append(control("reinit", shown[2], float("nan")))
    [found] = json.loads(json.dumps(judge.to_json(judge.judge(shown)), allow_nan=False))
    assert (found["method"], found["round"], found["seeds"], found["density"]) == ("MIR-L-G", 1, [0, 1], 0.5)
    assert found["answers"][RAIN]["gain"] == {"mean": 0.5, "sd": pytest.approx(0.5**0.5), "count": 2}
    assert (found["controls"][0]["mean"]["mean"], found["controls"][0]["verdict"]) == (None, "unknown")
    assert (found["overall"], found["remarks"]) == ("winning ticket", [])
