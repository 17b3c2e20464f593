"""Statistics of a method and round: means and standard deviations over seeds, differences to the dense network."""

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

MAX_DB, _MAX_SSIM = 1000.0, 1.001
"""Limits of the absolute PSNR (dB) and SSIM; scores beyond them are not plausible measurements."""


class Statistic(NamedTuple):
    """Mean, sample standard deviation (None for a single value) and number of values, one value per seed."""

    mean: float
    sd: float | None
    count: int  # type: ignore[assignment]  # hides tuple.count

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistic:
        """Return the statistic of the values. Raise statistics.StatisticsError without any."""
        numbers = list(values)
        return cls(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None, len(numbers))


class Group(NamedTuple):
    """One line of a comparison: a method's tickets of one round, over all seeds.

    method, round_: label and round from `grouping.group_keys`. alive: surviving weights of `total`, mean over seeds.
    sparsity: over all parameters. psnr (dB), ssim: by 'task/set'. against_dense: paired difference of PSNR in dB,
    ticket minus dense network (`find_dense`), by 'task/set'; tasks without a pair are absent.
    Several tickets of one seed count as one value, their mean. Scores that are not plausible are left out; a caveat
    lists them.
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
    """Return the name of the protocol of `ticket.scores`; its full text for a ticket without protocol names."""
    return next((name for name, text in ticket.protocols.items() if text == ticket.protocol), ticket.protocol)


def scores_of(ticket: Ticket, protocol: str | None = None) -> Mapping[str, Score]:
    """Return 'task/set' -> Score under a protocol (None: the headline), plausible scores only; empty if not scored."""
    return {name: score for name, score in _stated_scores(ticket, protocol).items() if is_plausible(score)}


def _stated_scores(ticket: Ticket, protocol: str | None) -> Mapping[str, Score]:
    if protocol is None or protocol == headline_protocol(ticket):
        return ticket.scores
    return ticket.also.get(protocol, {})


def is_plausible(score: Score) -> bool:
    """Whether all values of a score are finite and within MAX_DB and _MAX_SSIM."""
    psnr, ssim = (score.psnr, score.degraded_psnr), (score.ssim, score.degraded_ssim)
    return all(abs(x) <= MAX_DB for x in psnr) and all(abs(x) <= _MAX_SSIM for x in ssim)


def task_names(entries: Iterable[Entry]) -> list[str]:
    """Return every 'task/set', in order of first appearance."""
    return list(dict.fromkeys(name for s in entries for name in s.ticket.scores))


def group_entries(entries: Sequence[Entry], protocol: str | None = None) -> list[Group]:
    """Return a line per label and round: dense first, methods in order of first appearance, rounds ascending.

    protocol: name of the scoring protocol; None for the headline. Raises UserError for tickets that are not comparable
    (`check_comparable`), and for a protocol under which no ticket was scored.
    """
    check_comparable(entries)
    if protocol is not None and not any(_stated_scores(s.ticket, protocol) for s in entries):
        known = dict.fromkeys(name for s in entries for name in (headline_protocol(s.ticket), *s.ticket.also))
        raise UserError(f"no ticket here was scored by {protocol}; there are {', '.join(known)}. Name one of these.")
    together: dict[tuple[str, int], list[Entry]] = {}
    for s, key in zip(entries, grouping.group_keys(entries), strict=True):
        together.setdefault((key.label, key.round_), []).append(s)
    order = list(dict.fromkeys(method for method, _ in together))
    placed = sorted(together, key=lambda k: (together[k][0].method != DENSE, order.index(k[0]), k[1]))
    dense = [s for s in entries if s.method == DENSE]
    return [_make_group(key, together[key], dense, protocol) for key in placed]


def _make_group(key: tuple[str, int], entries: Sequence[Entry], dense: Sequence[Entry], protocol: str | None) -> Group:
    def of(what: str) -> Callable[[Entry], Mapping[str, float]]:
        return lambda s: {name: getattr(score, what) for name, score in scores_of(s.ticket, protocol).items()}

    alive = Statistic.of(average_by_seed(entries, lambda s: {"": s.ticket.alive_total})[""].values()).mean
    total = entries[0].ticket.total
    against = {} if entries[0].method == DENSE else subtract_dense(entries, dense, of("psnr"))
    return Group(
        method=key[0],
        round_=key[1],
        alive=alive,
        total=total,
        sparsity=fmean(s.ticket.total_sparsity for s in entries),
        psnr=summarize(average_by_seed(entries, of("psnr"))),
        ssim=summarize(average_by_seed(entries, of("ssim"))),
        against_dense=summarize(against),
        entries=tuple(entries),
    )


def summarize(values: Mapping[str, Mapping[int, float]]) -> dict[str, Statistic]:
    """Convert name -> seed -> value to name -> Statistic over seeds."""
    return {name: Statistic.of(numbers.values()) for name, numbers in values.items() if numbers}


def average_by_seed(
    entries: Iterable[Entry], value: Callable[[Entry], Mapping[str, float]]
) -> dict[str, dict[int, float]]:
    """Return name -> seed -> mean over that seed's tickets, so that repeated runs do not count as further seeds."""
    by_task: dict[str, dict[int, list[float]]] = {}
    for s in entries:
        for name, number in value(s).items():
            by_task.setdefault(name, {}).setdefault(s.seed, []).append(number)
    return {name: {seed: fmean(numbers) for seed, numbers in seeds.items()} for name, seeds in by_task.items()}


def subtract_dense(
    entries: Iterable[Entry], dense: Sequence[Entry], value: Callable[[Entry], Mapping[str, float]]
) -> dict[str, dict[int, float]]:
    """Return name -> seed -> value minus the dense ticket's (`find_dense`); values without a pair are left out."""

    return average_by_seed(entries, lambda s: subtract_mean(value(s), [value(d) for d in find_dense(s, dense)]))


def subtract_mean(values: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return name -> value minus the mean of the others' values; names that no other has are left out."""
    known = {name: [o[name] for o in others if name in o] for name in values}
    return {name: number - fmean(known[name]) for name, number in values.items() if known[name]}


def find_dense(one: Entry, dense: Sequence[Entry]) -> list[Entry]:
    """Return the dense tickets of the same run, seed, data and network size.

    Without one, return those of other runs that also have the same training settings and number of steps.
    """
    fits = [d for d in dense if d.seed == one.seed and same_network_and_data(d, one)]
    alike = [d for d in fits if d.training == one.training and d.ticket.updates == one.ticket.updates]
    return [d for d in fits if d.run == one.run] or alike


def same_network_and_data(one: Entry, other: Entry) -> bool:
    """Whether two tickets have the same shards and numbers of total and prunable weights."""
    a, b = one.ticket, other.ticket
    return (a.manifest_digest, a.total, a.prunable) == (b.manifest_digest, b.total, b.prunable)


def check_comparable(entries: Sequence[Entry]) -> None:
    """Raise UserError naming two tickets that were scored under different protocols or on different image counts."""
    protocols: dict[str, tuple[Entry, str]] = {}
    images: dict[str, tuple[Entry, int]] = {}
    for s in entries:
        first, ticket = entries[0], s.ticket
        if ticket.protocol != first.ticket.protocol:
            raise UserError(
                f"found two protocols: {first.name} has '{first.ticket.protocol}', {s.name} has '{ticket.protocol}'; "
                "their scores are no comparison. Compare them apart, or score one of them again by the other's."
            )
        for name, text in ticket.protocols.items():
            other, first_text = protocols.setdefault(name, (s, text))
            if first_text != text:
                raise UserError(
                    f"found two meanings of the protocol {name}: {other.name} has '{first_text}', {s.name} has "
                    f"'{text}'. Compare them apart, or score one of them again."
                )
        for scores in (ticket.scores, *ticket.also.values()):
            for name, score in scores.items():
                other, count = images.setdefault(name, (s, score.images))
                if count != score.images:
                    raise UserError(
                        f"found {name} scored on {count} images in {other.name} and on {score.images} in {s.name}: "
                        "these are different evaluation sets. Compare them apart, or score one of them again."
                    )
