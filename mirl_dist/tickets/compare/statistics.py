"""Groups tickets into lines of a comparison, one per method and round of an experiment, with statistics over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score
from mirl_dist.tickets.compare.entry import Entry
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


class GroupKey(NamedTuple):
    """The line of a ticket. label: the method, numbered if an earlier experiment in the comparison has the same one."""

    method: str
    label: str
    round_: int


class Group(NamedTuple):
    """One line of a comparison: a method's tickets of one round, over all seeds.

    method, round_: label and round from `group_keys`. alive: surviving weights of `total`, mean over seeds.
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
        return self.entries[0].dense

    @property
    def control(self) -> bool:
        return self.entries[0].control


def headline_protocol(ticket: Ticket) -> str:
    """Return the name of the protocol of `ticket.scores`; its full text for a ticket without protocol names."""
    return next((name for name, text in ticket.protocols.items() if text == ticket.protocol), ticket.protocol)


def scores_of(ticket: Ticket, protocol: str | None = None) -> Mapping[str, Score]:
    """Return 'task/set' -> Score under a protocol (None: the headline), plausible scores only; empty if not scored."""
    return {name: score for name, score in _stated_scores(ticket, protocol).items() if is_plausible(score)}


def psnr_of(s: Entry) -> dict[str, float]:
    """Return 'task/set' -> PSNR in dB under the headline protocol, plausible scores only."""
    return {name: score.psnr for name, score in scores_of(s.ticket).items()}


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


def group_keys(entries: Sequence[Entry]) -> list[GroupKey]:
    """Return the line of each ticket, in the order of `entries`.

    Seeds of one experiment share a line; dense tickets share one if their training settings are equal. A second
    experiment of a method is labelled 'MIR-L-G (2)'. A control is placed at the round of the ticket that it controls,
    and its method includes that ticket's label.
    """
    numbers: dict[str, dict[str, int]] = {}

    def key_of(s: Entry, method: str, round_: int) -> GroupKey:
        known = numbers.setdefault(method, {})
        number = known.setdefault(s.training if s.dense else s.experiment, len(known) + 1)
        return GroupKey(method, method if number == 1 else f"{method} ({number})", round_)

    keys = {at: key_of(s, s.method, s.ticket.round) for at, s in enumerate(entries) if not s.control}
    parents = {entries[at].ticket.digest(): key for at, key in keys.items()}
    for at, s in enumerate(entries):
        if s.control:
            parent = parents.get(s.ticket.parent or "")
            if parent is None:  # parent not compared here: distinguish by density instead
                keys[at] = key_of(s, f"{s.method} ({s.ticket.alive_total:,} alive)", s.ticket.round)
            else:
                keys[at] = key_of(s, f"{s.method} of {parent.label}", parent.round_)
    return [keys[at] for at in range(len(entries))]


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
    for s, key in zip(entries, group_keys(entries), strict=True):
        together.setdefault((key.label, key.round_), []).append(s)
    order = list(dict.fromkeys(method for method, _ in together))
    placed = sorted(together, key=lambda k: (not together[k][0].dense, order.index(k[0]), k[1]))
    dense = [s for s in entries if s.dense]
    return [_make_group(*key, together[key], dense, protocol) for key in placed]


def _make_group(
    method: str, round_: int, entries: Sequence[Entry], dense: Sequence[Entry], protocol: str | None
) -> Group:
    def of(what: str) -> Callable[[Entry], Mapping[str, float]]:
        return lambda s: {name: getattr(score, what) for name, score in scores_of(s.ticket, protocol).items()}

    return Group(
        method=method,
        round_=round_,
        alive=over_seeds(entries, lambda s: {"": s.ticket.alive_total})[""].mean,
        total=entries[0].ticket.total,
        sparsity=fmean(s.ticket.total_sparsity for s in entries),
        psnr=over_seeds(entries, of("psnr")),
        ssim=over_seeds(entries, of("ssim")),
        against_dense={} if entries[0].dense else subtract_dense(entries, dense, of("psnr")),
        entries=tuple(entries),
    )


def over_seeds(entries: Iterable[Entry], value: Callable[[Entry], Mapping[str, float]]) -> dict[str, Statistic]:
    """Return the statistic over seeds of each named value. Several tickets of one seed count once, by their mean."""
    values: dict[str, dict[int, list[float]]] = {}
    for s in entries:
        for name, number in value(s).items():
            values.setdefault(name, {}).setdefault(s.seed, []).append(number)
    return {name: Statistic.of(map(fmean, seeds.values())) for name, seeds in values.items()}


def subtract_dense(
    entries: Iterable[Entry], dense: Sequence[Entry], value: Callable[[Entry], Mapping[str, float]]
) -> dict[str, Statistic]:
    """Return `over_seeds` of value minus the dense ticket's (`find_dense`); values without a pair are left out."""
    return over_seeds(entries, lambda s: subtract_mean(value(s), [value(d) for d in find_dense(s, dense)]))


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
                "their scores are not comparable. Compare them separately, or score one again under the other's."
            )
        for name, text in ticket.protocols.items():
            other, first_text = protocols.setdefault(name, (s, text))
            if first_text != text:
                raise UserError(
                    f"found two meanings of the protocol {name}: {other.name} has '{first_text}', {s.name} has "
                    f"'{text}'. Compare them separately, or score one of them again."
                )
        for scores in (ticket.scores, *ticket.also.values()):
            for name, score in scores.items():
                other, count = images.setdefault(name, (s, score.images))
                if count != score.images:
                    raise UserError(
                        f"found {name} scored on {count} images in {other.name} and on {score.images} in {s.name}: "
                        "these are different evaluation sets. Compare them separately, or score one of them again."
                    )
