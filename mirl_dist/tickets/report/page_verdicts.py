"""The page's table of judgements: MIR-L's Definition 1 per task, and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mirl_dist.tickets.compare import judge
from mirl_dist.tickets.compare.judge import Answer, Control, Judgement
from mirl_dist.tickets.compare.statistics import Statistic
from mirl_dist.tickets.report.chart_style import Style, swatch
from mirl_dist.tickets.report.html import Html, broken, join, picture, row, table, tag

_GOOD, _BAD = (judge.YES, judge.WINNING, judge.BEATS), (judge.NO, judge.LOSES)
MEANING = (
    "Definition 1: trained by itself, a winning ticket (1) scores at least what the dense network of the same seed "
    "scores, (2) needs no more steps to its best score, (3) with fewer weights. First line of a task: ticket minus "
    "dense in dB, paired by seed; second: steps to the best score, ticket minus dense. ±: sample standard deviation "
    "of these differences. Yes: better by more than it, or equal in every pair; within: no larger than it, so these "
    "seeds cannot tell the ticket from dense. One seed has no spread, and makes no winning ticket. A control that does "
    "as well takes the win's meaning away: reinit draws first values anew under the same mask; random_layer and "
    "random_global take a random mask of the same density, per tensor or over all. Their cells: ticket minus control, "
    "mean over tasks, in dB."
)


def verdicts(judgements: Sequence[Judgement], styles: Mapping[str, Style]) -> Html:
    """A row per method and round: overall, each task, each kind of control that was run, remarks."""
    names = list(dict.fromkeys(name for j in judgements for name in j.answers))
    kinds = [
        kind
        for kind in judge.CONTROLS
        if any(c.kind == kind and c.verdict != judge.NOT_RUN for j in judgements for c in j.controls)
    ]
    last = {j.method: j.round_ for j in judgements}
    numbers = [tag("th", broken(name), class_="number") for name in (*names, *(f"against/{kind}" for kind in kinds))]
    head = ("method", "round", "density", "winning?", *numbers, "remarks")
    body, before = [], ""
    for j in judgements:
        words = ["first"] * (j.method != before) + ["early"] * (j.round_ != last[j.method])
        body.append(row(_cells(j, names, kinds, styles), class_=" ".join(words) if words else False))
        before = j.method
    lacking = [kind for kind in judge.CONTROLS if kind not in kinds]
    not_run = f"Controls that were not run: {', '.join(lacking)} (start.kind)." if lacking else ""
    return join([table([head], body), tag("p", f"{MEANING} {not_run}", class_="soft")])


def _cells(j: Judgement, names: Sequence[str], kinds: Sequence[str], styles: Mapping[str, Style]) -> list[Html | str]:
    legend = picture(swatch(j.method, styles[j.method]), "") if j.method in styles else ""
    controls = {c.kind: c for c in j.controls}
    return [
        tag("td", legend, j.method, class_="method"),
        tag("td", str(j.round_), class_="number"),
        tag("td", f"{j.density:.1%}", class_="number"),
        tag("td", _verdict_tag(j.overall), class_="overall"),
        *(_answer_cell(j.answers.get(name)) for name in names),
        *(_control_cell(controls.get(kind)) for kind in kinds),
        tag("td", tag("small", "; ".join(j.remarks)), class_="run"),
    ]


def _answer_cell(answer: Answer | None) -> Html:
    if answer is None:
        return tag("td", "–", class_="number")
    gain = [_format_statistic(answer.gain, "+.2f"), " ", _verdict_tag(answer.score)]
    later = [_format_statistic(answer.later, "+,.0f"), " steps ", _verdict_tag(answer.steps)] if answer.later else []
    return tag("td", *gain, *([tag("br"), tag("small", *later)] if later else []), class_="number")


def _control_cell(control: Control | None) -> Html:
    if control is None or control.mean is None:
        return tag("td", "–", class_="number")
    return tag("td", _format_statistic(control.mean, "+.2f"), " ", _verdict_tag(control.verdict), class_="number")


def _format_statistic(statistic: Statistic | None, form: str) -> Html:
    if statistic is None:
        return Html("–")
    mean = f"{statistic.mean:{form}}".replace("-", "−")
    mean = "0" if mean in ("+0", "−0") else mean
    if statistic.sd is None:
        return Html(mean)
    return join([mean, tag("small", f" ± {statistic.sd:{form[1:]}}")], "")


def _verdict_tag(word: str) -> Html:
    kind = "yes" if word in _GOOD else "no" if word in _BAD else "unsure"
    return tag("span", word.removesuffix(" the spread"), class_=kind)
