"""Turns a mix into sources: which shards are read for which tasks, and how often in an epoch; no file is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mirl_dist.config.tasks import Task
from mirl_dist.data.manifest import Shard
from mirl_dist.errors import UserError

Amounts = Mapping[str, float | Mapping[str, float]]
"""Task -> number, or task -> set -> number: repeats or weights."""


class Source(NamedTuple):
    """A walk over the samples of some shards, pass after pass.

    task_cycle: indices of the tasks that one sample is read for, one after the other, over as many passes.
    shards: positions among the training shards of the manifest; samples: in all of them; per_epoch: reads an epoch.
    """

    name: str
    task_cycle: tuple[int, ...]
    shards: tuple[int, ...]
    samples: int
    per_epoch: int


class MixEntry(NamedTuple):
    """One number of a mix: a task (by index), the shards it reads, and how often or with which weight."""

    task: int
    label: str
    shards: tuple[int, ...]
    amount: float


def tasks_of(mix: Amounts) -> tuple[Task, ...]:
    """The tasks of a mix as the config lists them: their positions are the task indices of batches and losses."""
    return tuple(Task.of(name) for name in mix)


def sources(mix: Amounts, mix_by: str, shards: Sequence[Shard], batch: int, steps: int | None) -> list[Source]:
    """List the sources of a mix, in an order that does not depend on how the config lists its tasks.

    shards: the training shards. mix_by: 'repeats': every sample so many times an epoch (as published); 'weights':
    shares of an epoch; 'balanced': weights that are all the same. steps: of `batch` samples, an epoch for the latter
    two; None: as many whole ones as reading every sample once for each of its tasks would fill.
    Raises UserError for tasks and sets without samples, and for weights too small to be read.
    """
    entries = _read_entries(mix, shards)
    if mix_by == "repeats":
        return _by_repeats(entries, shards, tasks_of(mix))
    samples = [_count_samples(e.shards, shards) for e in entries]
    total = batch * (steps or max(1, sum(samples) // batch))
    weights = [1.0 if mix_by == "balanced" else e.amount for e in entries]
    counts = apportion(total, weights)
    for entry, count in zip(entries, counts, strict=True):
        if count == 0:
            raise UserError(
                f"data.mix: {entry.label} gets none of the {total} samples of an epoch. Raise its weight, or "
                "data.steps_per_epoch.",
                everywhere=True,
            )
    return [Source(e.label, (e.task,), e.shards, m, n) for e, m, n in zip(entries, samples, counts, strict=True)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into whole parts as near to the weights as can be (largest remainders; ties to the first)."""
    exact = [total * w / math.fsum(weights) for w in weights]
    parts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _count_samples(numbers: Sequence[int], shards: Sequence[Shard]) -> int:
    return sum(shards[i].samples for i in numbers)


def _read_entries(mix: Amounts, shards: Sequence[Shard]) -> list[MixEntry]:
    """List the numbers of a mix by name, with their shards."""
    result: list[MixEntry] = []
    missing: list[str] = []
    tasks = tasks_of(mix)
    for index in sorted(range(len(tasks)), key=lambda i: tasks[i].name):
        task, amount = tasks[index], mix[tasks[index].name]
        of_kind = [i for i, s in enumerate(shards) if s.kind == task.kind]
        per_set = {"": amount} if isinstance(amount, int | float) else dict(sorted(amount.items()))
        for name, number in per_set.items():
            numbers = tuple(i for i in of_kind if name in ("", shards[i].set))
            label = task.name + (f"@{name}" if name else "")
            if numbers:
                result.append(MixEntry(index, label, numbers, number))
            else:
                missing.append(label)
    if missing:
        have = sorted({f"{s.set} ({s.kind})" for s in shards})
        raise UserError(
            f"data.mix: the shards hold no training samples for {', '.join(missing)}; they hold the sets "
            f"{', '.join(have) or 'none'}. Correct data.mix, or build shards that have them.",
            everywhere=True,
        )
    return result


def _by_repeats(entries: Sequence[MixEntry], shards: Sequence[Shard], tasks: Sequence[Task]) -> list[Source]:
    """Entries that read the same shards share one walk, so that these shards are fetched once for all of them."""
    entries_of: dict[tuple[int, ...], list[MixEntry]] = {}
    for entry in entries:
        entries_of.setdefault(entry.shards, []).append(entry)
    result = []
    for numbers, together in entries_of.items():
        cycle = tuple(e.task for e in together for _ in range(int(e.amount)))
        name = "+".join(e.label for e in together)
        samples = _count_samples(numbers, shards)
        result.append(Source(name, cycle, numbers, samples, samples * len(cycle)))
    return result
