"""Groups tickets into lines of a comparison: one line per method and round of an experiment, over all its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mirl_dist.tickets.compare.entry import DENSE, Entry

CONTROL_PREFIX = "control "
"""Prefix of a control's method."""


class GroupKey(NamedTuple):
    """The line of a ticket. label: the method, numbered if an earlier experiment in the comparison has the same one."""

    method: str
    label: str
    round_: int


def group_keys(entries: Sequence[Entry]) -> list[GroupKey]:
    """Return the line of each ticket, in the order of `entries`.

    Seeds of one experiment share a line; dense tickets share one if their training settings are equal. A second
    experiment of a method is labelled 'MIR-L-G (2)'. A control is placed at the round of the ticket that it controls,
    and its method includes that ticket's label.
    """
    numbers: dict[str, list[str]] = {}
    keys: dict[int, GroupKey] = {}

    def assign(at: int, method: str, round_: int) -> None:
        kind = entries[at].training if entries[at].method == DENSE else entries[at].experiment
        known = numbers.setdefault(method, [])
        if kind not in known:
            known.append(kind)
        number = known.index(kind) + 1
        keys[at] = GroupKey(method, method if number == 1 else f"{method} ({number})", round_)

    controls = [at for at, s in enumerate(entries) if s.method.startswith(CONTROL_PREFIX)]
    for at in sorted(set(range(len(entries))) - set(controls)):
        assign(at, entries[at].method, entries[at].ticket.round)
    parents = {entries[at].ticket.digest(): key for at, key in keys.items()} if controls else {}
    for at in controls:
        s = entries[at]
        parent = parents.get(s.ticket.parent or "")
        if parent is None:  # parent not compared here: distinguish by density instead
            assign(at, f"{s.method} ({s.ticket.alive_total:,} alive)", s.ticket.round)
        else:
            assign(at, f"{s.method} of {parent.label}", parent.round_)
    return [keys[at] for at in range(len(entries))]


def describe_other_experiments(entries: Sequence[Entry]) -> list[str]:
    """Return a sentence for each numbered label: its runs, and that they are a different experiment."""
    runs: dict[tuple[str, str], dict[str, None]] = {}
    for s, key in zip(entries, group_keys(entries), strict=True):
        if key.label != key.method:
            runs.setdefault((key.label, key.method), {})[s.run] = None
    return [
        f"{label} is another experiment than {method}: the configs differ, so these runs are no seeds of it: "
        + "; ".join(names)
        for (label, method), names in runs.items()
    ]
