"""Partitions weights over ranks for counting: a slice of each replicated tensor, or the shards that a rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mirl_dist.pruning.magnitudes import count_true
from mirl_dist.pruning.quantile import Gather


class Partition(NamedTuple):
    """Which weights a rank counts, so that each weight is counted on exactly one rank.

    is_replicated: every rank holds all tensors, computes all masks, and counts the `rank`-th of `ranks` contiguous
    slices of each tensor. Else each rank holds shards (contiguous flat slices in the order of ranks, possibly empty),
    computes their masks, and counts all that it holds.
    """

    rank: int = 0
    ranks: int = 1
    is_replicated: bool = True

    def own_part(self, flat: Tensor) -> Tensor:
        """Return the weights that this rank counts, of a flat tensor that it holds."""
        n = flat.numel()
        return flat[n * self.rank // self.ranks : n * (self.rank + 1) // self.ranks] if self.is_replicated else flat


WHOLE = Partition()
"""The partition of a single rank."""


class Counts(NamedTuple):
    """Surviving and total weights of each prunable tensor, over all ranks."""

    surviving: dict[str, int]
    total: dict[str, int]


def count_weights(masks: Mapping[str, Tensor], partition: Partition, gather: Gather) -> Counts:
    """Count weights over all ranks; a collective if tensors are sharded."""
    names = sorted(masks)
    surviving_here = count_true(masks[n] for n in names)
    counts = torch.tensor([*zip(surviving_here, (masks[n].numel() for n in names), strict=True)], dtype=torch.int64)
    counts = counts.reshape(-1, 2)
    if not partition.is_replicated:
        counts = gather(counts).sum(dim=0)
    surviving, total = counts.t().tolist() if names else ([], [])
    return Counts(dict(zip(names, surviving, strict=True)), dict(zip(names, total, strict=True)))
