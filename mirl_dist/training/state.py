"""Holds the state that a restart needs: weights, optimiser moments, masks, and the position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mirl_dist.distributed.engines.base import Engine
from mirl_dist.distributed.engines.sharding import ShardLayout, gather_full
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks
from mirl_dist.pruning.partition import Counts, count_weights
from mirl_dist.training.ticket import Curve


class Progress(BaseModel):
    """The position of a run. epoch, step: the next optimiser step of the round; updates: optimiser steps done in it.

    bad: global batches of this round that were skipped for a non-finite loss or gradient; unreported: losses and
    samples per task since the last report, summed over ranks; samples: read by all ranks in all rounds; skipped: reads
    of this round in which a damaged sample was replaced by another; damaged: damage found in this round, 'shard' or
    'shard key' -> problem; seconds: spent training in all rounds; threshold: of the round's mask; parent: digest of the
    ticket that the mask was made from (None in a dense round 0). began: the optimiser step at which the round began;
    curve: validation scores during it; rewind_digest: of the weights of the rewind step, '' without one.
    """

    model_config = ConfigDict(extra="forbid")

    round: int = 0
    epoch: int = 0
    step: int = 0
    updates: int = 0
    bad: int = 0
    unreported: list[list[float]] = []
    samples: int = 0
    skipped: int = 0
    damaged: dict[str, str] = {}
    seconds: float = 0.0
    threshold: float = 0.0
    parent: str | None = None
    mask_digest: str = ""
    began: int = 0
    curve: Curve = Curve()
    rewind_digest: str = ""

    def ahead(self, steps: int, steps_per_epoch: int) -> Progress:
        """Return the position after so many more optimiser steps; itself for 0."""
        if not steps:
            return self
        updates = self.updates + steps
        epoch, step = divmod(updates, steps_per_epoch)
        return self.model_copy(update={"updates": updates, "epoch": epoch, "step": step})


class Snapshot(NamedTuple):
    """A copy of the state on the CPU, full tensors, which training does not change."""

    progress: Progress
    masks: Masks
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def _single_rank(values: Tensor, *, what: str = "") -> Tensor:
    """Return the values with a leading axis of one rank: the all-gather of a single rank."""
    return values.unsqueeze(0)


@dataclass
class TrainState:
    """The live state of one rank: its engine's weights, the masks of the weights that it holds, and the position.

    parent: the digest of the ticket that the run starts from, if any; gather: all-gathers a tensor to (ranks, *shape),
    called only with sharded weights, and then by all ranks. counts: of the masks, over all ranks.
    """

    engine: Engine
    masks: Masks
    parent: str | None = None
    gather: Callable[..., Tensor] = _single_rank
    progress: Progress = field(default_factory=Progress)
    counts: Counts = field(init=False)
    _copies: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin_round(0, self.masks, threshold=0.0, parent=self.parent)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The live weights that this rank holds: full tensors, or its shards."""
        return self.engine.weights

    def begin_round(
        self,
        round_: int,
        masks: Masks,
        *,
        threshold: float,
        parent: str | None,
        began: int = 0,
        steps_per_epoch: int = 1,
    ) -> None:
        """Set masks, a fresh optimiser and the position of optimiser step `began` of a round. Weights stay as they are.

        A collective with sharded weights.
        """
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in masks.items()}
        self.counts = count_weights(self.masks, self.engine.partition, self.gather)
        self.engine.set_masks(self.masks)
        self.engine.reset_optimizer()
        self.progress = Progress(
            round=round_,
            epoch=began // steps_per_epoch,
            step=began % steps_per_epoch,
            updates=began,
            began=began,
            rewind_digest=self.progress.rewind_digest,
            samples=self.progress.samples,
            seconds=self.progress.seconds,
            threshold=threshold,
            parent=parent,
            mask_digest=masking.digest_of_masks(self.gather_full(self.masks)),
        )

    def total(self) -> int:
        """Return the number of parameters of the whole network."""
        return sum(map(math.prod, self.engine.layout.shapes.values()))

    def gather_full(
        self, parts: Mapping[str, Tensor], layout: ShardLayout | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors in the order of names from parts laid out like the weights, or by `layout`.

        A collective per tensor if parts are sharded: all ranks must consume the iterator."""
        return gather_full(parts, layout or self.engine.layout, self.gather)

    def digest(self) -> str:
        """Return the digest of the whole network's weights; a collective with sharded weights."""
        return masking.digest_of(self.gather_full(self.weights))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy named tensors, laid out like the weights, into the network."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
        self.engine.weights_changed()

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Restore what `engine.moments` returned, and the optimiser's step count, which excludes skipped steps."""
        self.engine.load_moments(moments, self.progress.updates - self.progress.began - self.progress.bad)

    def snapshot(self, *, keep: bool = True) -> Snapshot | None:
        """Return full CPU copies of weights and moments on the rank with `keep`, else None.

        The next snapshot reuses the same memory. A collective if weights or moments are sharded."""
        layout, owned_layout = self.engine.layout, self.engine.owned_layout
        masks = {name: mask.cpu() for name, mask in self._each(self.masks, layout, keep)}
        weights = dict(self._copied(self._each(self.weights, layout, keep)))
        moments = dict(self._copied(self._each(self.engine.moments(), owned_layout, keep)))
        if not keep:
            return None
        if any(copy.is_pinned() for copy in self._copies.values()):
            torch.cuda.synchronize()  # the copies are asynchronous
        return Snapshot(self.progress.model_copy(deep=True), masks, weights, moments)

    def _each(self, parts: Mapping[str, Tensor], layout: ShardLayout, keep: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors on the rank that keeps them; the other ranks only join the collectives."""
        if layout.is_replicated and not keep:
            return
        for name, tensor in self.gather_full(parts, layout):
            if keep:
                yield name, tensor

    def _copied(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Copy tensors into the reused CPU buffers, without waiting for the copies."""
        for name, tensor in tensors:
            if name not in self._copies:
                pinned = tensor.device.type == "cuda"  # page-locked memory, so that copies are fast and asynchronous
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            yield name, self._copies[name].copy_(tensor, non_blocking=True)


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise named tensors to safetensors; the same tensors give the same bytes."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return safetensors.torch.save(plain)


def unpack_masks(data: bytes, shapes: Mapping[str, tuple[int, ...]], source: str) -> Masks:
    """Return the masks of a commit. Raises UserError if they belong to another model or scope. source: for messages."""
    try:
        return masking.unpack(safetensors.torch.load(data), shapes)
    except (ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{source}/mask.safetensors: {error}. The prune.scope or the model differs.") from None


def check_same_network(source: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError if names or shapes of full tensors differ from those of the network. source: for the message."""
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    here = {name: tuple(shape) for name, shape in shapes.items()}
    mismatched = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
    if mismatched:
        first = mismatched[0]
        raise UserError(
            f"{source} is of another network: {len(mismatched)} tensors differ, first '{first}' (there "
            f"{there.get(first, 'absent')}, here {here.get(first, 'absent')}). Make the model section that of the file."
        )
