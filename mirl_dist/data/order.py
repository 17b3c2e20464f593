"""Which sample sits at which slot of which step: pure arithmetic on counts, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.data.degrade import generator
from mirl_dist.data.sample import Task
from mirl_dist.faults import Fault


class Position(NamedTuple):
    """The next optimiser step of a round: epoch, and step inside the epoch, both from 0."""

    epoch: int
    step: int


class Slot(NamedTuple):
    """One place in a global batch: task index, index among the samples of the task's kind, and which copy it is."""

    round_: int
    epoch: int
    task: int
    sample: int
    copy: int


class Shares(NamedTuple):
    """How a global batch is shared: samples per rank and step, forward passes per step, samples per pass."""

    per_rank: int
    accumulation: int
    forward: int


def share_batch(global_batch: int, forward: int | None, world: int) -> Shares:
    """The share of each rank. Raises Fault, with the numbers that work, when the batch cannot be shared evenly."""
    if global_batch % world:
        fits = [str(n) for n in range(1, global_batch + 1) if global_batch % n == 0]
        below, above = global_batch // world * world, (global_batch // world + 1) * world
        near = f"{below} or {above}" if below else f"{above}"
        raise Fault(
            f"batch.global: a global batch of {global_batch} cannot be shared by {world} ranks. "
            f"Use {', '.join(fits)} ranks, or set batch.global to a multiple of {world} such as {near} "
            "(another experiment: the fingerprint changes).",
            everywhere=True,
        )
    per_rank = global_batch // world
    size = min(forward or per_rank, per_rank)
    if per_rank % size:
        fits = [str(n) for n in range(1, per_rank + 1) if per_rank % n == 0]
        raise Fault(
            f"batch.forward: {size} samples per pass do not divide the {per_rank} samples that each of {world} "
            f"ranks takes per step. Use {', '.join(fits)}.",
            everywhere=True,
        )
    return Shares(per_rank, per_rank // size, size)


class Order:
    """The seeded order of a round's samples.

    An epoch holds every sample of every task as often as the mix says, in one permutation keyed by (seed, round,
    epoch); step t takes the slots [t G, (t + 1) G) of it; what does not fill a global batch is left out, as
    published. Rank r of W takes the r-th of W equal runs of a step's slots.
    """

    def __init__(
        self,
        mix: Mapping[str, int],
        samples: Mapping[str, int],
        global_batch: int,
        seed: int,
        steps_per_epoch: int | None = None,
    ) -> None:
        """mix: task -> copies per epoch; samples: kind -> count. Raises Fault for tasks without samples, for an
        epoch shorter than one global batch, and for more steps per epoch than the mix gives."""
        self.tasks = tuple(Task.of(name) for name in mix)
        self._global, self._seed = global_batch, seed
        lacking = [t.name for t in self.tasks if not samples.get(t.kind)]
        if lacking:
            has = ", ".join(f"{kind} ({n})" for kind, n in sorted(samples.items())) or "nothing"
            raise Fault(
                f"data.mix: the shards hold no training samples for {', '.join(lacking)}; they hold {has}. "
                "Remove those tasks from data.mix, or build shards that have them.",
                everywhere=True,
            )
        self._counts = [samples[t.kind] for t in self.tasks]
        # Laid out by name: in whichever order a config lists its tasks, the samples come in one order.
        self._laid = sorted(range(len(self.tasks)), key=lambda i: self.tasks[i].name)
        self._ends = np.cumsum([mix[self.tasks[i].name] * self._counts[i] for i in self._laid])
        self.length = int(self._ends[-1])
        whole = self.length // global_batch
        if whole == 0:
            raise Fault(
                f"an epoch has {self.length} samples, fewer than one global batch of {global_batch}. "
                "Lower batch.global, raise the counts in data.mix, or build more shards.",
                everywhere=True,
            )
        if steps_per_epoch is not None and steps_per_epoch > whole:
            raise Fault(
                f"data.steps_per_epoch: found {steps_per_epoch}, but the mix fills only {whole} steps of "
                f"{global_batch}. Lower it, or raise the counts in data.mix.",
                everywhere=True,
            )
        self.steps_per_epoch = steps_per_epoch or whole
        self._permuted: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def _epoch(self, round_: int, epoch: int) -> NDArray[np.int64]:
        if self._permuted is None or self._permuted[0] != (round_, epoch):
            rng = generator("order", self._seed, round_, epoch)
            self._permuted = ((round_, epoch), rng.permutation(self.length))
        return self._permuted[1]

    def slots(self, round_: int, at: Position) -> list[Slot]:
        """The global batch of one step, in slot order."""
        places = self._epoch(round_, at.epoch)[at.step * self._global : (at.step + 1) * self._global]
        found = []
        for place in places.tolist():
            at_name = int(np.searchsorted(self._ends, place, side="right"))
            inside = place - (int(self._ends[at_name - 1]) if at_name else 0)
            task = self._laid[at_name]
            copy, sample = divmod(inside, self._counts[task])
            found.append(Slot(round_, at.epoch, task, sample, copy))
        return found

    def passes(self, round_: int, start: Position, epochs: int, rank: int, shares: Shares) -> Iterator[list[Slot]]:
        """The slots of every forward pass of one rank from `start` to the end of the round."""
        for epoch in range(start.epoch, epochs):
            for step in range(start.step if epoch == start.epoch else 0, self.steps_per_epoch):
                mine = self.slots(round_, Position(epoch, step))[rank * shares.per_rank :][: shares.per_rank]
                for i in range(shares.accumulation):
                    yield mine[i * shares.forward : (i + 1) * shares.forward]
