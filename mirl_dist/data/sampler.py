"""Which sample sits at which slot of which step: pure arithmetic on the manifest, the same for any number of ranks.

A global batch of G has G lanes, one per slot. An epoch's slots are laid out lane after lane; a seeded permutation
says which source (the shards of some tasks) each slot reads; within a source the slots follow one another along a walk
over its shards: shards in a seeded order, the samples of each in a seeded order, pass after pass. So a lane uses one
shard of a source after the other, and a global batch draws from G places of the walk at once, whoever reads the lanes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.config.seeding import generator
from mirl_dist.data.manifest import Shard
from mirl_dist.data.mixture import Amounts, Source, sources, tasks_of
from mirl_dist.errors import UserError

_EPOCHS_KEPT = 3  # the one being read, the next one being looked ahead into, and one to spare


class Position(NamedTuple):
    """The next optimiser step of a round: epoch, and step inside the epoch, both from 0."""

    epoch: int
    step: int


class Slot(NamedTuple):
    """One place in a global batch: which sample of which training shard is read for which task.

    visit: number of the pass over the sample's source in this round, so that no two reads of a sample are alike.
    """

    round_: int
    pass_index: int
    task: int
    shard: int
    sample: int


class BatchSplit(NamedTuple):
    """How a global batch is shared: samples per rank and step, forward passes per step, samples per pass."""

    per_rank: int
    passes: int
    forward: int


def ranks_in_words(count: int) -> str:
    """'1 rank', '2 ranks'."""
    return f"{count} rank{'' if count == 1 else 's'}"


def split_batch(global_batch: int, forward: int | None, world: int) -> BatchSplit:
    """The share of each rank. Raises UserError, with the numbers that work, when the batch cannot be shared evenly."""
    if global_batch % world:
        fits = [str(n) for n in range(1, global_batch + 1) if global_batch % n == 0]
        below, above = global_batch // world * world, (global_batch // world + 1) * world
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"batch.global: a global batch of {global_batch} cannot be shared by {world} ranks. "
            f"Use {', '.join(fits)} ranks, or set batch.global to a multiple of {world} such as {near} "
            "(another experiment: the fingerprint changes).",
            everywhere=True,
        )
    per_rank = global_batch // world
    size = min(forward or per_rank, per_rank)
    if per_rank % size:
        fits = [str(n) for n in range(1, per_rank + 1) if per_rank % n == 0]
        raise UserError(
            f"batch.forward: {size} samples per pass do not divide the {per_rank} samples that each of {world} "
            f"ranks takes per step. Use {', '.join(fits)}.",
            everywhere=True,
        )
    return BatchSplit(per_rank, per_rank // size, size)


class _EpochTable(NamedTuple):
    """One epoch: for every slot, lane after lane, task, training shard, sample in it, visit. 13 bytes a slot."""

    task: NDArray[np.uint8]
    shard: NDArray[np.int32]
    sample: NDArray[np.int32]
    pass_index: NDArray[np.int32]


class GlobalSampler:
    """The seeded order of a round's samples.

    Under `mix_by: repeats` an epoch holds every sample of every task exactly as often as the mix says; what does not
    fill a global batch is left out, as published. Otherwise the sources' walks go on from epoch to epoch, so that no
    sample is read again before all others were. Step t takes the t-th slot of every lane; rank r of W takes the r-th of
    W equal runs of lanes. Any position costs one table of its epoch, wherever it lies (tables are kept for
    three epochs: 39 bytes for every slot of an epoch).
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
        """mix: task -> number, or task -> set -> number; shards: the training shards of the manifest.

        Raises UserError for tasks without samples, for an epoch shorter than one global batch, and for more steps per
        epoch than the repeats give.
        """
        self.tasks = tasks_of(mix)
        self._seed, self.global_batch = seed, global_batch
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
        self._shards = tuple(shards)
        self._counts = np.array([shard.samples for shard in shards], dtype=np.int64)
        self._tables: OrderedDict[tuple[int, int], _EpochTable] = OrderedDict()
        self._building = threading.Lock()

    def shards(self) -> list[Shard]:
        """The training shards that the mix reads."""
        return [self._shards[i] for i in sorted({i for source in self.sources for i in source.shards})]

    def slots(self, round_: int, at: Position, first: int = 0, lanes: int | None = None) -> list[Slot]:
        """The slots of one step, in lane order: of all lanes, or of `lanes` of them from `first` on."""
        table = self._table(round_, at.epoch)
        steps = self.steps_per_epoch
        stop = self.global_batch if lanes is None else first + lanes
        rows = slice(first * steps + at.step, (stop - 1) * steps + at.step + 1, steps)
        columns = (table.pass_index[rows], table.task[rows], table.shard[rows], table.sample[rows])
        return [Slot(round_, *row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def passes(self, round_: int, start: Position, epochs: int, rank: int, shares: BatchSplit) -> Iterator[list[Slot]]:
        """The slots of every forward pass of one rank from `start` to the end of the round."""
        for at in self.positions(start, epochs):
            mine = self.slots(round_, at, rank * shares.per_rank, shares.per_rank)
            for i in range(shares.passes):
                yield mine[i * shares.forward : (i + 1) * shares.forward]

    def positions(self, start: Position, epochs: int) -> Iterator[Position]:
        """Every step from `start` to the end of the round."""
        for epoch in range(start.epoch, epochs):
            for step in range(start.step if epoch == start.epoch else 0, self.steps_per_epoch):
                yield Position(epoch, step)

    def _table(self, round_: int, epoch: int) -> _EpochTable:
        """The slots of one epoch: made once, whoever asks first."""
        with self._building:
            found = self._tables.get((round_, epoch))
            if found is None:
                found = self._build_table(round_, epoch)
                self._tables[round_, epoch] = found
                while len(self._tables) > _EPOCHS_KEPT:
                    self._tables.popitem(last=False)
            return found

    def _build_table(self, round_: int, epoch: int) -> _EpochTable:
        counts = [source.per_epoch for source in self.sources]
        labels = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        generator("order", self._seed, round_, epoch).shuffle(labels)
        labels = labels[: self.global_batch * self.steps_per_epoch]
        table = _EpochTable(
            np.empty(len(labels), np.uint8),
            *(np.empty(len(labels), np.int32) for _ in range(3)),
        )
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(labels == number)
            if len(places):
                self._walk(table, places, round_, source, epoch * source.per_epoch)
        return table

    def _walk(self, table: _EpochTable, places: NDArray[np.int64], round_: int, source: Source, begin: int) -> None:
        """Fill the places of one source: its walk from item `begin` of the round on."""
        held = np.array(source.shards)
        ends = np.cumsum(self._counts[held])
        first, last = begin // source.samples, (begin + len(places) - 1) // source.samples
        for visit in range(first, last + 1):
            low = max(begin, visit * source.samples)
            high = min(begin + len(places), (visit + 1) * source.samples)
            here = places[low - begin : high - begin]
            one_pass = self._pass(round_, source, visit)[low - visit * source.samples : high - visit * source.samples]
            at = np.searchsorted(ends, one_pass, side="right")
            table.pass_index[here] = visit
            table.shard[here] = held[at]
            table.sample[here] = one_pass - (ends - self._counts[held])[at]
            table.task[here] = self._pass_order(round_, source, visit)[one_pass]

    def _pass(self, round_: int, source: Source, visit: int) -> NDArray[np.int64]:
        """All samples of a source (numbered along its shards) in the order of one pass: shard after shard."""
        order = generator("pass", self._seed, round_, source.name, visit)
        counts = self._counts[list(source.shards)]
        begins = np.cumsum(counts) - counts
        parts = [begins[i] + order.permutation(int(counts[i])) for i in order.permutation(len(counts)).tolist()]
        return np.concatenate(parts)

    def _pass_order(self, round_: int, source: Source, visit: int) -> NDArray[np.uint8]:
        """For which task each sample is read in a pass: over as many passes as the deck has cards, each card once."""
        deck = np.array(source.task_cycle, dtype=np.uint8)
        if len(deck) == 1:
            return np.repeat(deck, source.samples)
        block, number = divmod(visit, len(deck))
        draw = generator("deck", self._seed, round_, source.name, block)
        shuffled, shifts = draw.permutation(deck), draw.integers(len(deck), size=source.samples)
        dealt: NDArray[np.uint8] = shuffled[(number + shifts) % len(deck)]
        return dealt
