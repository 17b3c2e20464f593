"""MIR-L's Definition 1: is a ticket a winning one? And is it better than its controls?

A winning ticket, trained by itself, (1) scores at least what the dense network scores, (2) after no more steps to its
best validation score, (3) with fewer weights. All is paired: a ticket with the dense network of the same seed, data
and network (summary.paired), a control with the very ticket whose digest its own names as parent. A difference that
is no larger than the spread of seeds is called that, and neither a win nor a loss.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from rich.table import Table

from mirl_dist.compare import summary, text
from mirl_dist.compare.shown import DENSE, Shown
from mirl_dist.compare.summary import CONTROL, Line, Spread

YES, WITHIN, NO, UNKNOWN = "yes", "within the spread", "no", "unknown"
WINNING, WITHIN_SEEDS = "winning ticket", "within the spread of seeds"
BEATS, LOSES, NOT_RUN = "beats", "loses", "not run"
CONTROLS = ("reinit", "random_layer", "random_global")
ONE_SEED = "one seed: no spread known"
_KEPT_VALUES = re.compile(r"PIR-|.*\b(finetune|rate)\b")


class Answer(NamedTuple):
    """One task of one ticket against the dense network, paired by seed; None where there is no pair.

    gain: PSNR in dB, ticket minus dense; score: YES, WITHIN, NO or UNKNOWN. later: optimiser steps to the best
    validation score, ticket minus dense; steps: the same words.
    """

    gain: Spread | None
    score: str
    later: Spread | None
    steps: str


class Control(NamedTuple):
    """A ticket against one kind of control: PSNR in dB, ticket minus control, by 'task/set', and a word for each.

    verdict: BEATS, WITHIN or LOSES by `mean`, the mean over tasks of the differences; NOT_RUN without a control;
    UNKNOWN where a score is not a number.
    """

    kind: str
    gains: dict[str, Spread]
    verdicts: dict[str, str]
    mean: Spread | None
    verdict: str


class Judgement(NamedTuple):
    """Of one method and round. density: alive / total weights. overall: WINNING, WITHIN_SEEDS, NO or UNKNOWN."""

    method: str
    round_: int
    seeds: tuple[int, ...]
    density: float
    answers: dict[str, Answer]
    controls: tuple[Control, ...]
    overall: str
    remarks: tuple[str, ...]


def judge(shown: Sequence[Shown], tolerance_db: float = 0.0) -> list[Judgement]:
    """A judgement of every method and round that is neither dense nor a control.

    tolerance_db: how much less than the dense network still counts as its score, in dB. Raises Fault as
    `summary.lines`.
    """
    lines = [line for line in summary.lines(shown) if line.method != DENSE and not line.method.startswith(CONTROL)]
    return [_judge(line, shown, tolerance_db) for line in lines]


def _judge(line: Line, shown: Sequence[Shown], tolerance_db: float) -> Judgement:
    dense = [s for s in shown if s.method == DENSE and any(summary.same_ground(s, one) for one in line.shown)]
    gain_by, gain_of = _against(line, dense, _psnr)
    step_by, step_of = _against(line, dense, _steps)
    answers = {}
    for name in line.psnr:
        gain, later = gain_by.get(name), step_by.get(name)
        answers[name] = Answer(
            gain,
            _at_least(gain, gain_of.get(name), tolerance_db),
            later,
            _at_least(None if later is None else later._replace(mean=-later.mean), step_of.get(name), 0.0),
        )
    controls = tuple(_control(kind, line, shown) for kind in CONTROLS)
    return Judgement(
        method=line.method,
        round_=line.round_,
        seeds=line.seeds,
        density=line.alive / line.total,
        answers=answers,
        controls=controls,
        overall=_overall(line, answers),
        remarks=tuple(_remarks(line, answers, controls)),
    )


def _psnr(s: Shown) -> dict[str, float]:
    return {name: score.psnr for name, score in s.ticket.scores.items()}


def _steps(s: Shown) -> Mapping[str, float]:
    return s.ticket.best_steps()


def _against(
    line: Line, dense: Sequence[Shown], value: Callable[[Shown], Mapping[str, float]]
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """By 'task/set': the paired differences to the dense network, and the dense network's own values."""
    return summary.spreads(summary.paired(line.shown, dense, value)), summary.spreads(summary.by_seed(dense, value))


def _at_least(difference: Spread | None, dense: Spread | None, tolerance: float) -> str:
    """Whether what is paired is not below; within the spread of the differences or of the dense seeds it may be."""
    if difference is None or math.isnan(difference.mean):
        return UNKNOWN
    if difference.mean >= -tolerance:
        return YES
    spreads = [s.sd for s in (difference, dense) if s is not None and s.sd is not None]
    return WITHIN if any(abs(difference.mean) <= sd for sd in spreads) else NO


def _overall(line: Line, answers: Mapping[str, Answer]) -> str:
    """Definition 1 over all tasks. Without curves it is judged by scores alone, which a remark says."""
    scores, steps = {a.score for a in answers.values()}, {a.steps for a in answers.values()}
    if NO in scores | steps or _KEPT_VALUES.match(line.method):
        return NO
    if UNKNOWN in scores or not scores:
        return UNKNOWN
    return WITHIN_SEEDS if WITHIN in scores | steps else WINNING


def _remarks(line: Line, answers: Mapping[str, Answer], controls: Sequence[Control]) -> list[str]:
    found = []
    counts = [a.gain.count for a in answers.values() if a.gain is not None]
    if counts and max(counts) == 1:
        found.append(ONE_SEED)
    if counts and max(counts) < len(line.seeds):
        found.append(f"a dense pair for {max(counts)} of {len(line.seeds)} seeds")
    missing = [name for name, a in answers.items() if a.score == UNKNOWN]
    if missing:
        found.append(f"no dense score of the same seed, data and network: {', '.join(missing)}")
    if any(a.steps == UNKNOWN for a in answers.values()):
        found.append("steps to the best score unknown (no curves): by scores alone")
    if _KEPT_VALUES.match(line.method):
        found.append("kept its trained values: no ticket in the definition's sense, whatever it scores")
    found += [f"control {c.kind} does as well" for c in controls if c.verdict in (WITHIN, LOSES)]
    return found


def _control(kind: str, line: Line, shown: Sequence[Shown]) -> Control:
    """Differences of one kind of control, paired by the digest of the ticket, then a value per seed of the ticket."""
    theirs: dict[str, list[Shown]] = {}
    for s in shown:
        if s.method == f"{CONTROL}{kind}" and s.ticket.parent is not None:
            theirs.setdefault(s.ticket.parent, []).append(s)

    def difference(s: Shown) -> dict[str, float]:
        against = [_psnr(c) for c in theirs.get(s.ticket.digest(), []) if summary.same_ground(c, s)]
        known = {name: [c[name] for c in against if name in c] for name in s.ticket.scores}
        return {name: value - fmean(known[name]) for name, value in _psnr(s).items() if known[name]}

    def mean(s: Shown) -> dict[str, float]:
        found = difference(s)
        return {"": fmean(found.values())} if found else {}

    gains = summary.spreads(summary.by_seed(line.shown, difference))
    over = summary.spreads(summary.by_seed(line.shown, mean)).get("")
    verdicts = {name: _word(gain) for name, gain in gains.items()}
    return Control(kind, gains, verdicts, over, NOT_RUN if over is None else _word(over))


def _word(gain: Spread) -> str:
    if math.isnan(gain.mean):
        return UNKNOWN
    if abs(gain.mean) <= (gain.sd or 0.0):
        return WITHIN
    return BEATS if gain.mean > 0 else LOSES


def tables(judgements: Sequence[Judgement]) -> list[Table]:
    """For a terminal: (1) and, where curves tell, (2) of the definition per task; then controls; remarks below."""
    names = list(dict.fromkeys(name for j in judgements for name in j.answers))
    heads = ("method", "round", "density", "winning?")
    fixed = [(j.method, str(j.round_), f"{j.density:.1%}", j.overall) for j in judgements]
    rows = [text.Row(f, _cells(j)) for f, j in zip(fixed, judgements, strict=True)]
    found = text.blocks("PSNR against the dense network, dB: at least as good?", heads, rows, names)
    rows = [text.Row(f, _step_cells(j)) for f, j in zip(fixed, judgements, strict=True)]
    if any(row.cells for row in rows):
        found += text.blocks("steps to the best score against the dense network's: no more?", heads, rows, names)
    tried = [
        text.Row((j.method, str(j.round_), c.kind, c.verdict), _control_cells(c))
        for j in judgements
        if any(c.verdict != NOT_RUN for c in j.controls)
        for c in j.controls
    ]
    if tried:
        heads = ("method", "round", "control", "verdict")
        found += text.blocks("PSNR against controls, dB (ticket minus control)", heads, tried, names)
    said = [f"{j.method}, round {j.round_}: {'; '.join(j.remarks)}" for j in judgements if j.remarks]
    said += [] if tried else ["no control was run"]
    return text.with_remarks(found, [*said, "within the spread: no larger than ±, here or between the dense seeds"])


def _cells(j: Judgement) -> dict[str, str]:
    return {n: _cell(a.gain, 2, a.score) for n, a in j.answers.items()}


def _step_cells(j: Judgement) -> dict[str, str]:
    return {n: _cell(a.later, 0, a.steps) for n, a in j.answers.items() if a.later is not None}


def _control_cells(c: Control) -> dict[str, str]:
    return {n: _cell(gain, 2, c.verdicts[n]) for n, gain in c.gains.items()}


def _cell(spread: Spread | None, digits: int, word: str) -> str:
    numbers = [] if spread is None else text.told(spread, digits, "+")
    return "\n".join([*numbers, *word.split(" the ")])


def to_json(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """All of it as plain values for JSON; numbers that are not finite are None."""
    return [_plain(j) for j in judgements]


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name.rstrip("_"): _plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
