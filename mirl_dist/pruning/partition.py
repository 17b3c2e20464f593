"""Partitions weights over ranks for counting: a slice of each replicated tensor, or the shards that a rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mirl_dist.pruning.quantile import Gather


class ReplicatedPartition(NamedTuple):
    """Partition of replicated tensors: a rank counts the `rank`-th of `ranks` contiguous slices of each."""

    rank: int = 0
    ranks: int = 1

    @property
    def is_replicated(self) -> bool:
        return True

    def own_part(self, flat: Tensor) -> Tensor:
        n = flat.numel()
        return flat[n * self.rank // self.ranks : n * (self.rank + 1) // self.ranks]


class ShardedPartition(NamedTuple):
    """Partition of sharded tensors: a rank counts its whole shard.

    Shards are contiguous flat slices in the order of ranks, and may be empty.
    """

    rank: int

    @property
    def is_replicated(self) -> bool:
        return False

    def own_part(self, flat: Tensor) -> Tensor:
        return flat


class Partition(Protocol):
    """Defines which weights a rank counts, so that each weight is counted once.

    is_replicated: every rank holds all tensors and computes all masks; else each rank holds its shards and computes
    their masks. own_part: returns the weights that this rank counts, of a flat tensor that it holds.
    """

    @property
    def is_replicated(self) -> bool: ...
    @property
    def rank(self) -> int: ...
    def own_part(self, flat: Tensor) -> Tensor: ...


class Counts(NamedTuple):
    """Surviving and total weights of each prunable tensor, over all ranks."""

    surviving: dict[str, int]
    total: dict[str, int]


def count_weights(masks: Mapping[str, Tensor], partition: Partition, gather: Gather) -> Counts:
    """Count weights over all ranks; a collective if tensors are sharded."""
    names = sorted(masks)
    counts = torch.tensor([[int(masks[n].sum()), masks[n].numel()] for n in names], dtype=torch.int64).reshape(-1, 2)
    if not partition.is_replicated:
        counts = gather(counts).sum(dim=0)
    surviving, total = counts.t().tolist() if names else ([], [])
    return Counts(dict(zip(names, surviving, strict=True)), dict(zip(names, total, strict=True)))
