"""Decides whether a ticket is a winning ticket (MIR-L, Definition 1), and whether it is better than its controls.

A winning ticket, trained on its own, (1) scores at least as well as the dense network, (2) needs no more steps to its
best validation score, and (3) has fewer weights. All comparisons are paired: a ticket with the dense network of the
same seed, data and network size (statistics.subtract_dense), a control with the ticket whose digest it names as parent.
A mean difference no larger than the standard deviation of the paired differences is 'within the spread': neither a win
nor a loss. A single pair has no spread, and its verdict is marked as that of one seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from mirl_dist.tickets.compare import statistics
from mirl_dist.tickets.compare.entry import CONTROL_PREFIX, Entry
from mirl_dist.tickets.compare.statistics import Group, Statistic, psnr_of

YES, WITHIN, NO, UNKNOWN = "yes", "within the spread", "no", "unknown"
YES_ONE, NO_ONE = "yes (one seed)", "no (one seed)"
WINNING, WITHIN_SEEDS = "winning ticket", "within the spread of seeds"
ALL_ONE, NOT_ALL_ONE = "one seed: at least dense on every task", "one seed: not on every task"
BEATS, LOSES, NOT_RUN = "beats", "loses", "not run"
BEATS_ONE, LOSES_ONE = "beats (one seed)", "no better (one seed)"
CONTROLS = ("reinit", "random_layer", "random_global")
ONE_SEED = "one seed: no spread known"
TWO_SEEDS = "two seeds: the spread itself is uncertain"
CANNOT_TELL = (
    "within the spread: these seeds cannot tell it from dense; 'at least' is not shown, and holds at most on average"
)
CHOSEN = "the round was chosen by scores, by which it is judged here: that favours the ticket"
_KEEPS_TRAINED_VALUES = re.compile(r"PIR-|.*\b(finetune|rate)\b")


class Answer(NamedTuple):
    """One task of a ticket against the dense network, paired by seed; gain and later are None without a pair.

    gain: PSNR in dB, ticket minus dense. score: verdict on the gain: YES, WITHIN or NO by the paired spread, YES_ONE or
    NO_ONE for a single pair, or UNKNOWN. later: optimizer steps to the best validation score, ticket minus dense.
    steps: verdict on `later`, with the same values.
    """

    gain: Statistic | None
    score: str
    later: Statistic | None
    steps: str


class Control(NamedTuple):
    """A ticket against one kind of control.

    gains: PSNR in dB, ticket minus control, by 'task/set'. verdicts: the verdict on each gain. mean: mean difference
    over tasks. verdict: BEATS, WITHIN or LOSES by `mean`; BEATS_ONE or LOSES_ONE for a single pair; NOT_RUN without a
    control; UNKNOWN if a score is not plausible (statistics.is_plausible).
    """

    kind: str
    gains: dict[str, Statistic]
    verdicts: dict[str, str]
    mean: Statistic | None
    verdict: str


class Judgement(NamedTuple):
    """The judgement of one method and round.

    density: surviving / total weights. answers: by 'task/set'. overall: WINNING (every task is YES), WITHIN_SEEDS (no
    task is NO), ALL_ONE or NOT_ALL_ONE (some tasks have a single pair), NO or UNKNOWN.
    """

    method: str
    round_: int
    seeds: tuple[int, ...]
    density: float
    answers: dict[str, Answer]
    controls: tuple[Control, ...]
    overall: str
    remarks: tuple[str, ...]


def judge(entries: Sequence[Entry], tolerance_db: float = 0.0, *, chosen: bool = False) -> list[Judgement]:
    """Judge every method and round, except dense networks and controls.

    tolerance_db: PSNR loss against the dense network, in dB, that still counts as equal. chosen: the rounds were chosen
    by their scores; adds a remark on this bias. Raises UserError as `statistics.group_entries`.
    """
    groups = [group for group in statistics.group_entries(entries) if not (group.dense or group.control)]
    judgements = [_judge_group(group, entries, tolerance_db) for group in groups]
    late = [(*_remark_on_rounds(j, judgements), *([CHOSEN] if chosen else [])) for j in judgements]
    return [j._replace(remarks=j.remarks + remarks) for j, remarks in zip(judgements, late, strict=True)]


def _judge_group(group: Group, entries: Sequence[Entry], tolerance_db: float) -> Judgement:
    dense = [s for s in entries if s.dense]
    gains, laters = (statistics.subtract_dense(group.entries, dense, value) for value in (psnr_of, _best_steps))
    answers = {}
    for name in statistics.task_names(group.entries):
        gain, later = gains.get(name), laters.get(name)
        score = UNKNOWN if name in _broken_scores(group) else _judge_difference(gain, tolerance_db)
        steps = _judge_difference(later and later._replace(mean=-later.mean), 0.0)
        answers[name] = Answer(gain, score, later, steps)
    controls = tuple(_judge_control(kind, group, entries) for kind in CONTROLS)
    overall = _judge_overall(group, answers)
    remarks = tuple(_collect_remarks(group, answers, controls, overall))
    density = group.alive / group.total
    return Judgement(group.method, group.round_, group.seeds, density, answers, controls, overall, remarks)


def _broken_scores(group: Group) -> list[str]:
    """Return the tasks with a score that is not plausible."""
    return list(dict.fromkeys(n for s in group.entries for n in s.ticket.scores if n not in psnr_of(s)))


def _remark_on_rounds(judgement: Judgement, judgements: Sequence[Judgement]) -> list[str]:
    """Return advice if each seed of a method is present with a different round, so that no line has a spread."""
    same_method = [j for j in judgements if j.method == judgement.method]
    seeds = [(seed, j.round_) for j in same_method for seed in j.seeds]
    if len(same_method) < 2 or len(dict(seeds)) < len(seeds):
        return []
    rounds_of_seeds = ", ".join(f"round {round_} for seed {seed}" for seed, round_ in sorted(seeds))
    return [f"{rounds_of_seeds}: judge one round with --round"]


def _best_steps(s: Entry) -> Mapping[str, float]:
    curves = {} if s.ticket.curve is None else s.ticket.curve.psnr
    return {name: step for name, step in s.ticket.best_steps().items() if all(map(math.isfinite, curves[name]))}


def _judge_difference(difference: Statistic | None, tolerance: float) -> str:
    """Judge by the pairs' spread whether difference + tolerance is at least 0. All pairs equal to 0 counts as YES."""
    if difference is None:
        return UNKNOWN
    margin = difference.mean + tolerance
    if difference.sd is None:
        return YES_ONE if margin >= 0 else NO_ONE
    if margin > difference.sd or margin == difference.sd == 0:
        return YES
    return WITHIN if abs(margin) <= difference.sd else NO


def _judge_overall(group: Group, answers: Mapping[str, Answer]) -> str:
    """Apply Definition 1 over all tasks. Without curves only the scores count, and a remark states so."""
    scores = {a.score for a in answers.values()}
    verdicts = scores | {a.steps for a in answers.values()}
    if NO in verdicts or _KEEPS_TRAINED_VALUES.match(group.method):
        return NO
    if NO_ONE in verdicts:
        return NOT_ALL_ONE
    if UNKNOWN in scores or not scores:
        return UNKNOWN
    if WITHIN in verdicts:
        return WITHIN_SEEDS
    return ALL_ONE if YES_ONE in verdicts else WINNING


def _collect_remarks(
    group: Group, answers: Mapping[str, Answer], controls: Sequence[Control], overall: str
) -> list[str]:
    remarks = [*_remark_on_pairs(group, answers)]
    broken = _broken_scores(group)
    if broken:
        remarks.append(f"a score that is no number: {', '.join(broken)}")
    missing = [name for name, a in answers.items() if a.gain is None and name not in broken]
    if missing:
        remarks.append(f"no dense score of the same seed, training, data and network: {', '.join(missing)}")
    if any(a.steps == UNKNOWN for a in answers.values()):
        remarks.append("steps to the best score unknown (no curves): by scores alone")
    if _KEEPS_TRAINED_VALUES.match(group.method):
        remarks.append("kept its trained values: not a ticket in the definition's sense, whatever it scores")
    if overall == WITHIN_SEEDS:
        remarks.append(CANNOT_TELL)
    remarks += [f"control {c.kind} does as well" for c in controls if c.verdict in (WITHIN, LOSES)]
    return remarks + [f"control {c.kind} does as well (one seed)" for c in controls if c.verdict == LOSES_ONE]


def _remark_on_pairs(group: Group, answers: Mapping[str, Answer]) -> list[str]:
    """Return remarks on tasks with only one or two pairs, and on seeds without a dense pair."""
    pairs = {name: min(x.count for x in (a.gain, a.later) if x) for name, a in answers.items() if a.gain}
    remarks = []
    for count, words in ((1, ONE_SEED), (2, TWO_SEEDS)):
        few = [name for name, number in pairs.items() if number == count]
        if few:
            remarks.append(words if len(few) == len(pairs) else f"{words} ({', '.join(few)})")
    fewest = min((a.gain.count for a in answers.values() if a.gain), default=0)
    if 0 < fewest < len(group.seeds):
        remarks.append(f"a dense pair for {fewest} of {len(group.seeds)} seeds")
    return remarks


def _judge_control(kind: str, group: Group, entries: Sequence[Entry]) -> Control:
    """Judge a group against one kind of control, paired by the ticket's digest and averaged per seed."""
    controls_of: dict[str, list[Entry]] = {}
    for s in entries:
        if s.method == f"{CONTROL_PREFIX}{kind}" and s.ticket.parent is not None:
            controls_of.setdefault(s.ticket.parent, []).append(s)

    def against(s: Entry) -> list[Entry]:
        return [c for c in controls_of.get(s.ticket.digest(), []) if statistics.same_network_and_data(c, s)]

    def difference(s: Entry) -> dict[str, float]:
        return statistics.subtract_mean(psnr_of(s), [psnr_of(c) for c in against(s)])

    gains = statistics.over_seeds(group.entries, difference)
    means = statistics.over_seeds(group.entries, lambda s: {"": fmean(d.values())} if (d := difference(s)) else {})
    verdicts = {name: _control_verdict(gain) for name, gain in gains.items()}
    pairs = [(s, c) for s in group.entries for c in against(s)]
    if not all(len(psnr_of(x)) == len(x.ticket.scores) for pair in pairs for x in pair):
        return Control(kind, gains, verdicts, None, UNKNOWN)
    mean = means.get("")
    return Control(kind, gains, verdicts, mean, NOT_RUN if mean is None else _control_verdict(mean))


def _control_verdict(gain: Statistic) -> str:
    if gain.sd is None:
        return BEATS_ONE if gain.mean > 0 else LOSES_ONE
    if abs(gain.mean) <= gain.sd:
        return WITHIN
    return BEATS if gain.mean > 0 else LOSES


def to_json(value: Any) -> Any:
    """Convert judgements to plain values for JSON; numbers that are not finite become None."""
    if hasattr(value, "_asdict"):
        return {name.rstrip("_"): to_json(inner) for name, inner in value._asdict().items()}
    if isinstance(value, dict):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
