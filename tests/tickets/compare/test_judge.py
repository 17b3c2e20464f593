"""Laws of judging: a winning ticket needs scores, steps and pairs; what the spread of pairs explains is no verdict."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mirl_dist.tickets.compare import judge
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.compare.judge import Judgement
from mirl_dist.tickets.report.text_tables import judgement_tables
from tests.tickets.compare.test_compare import NOISE, RAIN, one, printed, spoilt


def pairs(differences: list[float], dense: list[float] | None = None, **more: Any) -> list[Entry]:
    """A dense network and a ticket of round 1 for each seed. dense: PSNR of the dense ones, 30 by default."""
    values = dense or [30.0] * len(differences)
    shown = [one(DENSE, seed, psnr={RAIN: p}, best=200) for seed, p in enumerate(values)]
    for seed, (p, d) in enumerate(zip(values, differences, strict=True)):
        shown.append(one("MIR-L-G", seed, 1, {RAIN: p + d}, **{"alive": 63, "best": 200} | more))
    return shown


def only(shown: list[Entry], tolerance_db: float = 0.0) -> Judgement:
    [found] = judge.judge(shown, tolerance_db)
    return found


def test_a_ticket_better_than_the_spread_after_as_many_steps_wins() -> None:
    found = only(pairs([0.25, 0.75, 0.5]))
    assert found.overall == "winning ticket"
    assert found.answers[RAIN].score == found.answers[RAIN].steps == "yes"
    gain = found.answers[RAIN].gain
    assert gain is not None and gain == (0.5, 0.25, 3)
    assert (found.method, found.round_, found.seeds, found.density) == ("MIR-L-G", 1, (0, 1, 2), 0.5)
    assert found.remarks == ()


@pytest.mark.parametrize(
    ("differences", "dense", "word", "overall"),
    [
        ([-0.5, 0.25, -0.5], [30.0, 30.0, 30.0], "within the spread", "within the spread of seeds"),
        ([0.5, -0.25, 0.5], [30.0, 30.0, 30.0], "within the spread", "within the spread of seeds"),
        ([0.51, -0.49], [30.0, 30.0], "within the spread", "within the spread of seeds"),
        ([-0.51, 0.49], [30.0, 30.0], "within the spread", "within the spread of seeds"),
        ([-1.01, -0.99], [27.0, 33.0], "no", "no"),
        ([1.01, 0.99], [27.0, 33.0], "yes", "winning ticket"),
        ([-0.5, -0.5, -0.5], [29.0, 30.0, 31.0], "no", "no"),
        ([0.0, 0.0, 0.0], [29.0, 30.0, 31.0], "yes", "winning ticket"),
        ([5.0], [30.0], "yes (one seed)", "one seed: at least dense on every task"),
        ([0.0], [30.0], "yes (one seed)", "one seed: at least dense on every task"),
        ([-0.01], [30.0], "no (one seed)", "one seed: not on every task"),
    ],
)
def test_only_the_spread_of_pairs_tells_a_difference_from_none_either_way(
    differences: list[float], dense: list[float], word: str, overall: str
) -> None:
    found = only(pairs(differences, dense))
    assert (found.answers[RAIN].score, found.overall) == (word, overall)


def test_a_task_of_one_pair_keeps_the_others_from_winning() -> None:
    shown = [one(DENSE, seed, psnr={RAIN: 30.0, NOISE: 25.0}, best=200) for seed in range(2)]
    shown += [
        one("A", 0, 1, {RAIN: 31.0, NOISE: 26.0}, best=200),
        one("A", 1, 1, {RAIN: 31.5}, best=200),
    ]
    found = only(shown)
    assert (found.answers[RAIN].score, found.answers[NOISE].score) == ("yes", "yes (one seed)")
    assert found.overall == "one seed: at least dense on every task"
    assert f"one seed: no spread known ({NOISE})" in found.remarks
    shown[2] = one("A", 0, 1, {RAIN: 28.0, NOISE: 26.0}, best=200)
    assert only(shown).overall == "within the spread of seeds"


def test_what_few_seeds_cannot_tell_is_remarked_and_a_clear_answer_is_not() -> None:
    assert only(pairs([5.0])).remarks == only(pairs([-0.01])).remarks == ("one seed: no spread known",)
    assert only(pairs([1.0, 1.1])).remarks == ("two seeds: the spread itself is uncertain",)
    assert only(pairs([1.0, 1.1, 1.2])).remarks == ()
    assert judge.CANNOT_TELL in only(pairs([0.5, -0.25, 0.5])).remarks
    assert judge.CANNOT_TELL not in only(pairs([-0.5, -0.5, -0.5])).remarks


def test_the_tolerance_moves_the_mean_before_the_spread_is_asked() -> None:
    assert only(pairs([-0.125])).overall == "one seed: not on every task"
    assert only(pairs([-0.125]), 0.125).overall == "one seed: at least dense on every task"
    assert only(pairs([-0.125]), 0.1).overall == "one seed: not on every task"
    several = pairs([-0.25, -0.15, -0.05])  # -0.15 ± 0.10
    assert [only(several, t).answers[RAIN].score for t in (0.0, 0.1, 0.2, 0.3)] == [
        "no",
        "within the spread",
        "within the spread",
        "yes",
    ]


def test_rounds_that_were_chosen_by_their_scores_are_said_to_be() -> None:
    shown = pairs([1.0, 1.1, 1.2])
    [found] = judge.judge(shown, chosen=True)
    assert found.remarks == (judge.CHOSEN,) and found.overall == "winning ticket"


def test_seeds_that_stand_by_other_rounds_are_told_how_to_be_judged_together() -> None:
    shown = [one(DENSE, seed, best=200) for seed in range(2)]
    shown += [one("A", 0, 6, {RAIN: 31.0}, best=200), one("A", 1, 8, {RAIN: 31.0}, best=200)]
    hint = "round 6 for seed 0, round 8 for seed 1: judge one round with --round"
    assert [hint in j.remarks for j in judge.judge(shown)] == [True, True]
    together = [*shown, one("A", 0, 8, {RAIN: 31.0}, best=200)]
    assert not any("--round" in remark for j in judge.judge(together) for remark in j.remarks)
    other = [*shown[:3], shown[3]._replace(experiment="another")]
    assert not any("--round" in remark for j in judge.judge(other) for remark in j.remarks)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e308])
@pytest.mark.parametrize("at", [1, 4])
def test_a_score_that_is_no_number_is_unknown_and_flatters_nobody(number: float, at: int) -> None:
    shown = pairs([1.0, 1.0, 1.0])
    shown[at] = spoilt(shown[at], psnr=number)
    found = only(shown)
    assert found.answers[RAIN].gain == (1.0, 0.0, 2)
    if at == 4:  # the ticket's own
        assert (found.answers[RAIN].score, found.overall) == ("unknown", "unknown")
        assert f"a score that is no number: {RAIN}" in found.remarks
    assert "a dense pair for 2 of 3 seeds" in found.remarks
    json.dumps(judge.to_json([found]), allow_nan=False)
    assert "nan" not in printed(judgement_tables([found]))


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
    found = only(pairs([1.0, 1.0, 1.0], best=None))
    assert (found.answers[RAIN].steps, found.answers[RAIN].later, found.overall) == ("unknown", None, "winning ticket")
    assert found.remarks == ("steps to the best score unknown (no curves): by scores alone",)


def test_without_a_dense_ticket_nothing_is_known() -> None:
    found = only(pairs([1.0])[1:])
    assert found.overall == "unknown" and found.answers[RAIN] == (None, "unknown", None, "unknown")
    assert "no dense score of the same seed, training, data and network: derain/rain100l" in found.remarks
    other = [one(DENSE, 7), *pairs([1.0])[1:]]
    assert only(other).overall == "unknown"


def test_one_lost_task_is_enough_to_lose_and_a_missing_one_to_know_nothing() -> None:
    tickets = [one("A", seed, 1, {RAIN: 31.0, NOISE: 24.0}, best=200) for seed in range(2)]
    dense = [one(DENSE, seed, psnr={RAIN: 30.0, NOISE: 25.0}, best=200) for seed in range(2)]
    assert only([*dense, *tickets]).overall == "no"
    assert only([dense[0], tickets[0]]).overall == "one seed: not on every task"
    part = [one(DENSE, seed, psnr={RAIN: 30.0}, best=200) for seed in range(2)]
    found = only([*part, *tickets])
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
    assert found.answers[RAIN].score == "yes (one seed)" and found.overall == "no"
    assert "kept its trained values" in found.remarks[-1]


def test_rewound_networks_are_tickets_whatever_their_criterion() -> None:
    for method in ("MIR-L-LW", "snip global iterative rewound to 200", "gradient layer iterative rewound floor 0.1"):
        shown = [one(m, s, r, best=200) for s in range(2) for m, r in ((DENSE, 0), (method, 1))]
        assert only(shown).overall == "winning ticket"


def test_dense_networks_and_controls_are_not_judged() -> None:
    assert judge.judge([one(DENSE), one("control reinit", 0, 0), one("control random_global", 0, 0)]) == []


# Controls.


def control(kind: str, of: Entry, psnr: float, **more: Any) -> Entry:
    return one(f"control {kind}", of.seed, 0, {RAIN: psnr}, run=f"{kind} {psnr}", parent=of.ticket.digest(), **more)


def verdicts(shown: list[Entry]) -> dict[str, str]:
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
        ((30.0, 30.0), "within the spread"),
        ((30.0,), "no better (one seed)"),
        ((29.99,), "beats (one seed)"),
    ],
)
def test_a_control_within_the_spread_is_neither_beaten_nor_better(scores: tuple[float, ...], verdict: str) -> None:
    shown = pairs([0.0] * len(scores))
    tickets = [s for s in shown if s.method == "MIR-L-G"]
    shown += [control("random_layer", t, score) for t, score in zip(tickets, scores, strict=True)]
    found = only(shown)
    assert found.controls[1].verdict == found.controls[1].verdicts[RAIN] == verdict
    remark = "control random_layer does as well" + " (one seed)" * (len(scores) == 1)
    assert (remark in found.remarks) == (not verdict.startswith("beats"))


def test_several_controls_of_one_ticket_are_one_value() -> None:
    shown = pairs([0.0])
    shown += [control("reinit", shown[1], score) for score in (28.0, 29.0)]
    assert only(shown).controls[0].mean == (1.5, None, 1)


def test_the_verdict_on_a_control_is_that_of_the_mean_over_tasks() -> None:
    tickets = [one("MIR-L-G", seed, 1, {RAIN: 30.0, NOISE: 25.0}) for seed in range(2)]
    others = [one("control reinit", t.seed, 0, {RAIN: 30.5, NOISE: 22.0}, parent=t.ticket.digest()) for t in tickets]
    found = only([*tickets, *others]).controls[0]
    assert found.verdicts == {RAIN: "loses", NOISE: "beats"}
    assert found.verdict == "beats" and found.mean is not None and found.mean.mean == 1.25


def test_a_control_of_other_data_is_none() -> None:
    shown = pairs([0.0])
    assert verdicts([*shown, control("reinit", shown[1], 20.0, manifest_digest="n" * 64)])["reinit"] == "not run"


# For people and programs.


def test_tables_say_differences_words_controls_and_remarks() -> None:
    shown = pairs([-0.5, 0.25])
    said = printed(judgement_tables(judge.judge(shown)))
    for word in ("-0.12", "±0.53", "within the", "steps to the best score", "50.0%", "no control was run"):
        assert word in said
    shown += [control("reinit", t, 29.0) for t in shown if t.method == "MIR-L-G"]
    said = printed(judgement_tables(judge.judge(shown)))
    assert "ticket minus control" in said and "not run" in said and "no control was run" not in said
    assert "one seed: no spread known" in printed(judgement_tables(judge.judge(pairs([1.0]))))
    assert judgement_tables([]) is not None


def test_json_says_all_and_is_json() -> None:
    shown = pairs([0.75, 1.25])
    shown.append(spoilt(control("reinit", shown[2], 29.0), psnr=math.nan))
    [found] = json.loads(json.dumps(judge.to_json(judge.judge(shown)), allow_nan=False))
    assert (found["method"], found["round"], found["seeds"], found["density"]) == ("MIR-L-G", 1, [0, 1], 0.5)
    assert found["answers"][RAIN]["gain"] == {"mean": 1.0, "sd": pytest.approx(0.125**0.5), "count": 2}
    assert (found["controls"][0]["mean"], found["controls"][0]["verdict"]) == (None, "unknown")
    assert (found["overall"], found["remarks"]) == ("winning ticket", [judge.TWO_SEEDS])
