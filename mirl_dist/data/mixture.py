"""Turns a mix into sources: which shards are read for which tasks, and how often per epoch. Reads no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mirl_dist.config.tasks import Task
from mirl_dist.data.manifest import Shard
from mirl_dist.errors import UserError

Amounts = Mapping[str, float | Mapping[str, float]]
"""Repeats or weights: task -> number, or task -> set -> number."""


class Source(NamedTuple):
    """A walk over the samples of some shards, in consecutive passes.

    task_cycle: indices of the tasks for which each sample is read, one task per pass. shards: positions among the
    training shards of the manifest. samples: total in these shards. per_epoch: samples read per epoch.
    """

    name: str
    task_cycle: tuple[int, ...]
    shards: tuple[int, ...]
    samples: int
    per_epoch: int


def tasks_of(mix: Amounts) -> tuple[Task, ...]:
    """Return the tasks of a mix in config order; their positions are the task indices of batches and losses."""
    return tuple(Task.of(name) for name in mix)


def sources(mix: Amounts, mix_by: str, shards: Sequence[Shard], batch: int, steps: int | None) -> list[Source]:
    """Return the sources of a mix, in an order independent of the order of tasks in the config.

    shards: the training shards. mix_by: 'repeats' reads every sample that many times per epoch (as published);
    'weights' gives each entry a share of an epoch; 'balanced' gives equal shares. steps: steps of `batch` samples per
    epoch for the latter two; None: as many whole steps as reading every sample once for each of its tasks fills.
    Raises UserError for tasks and sets without samples, and for weights so small that they get no samples.
    """
    entries = _read_entries(mix, shards)
    if mix_by == "repeats":
        return _by_repeats(entries)
    total = batch * (steps or max(1, sum(source.samples for source, _ in entries) // batch))
    counts = apportion(total, [1.0 if mix_by == "balanced" else amount for _, amount in entries])
    for (source, _), count in zip(entries, counts, strict=True):
        if count == 0:
            raise UserError(
                f"data.mix: {source.name} gets none of the {total} samples of an epoch. Raise its weight, or "
                "data.steps_per_epoch.",
                everywhere=True,
            )
    return [source._replace(per_epoch=count) for (source, _), count in zip(entries, counts, strict=True)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into integers proportional to the weights (largest remainder method; ties go to the first)."""
    exact = [total * w / math.fsum(weights) for w in weights]
    parts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _read_entries(mix: Amounts, shards: Sequence[Shard]) -> list[tuple[Source, float]]:
    """Return a source of one task, `per_epoch` still 0, for each number of a mix, sorted by task and set."""
    result: list[tuple[Source, float]] = []
    missing: list[str] = []
    tasks = tasks_of(mix)
    for index in sorted(range(len(tasks)), key=lambda i: tasks[i].name):
        task, amount = tasks[index], mix[tasks[index].name]
        of_kind = [i for i, s in enumerate(shards) if s.kind == task.kind]
        per_set = {"": amount} if isinstance(amount, int | float) else dict(sorted(amount.items()))
        for name, number in per_set.items():
            numbers = tuple(i for i in of_kind if name in ("", shards[i].set))
            label = task.name + (f"@{name}" if name else "")
            if not numbers:
                missing.append(label)
            result.append((Source(label, (index,), numbers, sum(shards[i].samples for i in numbers), 0), number))
    if missing:
        have = sorted({f"{s.set} ({s.kind})" for s in shards})
        raise UserError(
            f"data.mix: the shards hold no training samples for {', '.join(missing)}; they hold the sets "
            f"{', '.join(have) or 'none'}. Correct data.mix, or build shards that have them.",
            everywhere=True,
        )
    return result


def _by_repeats(entries: Sequence[tuple[Source, float]]) -> list[Source]:
    """Merge entries that read the same shards into one source, so that these shards are fetched only once."""
    entries_of: dict[tuple[int, ...], list[tuple[Source, float]]] = {}
    for source, repeats in entries:
        entries_of.setdefault(source.shards, []).append((source, repeats))
    result = []
    for numbers, together in entries_of.items():
        cycle = tuple(task for source, repeats in together for task in source.task_cycle * int(repeats))
        name, samples = "+".join(source.name for source, _ in together), together[0][0].samples
        result.append(Source(name, cycle, numbers, samples, samples * len(cycle)))
    return result
