"""Who counts what: of replicas each rank a slice, of a network dealt out over the ranks each rank its own part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mirl_dist.pruning.quantile import Gather


class ReplicatedPartition(NamedTuple):
    """This rank's share of replicated tensors: the `rank`-th of `ranks` contiguous pieces of each."""

    rank: int = 0
    ranks: int = 1

    @property
    def is_replicated(self) -> bool:
        return True

    def of(self, flat: Tensor) -> Tensor:
        n = flat.numel()
        return flat[n * self.rank // self.ranks : n * (self.rank + 1) // self.ranks]


class ShardedPartition(NamedTuple):
    """The share of a rank that alone holds its part of each tensor: all of that part.

    Parts are contiguous flat slices, which follow one another in the order of ranks, and may be empty.
    """

    rank: int

    @property
    def is_replicated(self) -> bool:
        return False

    def of(self, flat: Tensor) -> Tensor:
        return flat


class Partition(Protocol):
    """What a rank counts. whole: every rank holds every tensor, and makes the masks of all; else each its own part."""

    @property
    def is_replicated(self) -> bool: ...
    @property
    def rank(self) -> int: ...
    def of(self, flat: Tensor) -> Tensor: ...


class Counts(NamedTuple):
    """Of each prunable tensor, over all ranks: its alive weights, and all of them."""

    alive: dict[str, int]
    all: dict[str, int]


def count_weights(masks: Mapping[str, Tensor], share: Partition, gather: Gather) -> Counts:
    """Counted over all ranks: a meeting of them where each holds a part."""
    names = sorted(masks)
    held = torch.tensor([[int(masks[n].sum()), masks[n].numel()] for n in names], dtype=torch.int64).reshape(-1, 2)
    if not share.is_replicated:
        held = gather(held).sum(dim=0)
    alive, every = held.t().tolist() if names else ([], [])
    return Counts(dict(zip(names, alive, strict=True)), dict(zip(names, every, strict=True)))
