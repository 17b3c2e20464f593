"""Which tickets stand on one line of a comparison: a method's round, its seeds together, and nothing else with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mirl_dist.tickets.compare.entry import DENSE, Entry

CONTROL_PREFIX = "control "
"""How the method of a control begins."""


class GroupKey(NamedTuple):
    """Where a ticket stands. word: its method's; label: the same, numbered where another experiment has it already."""

    method: str
    label: str
    round_: int


def group_keys(shown: Sequence[Entry]) -> list[GroupKey]:
    """The line of each ticket.

    Seeds of one experiment share a line, dense tickets those of one training; the next experiment of a method is
    'MIR-L-G (2)'. A control stands at the round of the ticket that it controls, and its word names that ticket's label.
    """
    numbers: dict[str, list[str]] = {}
    found: dict[int, GroupKey] = {}

    def put(at: int, word: str, round_: int) -> None:
        kind = shown[at].training if shown[at].method == DENSE else shown[at].experiment
        seen = numbers.setdefault(word, [])
        if kind not in seen:
            seen.append(kind)
        number = seen.index(kind) + 1
        found[at] = GroupKey(word, word if number == 1 else f"{word} ({number})", round_)

    controls = [at for at, s in enumerate(shown) if s.method.startswith(CONTROL_PREFIX)]
    for at in sorted(set(range(len(shown))) - set(controls)):
        put(at, shown[at].method, shown[at].ticket.round)
    parents = {shown[at].ticket.digest(): place for at, place in found.items()} if controls else {}
    for at in controls:
        s = shown[at]
        parent = parents.get(s.ticket.parent or "")
        if parent is None:  # the density tells which tickets it may control
            put(at, f"{s.method} ({s.ticket.alive_total:,} alive)", s.ticket.round)
        else:
            put(at, f"{s.method} of {parent.label}", parent.round_)
    return [found[at] for at in range(len(shown))]


def describe_other_experiments(shown: Sequence[Entry]) -> list[str]:
    """A sentence for each label that had to be numbered: its runs, and what they are not."""
    runs: dict[tuple[str, str], dict[str, None]] = {}
    for s, place in zip(shown, group_keys(shown), strict=True):
        if place.label != place.method:
            runs.setdefault((place.label, place.method), {})[s.run] = None
    return [
        f"{label} is another experiment than {word}: the configs differ, so these runs are no seeds of it: "
        + "; ".join(held)
        for (label, word), held in runs.items()
    ]
