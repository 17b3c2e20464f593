"""Which weights a rank counts: of replicated tensors a slice of each, of sharded tensors all that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mirl_dist.pruning.quantile import Gather


class ReplicatedPartition(NamedTuple):
    """Of replicated tensors a rank counts the `rank`-th of `ranks` contiguous slices of each."""

    rank: int = 0
    ranks: int = 1

    @property
    def is_replicated(self) -> bool:
        return True

    def own_part(self, flat: Tensor) -> Tensor:
        n = flat.numel()
        return flat[n * self.rank // self.ranks : n * (self.rank + 1) // self.ranks]


class ShardedPartition(NamedTuple):
    """Of sharded tensors a rank counts its shard: all that it holds.

    Shards are contiguous flat slices, which follow one another in the order of ranks, and may be empty.
    """

    rank: int

    @property
    def is_replicated(self) -> bool:
        return False

    def own_part(self, flat: Tensor) -> Tensor:
        return flat


class Partition(Protocol):
    """Which weights a rank counts.

    is_replicated: every rank holds all tensors, and makes the masks of all; else each holds, and masks, its shards.
    own_part: of a flat tensor as this rank holds it, the weights that it counts.
    """

    @property
    def is_replicated(self) -> bool: ...
    @property
    def rank(self) -> int: ...
    def own_part(self, flat: Tensor) -> Tensor: ...


class Counts(NamedTuple):
    """Of each prunable tensor, over all ranks: its surviving weights, and all of them."""

    surviving: dict[str, int]
    total: dict[str, int]


def count_weights(masks: Mapping[str, Tensor], partition: Partition, gather: Gather) -> Counts:
    """Count over all ranks; a collective where tensors are sharded."""
    names = sorted(masks)
    counts = torch.tensor([[int(masks[n].sum()), masks[n].numel()] for n in names], dtype=torch.int64).reshape(-1, 2)
    if not partition.is_replicated:
        counts = gather(counts).sum(dim=0)
    surviving, total = counts.t().tolist() if names else ([], [])
    return Counts(dict(zip(names, surviving, strict=True)), dict(zip(names, total, strict=True)))
