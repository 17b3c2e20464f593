"""Picks the sample of every slot of every step, by arithmetic on the manifest, independent of the number of ranks.

A global batch of G samples has G lanes, one per slot. The slots of an epoch are ordered by lane, then by step. A seeded
permutation assigns each slot a source (the shards of some tasks). Within a source, consecutive slots follow a walk over
its shards: shards in a seeded order, the samples of each in a seeded order, in consecutive passes. So each lane reads
one shard of a source at a time, and a global batch reads at G positions of the walks, whichever ranks read the lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.config.seeding import rng
from mirl_dist.data.manifest import Shard
from mirl_dist.data.mixture import Amounts, Source, sources, tasks_of
from mirl_dist.errors import UserError

_EPOCHS_KEPT = 3  # the current epoch, the next one (prefetched), and a spare
_COLUMNS = [("pass_index", "i4"), ("task", "u1"), ("shard", "i4"), ("sample", "i4")]  # of a slot: 13 bytes


class Position(NamedTuple):
    """The next optimiser step of a round: epoch, and step within the epoch, both from 0."""

    epoch: int
    step: int


class Slot(NamedTuple):
    """One position in a global batch: which sample of which training shard is read for which task.

    pass_index: number of the pass over the sample's source in this round; it makes every read of a sample different.
    """

    round_: int
    pass_index: int
    task: int
    shard: int
    sample: int


class BatchSplit(NamedTuple):
    """The split of a global batch: samples per rank and step, forward passes per step, and samples per pass."""

    per_rank: int
    passes: int
    forward: int


def ranks_in_words(count: int) -> str:
    """Return '1 rank', '2 ranks', ..."""
    return f"{count} rank{'' if count == 1 else 's'}"


def split_batch(global_batch: int, forward: int | None, world: int) -> BatchSplit:
    """Split a global batch over ranks and passes. Raises UserError, with the valid numbers, for an uneven split."""
    if global_batch % world:
        below, above = global_batch // world * world, (global_batch // world + 1) * world
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"batch.global: a global batch of {global_batch} cannot be shared by {world} ranks. "
            f"Use {_divisors(global_batch)} ranks, or set batch.global to a multiple of {world} such as {near} "
            "(another experiment: the fingerprint changes).",
            everywhere=True,
        )
    per_rank = global_batch // world
    size = min(forward or per_rank, per_rank)
    if per_rank % size:
        raise UserError(
            f"batch.forward: {size} samples per pass do not divide the {per_rank} samples that each of {world} "
            f"ranks takes per step. Use {_divisors(per_rank)}.",
            everywhere=True,
        )
    return BatchSplit(per_rank, per_rank // size, size)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


class GlobalSampler:
    """The seeded sample order of a round.

    With `mix_by: repeats`, an epoch contains every sample of every task exactly as often as the mix specifies; samples
    that do not fill a global batch are dropped, as published. Otherwise the walk of each source continues from epoch to
    epoch, so that no sample is read again before all others were. Step t takes the t-th slot of every lane; rank r of W
    takes the r-th of W equal blocks of lanes. Accessing any position requires only the table of its epoch (three tables
    are cached: 39 bytes per slot of an epoch).
    """

    def __init__(
        self,
        mix: Amounts,
        shards: Sequence[Shard],
        global_batch: int,
        seed: int,
        *,
        mix_by: str = "repeats",
        steps_per_epoch: int | None = None,
    ) -> None:
        """mix: task -> number, or task -> set -> number. shards: the training shards of the manifest.

        Raises UserError for tasks without samples, for an epoch shorter than one global batch, and for a
        `steps_per_epoch` that the mix cannot fill.
        """
        self.tasks = tasks_of(mix)
        self.global_batch = global_batch
        self.sources = sources(mix, mix_by, shards, global_batch, steps_per_epoch)
        self.length = sum(source.per_epoch for source in self.sources)
        whole = self.length // global_batch
        if whole == 0:
            raise UserError(
                f"an epoch has {self.length} samples, fewer than one global batch of {global_batch}. "
                "Lower batch.global, raise the numbers in data.mix, or build more shards.",
                everywhere=True,
            )
        if steps_per_epoch is not None and steps_per_epoch > whole:
            raise UserError(
                f"data.steps_per_epoch: found {steps_per_epoch}, but the mix fills only {whole} steps of "
                f"{global_batch}. Lower it, or raise the numbers in data.mix.",
                everywhere=True,
            )
        self.steps_per_epoch = steps_per_epoch or whole
        self._shards, self._seed = tuple(shards), seed
        self._counts = np.array([shard.samples for shard in shards], dtype=np.int64)
        self._table = lru_cache(_EPOCHS_KEPT)(self._build_table)

    def shards(self) -> list[Shard]:
        """Return the training shards that the mix reads."""
        return [self._shards[i] for i in sorted({i for source in self.sources for i in source.shards})]

    def slots(self, round_: int, at: Position, first: int = 0, lanes: int | None = None) -> list[Slot]:
        """Return the slots of one step in lane order, for all lanes or for `lanes` lanes starting at `first`."""
        steps = self.steps_per_epoch
        stop = self.global_batch if lanes is None else first + lanes
        rows = self._table(round_, at.epoch)[first * steps + at.step : (stop - 1) * steps + at.step + 1 : steps]
        return [Slot(round_, *row) for row in rows.tolist()]

    def passes(self, round_: int, start: Position, epochs: int, rank: int, split: BatchSplit) -> Iterator[list[Slot]]:
        """Yield the slots of every forward pass of one rank, from `start` to the end of the round."""
        for at in self.positions(start, epochs):
            slots = self.slots(round_, at, rank * split.per_rank, split.per_rank)
            for i in range(split.passes):
                yield slots[i * split.forward : (i + 1) * split.forward]

    def positions(self, start: Position, epochs: int) -> Iterator[Position]:
        """Yield the position of every step from `start` to the end of the round."""
        for epoch in range(start.epoch, epochs):
            for step in range(start.step if epoch == start.epoch else 0, self.steps_per_epoch):
                yield Position(epoch, step)

    def _build_table(self, round_: int, epoch: int) -> NDArray[Any]:
        """Return the slots of an epoch, ordered by lane, then by step, with the fields _COLUMNS."""
        counts = [source.per_epoch for source in self.sources]
        labels = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        rng("order", self._seed, round_, epoch).shuffle(labels)
        labels = labels[: self.steps_per_epoch * self.global_batch]
        table = np.empty(len(labels), _COLUMNS)
        for number, source in enumerate(self.sources):
            rows = np.flatnonzero(labels == number)
            if len(rows):
                self._fill_source(table, rows, round_, source, epoch * source.per_epoch)
        return table

    def _fill_source(
        self, table: NDArray[Any], rows: NDArray[np.int64], round_: int, source: Source, begin: int
    ) -> None:
        """Fill the rows of one source from its walk, starting at read number `begin` of the round."""
        shards = np.array(source.shards)
        ends = np.cumsum(self._counts[shards])
        first, last = begin // source.samples, (begin + len(rows) - 1) // source.samples
        for pass_index in range(first, last + 1):
            start = pass_index * source.samples
            low, high = max(begin, start), min(begin + len(rows), start + source.samples)
            here = rows[low - begin : high - begin]
            samples = self._sample_order(round_, source, pass_index)[low - start : high - start]
            at = np.searchsorted(ends, samples, side="right")
            table["pass_index"][here] = pass_index
            table["shard"][here] = shards[at]
            table["sample"][here] = samples - (ends - self._counts[shards])[at]
            table["task"][here] = self._task_order(round_, source, pass_index)[samples]

    def _sample_order(self, round_: int, source: Source, pass_index: int) -> NDArray[np.int64]:
        """Return the sample order of one pass: shards permuted, then samples within each shard.

        Samples are numbered consecutively over the source's shards.
        """
        pass_rng = rng("pass", self._seed, round_, source.name, pass_index)
        counts = self._counts[list(source.shards)]
        begins = np.cumsum(counts) - counts
        parts = [begins[i] + pass_rng.permutation(int(counts[i])) for i in pass_rng.permutation(len(counts)).tolist()]
        return np.concatenate(parts)

    def _task_order(self, round_: int, source: Source, pass_index: int) -> NDArray[np.uint8]:
        """Return the task of each sample in a pass; in len(cycle) passes every sample is read once per cycle entry."""
        cycle = np.array(source.task_cycle, dtype=np.uint8)
        if len(cycle) == 1:
            return np.repeat(cycle, source.samples)
        block, number = divmod(pass_index, len(cycle))
        pass_rng = rng("deck", self._seed, round_, source.name, block)
        shuffled, shifts = pass_rng.permutation(cycle), pass_rng.integers(len(cycle), size=source.samples)
        return shuffled[(number + shifts) % len(cycle)]
