"""The slots of an epoch as one table, built from seeded permutations and one walk over the shards of each source."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.config.seeding import rng
from mirl_dist.data.manifest import Shard
from mirl_dist.data.mixture import Source

_EPOCHS_KEPT = 3  # the current epoch, the next one (prefetched), and a spare


class EpochTable(NamedTuple):
    """Task, training shard, sample in that shard and pass index of every slot of an epoch; 13 bytes per slot.

    Slots are ordered by lane, then by step.
    """

    task: NDArray[np.uint8]
    shard: NDArray[np.int32]
    sample: NDArray[np.int32]
    pass_index: NDArray[np.int32]


class EpochTables:
    """Builds epoch tables on demand and caches the last three. Thread-safe."""

    def __init__(self, sources: Sequence[Source], shards: Sequence[Shard], seed: int, slots: int) -> None:
        """shards: the training shards of the manifest. slots: per epoch, steps times global batch."""
        self._sources, self._seed, self._slots = sources, seed, slots
        self._counts = np.array([shard.samples for shard in shards], dtype=np.int64)
        self._tables: OrderedDict[tuple[int, int], EpochTable] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, round_: int, epoch: int) -> EpochTable:
        """Return the table of one epoch of a round."""
        with self._lock:
            table = self._tables.get((round_, epoch))
            if table is None:
                table = self._build(round_, epoch)
                self._tables[round_, epoch] = table
                while len(self._tables) > _EPOCHS_KEPT:
                    self._tables.popitem(last=False)
            return table

    def _build(self, round_: int, epoch: int) -> EpochTable:
        counts = [source.per_epoch for source in self._sources]
        labels = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        rng("order", self._seed, round_, epoch).shuffle(labels)
        labels = labels[: self._slots]
        table = EpochTable(
            np.empty(len(labels), np.uint8),
            *(np.empty(len(labels), np.int32) for _ in range(3)),
        )
        for number, source in enumerate(self._sources):
            rows = np.flatnonzero(labels == number)
            if len(rows):
                self._fill_source(table, rows, round_, source, epoch * source.per_epoch)
        return table

    def _fill_source(self, table: EpochTable, rows: NDArray[np.int64], round_: int, source: Source, begin: int) -> None:
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
            table.pass_index[here] = pass_index
            table.shard[here] = shards[at]
            table.sample[here] = samples - (ends - self._counts[shards])[at]
            table.task[here] = self._task_order(round_, source, pass_index)[samples]

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
        tasks: NDArray[np.uint8] = shuffled[(number + shifts) % len(cycle)]
        return tasks
