"""Tickets of one method and round taken together: means and spreads over seeds, differences to the dense network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score
from mirl_dist.tickets.compare import grouping
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.compare.grouping import CONTROL_PREFIX
from mirl_dist.training.ticket import Ticket

_FEW_IMAGES = 20
MAX_DB, _MAX_SSIM = 1000.0, 1.001
"""Beyond it, a PSNR is no number that was measured."""
_DEFAULT_VALUES = {"", "fp32", "no", "none", "false", "off", "whole image"}


class Statistic(NamedTuple):
    """Mean, sample standard deviation (None of one value) and number of values, one per seed."""

    mean: float
    sd: float | None
    count: int  # type: ignore[assignment]  # hides tuple.count

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistic:
        """Raises statistics.StatisticsError for no values."""
        told = list(values)
        return cls(fmean(told), stdev(told) if len(told) > 1 else None, len(told))


class Group(NamedTuple):
    """One line of a comparison: a method's tickets of one round, seeds together.

    method, round_: as `grouping.places` labels them. alive: mean over seeds of the weights that are not pruned, of
    `total`; sparsity: over all parameters. psnr in dB, ssim: by 'task/set'; against_dense: PSNR minus that of the
    dense network (`dense_of`), in dB, paired; without an entry where there is no such pair. Several tickets of one
    seed count as one value, their mean. Scores that are no numbers are left out, which a note says.
    """

    method: str
    round_: int
    alive: float
    total: int
    sparsity: float
    psnr: dict[str, Statistic]
    ssim: dict[str, Statistic]
    against_dense: dict[str, Statistic]
    entries: tuple[Entry, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({s.seed for s in self.entries}))

    @property
    def dense(self) -> bool:
        return self.entries[0].method == DENSE

    @property
    def control(self) -> bool:
        return self.entries[0].method.startswith(CONTROL_PREFIX)


def headline_protocol(ticket: Ticket) -> str:
    """The name of the protocol of `ticket.scores`; its whole text for a ticket that knows no names."""
    return next((name for name, text in ticket.protocols.items() if text == ticket.protocol), ticket.protocol)


def scores_of(ticket: Ticket, protocol: str | None = None) -> Mapping[str, Score]:
    """'task/set' -> Score by a protocol, None for the headline; empty where it was not scored so. Without what is no
    number or out of every range."""
    return {name: score for name, score in _stated_scores(ticket, protocol).items() if _is_plausible(score)}


def _stated_scores(ticket: Ticket, protocol: str | None) -> Mapping[str, Score]:
    if protocol is None or protocol == headline_protocol(ticket):
        return ticket.scores
    return ticket.also.get(protocol, {})


def _is_plausible(score: Score) -> bool:
    psnr, ssim = (score.psnr, score.degraded_psnr), (score.ssim, score.degraded_ssim)
    return all(abs(x) <= MAX_DB for x in psnr) and all(abs(x) <= _MAX_SSIM for x in ssim)


def task_names(shown: Iterable[Entry]) -> list[str]:
    """Every 'task/set', in the order of first appearance."""
    return list(dict.fromkeys(name for s in shown for name in s.ticket.scores))


def group_entries(shown: Sequence[Entry], protocol: str | None = None) -> list[Group]:
    """A line per label and round: dense first, methods in the order of first appearance, rounds ascending.

    protocol: another than the headline. Raises UserError for tickets that cannot stand in one table (refuse_mixed), and
    for a protocol by which none was scored.
    """
    check_comparable(shown)
    if protocol is not None and not any(_stated_scores(s.ticket, protocol) for s in shown):
        known = dict.fromkeys(name for s in shown for name in (headline_protocol(s.ticket), *s.ticket.also))
        raise UserError(f"no ticket here was scored by {protocol}; there are {', '.join(known)}. Name one of these.")
    together: dict[tuple[str, int], list[Entry]] = {}
    for s, place in zip(shown, grouping.group_keys(shown), strict=True):
        together.setdefault((place.label, place.round_), []).append(s)
    order = list(dict.fromkeys(method for method, _ in together))
    placed = sorted(together, key=lambda k: (together[k][0].method != DENSE, order.index(k[0]), k[1]))
    dense = [s for s in shown if s.method == DENSE]
    return [_make_group(key, together[key], dense, protocol) for key in placed]


def _make_group(key: tuple[str, int], mine: Sequence[Entry], dense: Sequence[Entry], protocol: str | None) -> Group:
    def of(what: str) -> Callable[[Entry], Mapping[str, float]]:
        return lambda s: {name: getattr(score, what) for name, score in scores_of(s.ticket, protocol).items()}

    alive = Statistic.of(average_by_seed(mine, lambda s: {"": s.ticket.alive_total})[""].values()).mean
    total = mine[0].ticket.total
    against = {} if mine[0].method == DENSE else subtract_dense(mine, dense, of("psnr"))
    return Group(
        method=key[0],
        round_=key[1],
        alive=alive,
        total=total,
        sparsity=fmean(s.ticket.total_sparsity for s in mine),
        psnr=summarize(average_by_seed(mine, of("psnr"))),
        ssim=summarize(average_by_seed(mine, of("ssim"))),
        against_dense=summarize(against),
        entries=tuple(mine),
    )


def summarize(values: Mapping[str, Mapping[int, float]]) -> dict[str, Statistic]:
    """Name -> Spread, of name -> seed -> value."""
    return {name: Statistic.of(found.values()) for name, found in values.items() if found}


def average_by_seed(mine: Iterable[Entry], value: Callable[[Entry], Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Name -> seed -> value: the mean of a seed's tickets, so that a run seen twice is no second seed."""
    found: dict[str, dict[int, list[float]]] = {}
    for s in mine:
        for name, number in value(s).items():
            found.setdefault(name, {}).setdefault(s.seed, []).append(number)
    return {name: {seed: fmean(told) for seed, told in seeds.items()} for name, seeds in found.items()}


def subtract_dense(
    mine: Iterable[Entry], dense: Sequence[Entry], value: Callable[[Entry], Mapping[str, float]]
) -> dict[str, dict[int, float]]:
    """Name -> seed -> value minus that of the dense ticket (`dense_of`); what has no pair is left out."""

    def difference(s: Entry) -> dict[str, float]:
        theirs = [value(d) for d in find_dense(s, dense)]
        known = {name: [t[name] for t in theirs if name in t] for name in value(s)}
        return {name: number - fmean(known[name]) for name, number in value(s).items() if known[name]}

    return average_by_seed(mine, difference)


def find_dense(one: Entry, dense: Sequence[Entry]) -> list[Entry]:
    """The dense tickets of the same run, seed, data and network; without one, those of other runs that also trained
    alike, for as many steps."""
    fits = [d for d in dense if d.seed == one.seed and same_network_and_data(d, one)]
    alike = [d for d in fits if d.training == one.training and d.ticket.updates == one.ticket.updates]
    return [d for d in fits if d.run == one.run] or alike


def same_network_and_data(one: Entry, other: Entry) -> bool:
    """Whether two tickets are of one network's size and saw the same data."""
    a, b = one.ticket, other.ticket
    return (a.manifest_digest, a.total, a.prunable) == (b.manifest_digest, b.total, b.prunable)


def check_comparable(shown: Sequence[Entry]) -> None:
    """Raise UserError, naming both, for tickets whose scores were measured differently: by other protocols or images."""
    protocols: dict[str, tuple[Entry, str]] = {}
    images: dict[str, tuple[Entry, int]] = {}
    for s in shown:
        first, ticket = shown[0], s.ticket
        if ticket.protocol != first.ticket.protocol:
            raise UserError(
                f"found two protocols: {first.name} has '{first.ticket.protocol}', {s.name} has '{ticket.protocol}'; "
                "their scores are no comparison. Compare them apart, or score one of them again by the other's."
            )
        for name, text in ticket.protocols.items():
            other, said = protocols.setdefault(name, (s, text))
            if said != text:
                raise UserError(
                    f"found two meanings of the protocol {name}: {other.name} has '{said}', {s.name} has '{text}'. "
                    "Compare them apart, or score one of them again."
                )
        for scores in (ticket.scores, *ticket.also.values()):
            for name, score in scores.items():
                other, count = images.setdefault(name, (s, score.images))
                if count != score.images:
                    raise UserError(
                        f"found {name} scored on {count} images in {other.name} and on {score.images} in {s.name}: "
                        "these are different evaluation sets. Compare them apart, or score one of them again."
                    )


def notes(shown: Sequence[Entry]) -> list[str]:
    """What a reader of a table must know beside its numbers, a sentence each. Raises UserError as `lines`."""
    table = group_entries(shown)
    lines_ = [*grouping.describe_other_experiments(shown), *_note_seeds(table), *_note_missing_pairs(table, shown), *_note_differences(table, shown)]
    return [*lines_, *_note_implausible_scores(shown), *_note_evaluation(shown), *_note_training(shown)]


def _note_seeds(table: Sequence[Group]) -> list[str]:
    words = {1: "one seed only ({}): no spread is known", 2: "two seeds only ({}): the spread itself is uncertain"}
    found = []
    for count, text in words.items():
        which = dict.fromkeys(line.method for line in table if len(line.seeds) == count)
        found += [text.format(", ".join(which))] if which else []
    twice = []
    for line in table:
        for seed in line.seeds:
            weights = [s.ticket.weights_digest for s in line.entries if s.seed == seed]
            if len(set(weights)) > 1:
                twice.append(f"{line.method}, round {line.round_}, seed {seed} ({len(weights)} tickets)")
    return found + ([f"different tickets of one seed count once, by their mean: {'; '.join(twice)}"] if twice else [])


def _note_missing_pairs(table: Sequence[Group], shown: Sequence[Entry]) -> list[str]:
    dense = [s for s in shown if s.method == DENSE]
    lone = [s.name for line in table if not line.dense for s in line.entries if not find_dense(s, dense)]
    if not lone:
        return []
    return [f"no dense ticket of the same seed, training, data and network, so no difference to it: {_join_first(lone)}"]


_Counter = Callable[[Ticket], int]


def _note_differences(table: Sequence[Group], shown: Sequence[Entry]) -> list[str]:
    found = []
    for what, said in (
        ("shards", {s.ticket.manifest_digest[:8]: s.run for s in reversed(shown)}),
        ("networks", {f"{s.ticket.total:,} weights, {s.ticket.prunable:,} prunable": s.run for s in reversed(shown)}),
    ):
        if len(said) > 1:
            found.append(f"different {what}: {'; '.join(f'{k} ({run})' for k, run in reversed(said.items()))}")
    counted: dict[str, _Counter] = {"steps": lambda t: t.updates, "alive weights": lambda t: t.alive}
    for what, count in counted.items():
        odd = [f"{x.method}, round {x.round_}" for x in table if len({count(s.ticket) for s in x.entries}) > 1]
        if odd:
            found.append(f"different numbers of {what} within a line, though its configs are equal: {'; '.join(odd)}")
    return found


def _note_implausible_scores(shown: Sequence[Entry]) -> list[str]:
    found = []
    for s in shown:
        for scores in (s.ticket.scores, *s.ticket.also.values()):
            found += [f"{s.name}, {name}" for name, score in scores.items() if not _is_plausible(score)]
    text = "scores that are no numbers, or out of range, count as unknown and are in no mean"
    return [f"{text}: {_join_first(dict.fromkeys(found))}"] if found else []


def _note_evaluation(shown: Sequence[Entry]) -> list[str]:
    ways: dict[str, list[str]] = {}
    for s in shown:
        unusual = [f"{key} {value}" for key, value in s.ticket.measured.items() if value.lower() not in _DEFAULT_VALUES]
        ways.setdefault(", ".join(unusual), []).append(s.run)
    found = [f"scored with {way}: {_join_first(dict.fromkeys(runs))}" for way, runs in ways.items() if way]
    few = {n: score.images for s in shown for n, score in s.ticket.scores.items() if score.images < _FEW_IMAGES}
    if few:
        found.append(f"few images: {', '.join(f'{name} {count}' for name, count in few.items())}")
    return found


def _note_training(shown: Sequence[Entry]) -> list[str]:
    found = []
    counted: dict[str, _Counter] = {
        "damaged samples were replaced in training": lambda t: t.skipped,
        "batches were left out of training (loss or gradient not finite)": lambda t: t.bad,
        "tensors have no alive weight": lambda t: len(t.collapsed),
    }
    for text, count in counted.items():
        hit = [f"{s.name}: {count(s.ticket):,}" for s in shown if count(s.ticket)]
        if hit:
            found.append(f"{text} ({_join_first(hit)})")
    return found


def _join_first(words: Iterable[str]) -> str:
    """The first five, and how many more."""
    told = list(words)
    return "; ".join(told[:5]) + (f" and {len(told) - 5} more" if len(told) > 5 else "")
