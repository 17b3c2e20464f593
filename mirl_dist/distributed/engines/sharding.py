"""Layouts of sharded tensors: each rank holds one flat slice of each named tensor, in rank order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class ShardLayout(NamedTuple):
    """Layout of named tensors over the ranks.

    shapes: name -> shape of the whole tensor. lengths: per rank, name -> length of its flat slice (may be 0). Without
    lengths all tensors are replicated in their full shape.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rank: int = 0
    lengths: Sequence[Mapping[str, int]] = ()

    @property
    def is_replicated(self) -> bool:
        return not self.lengths

    def name(self, key: str) -> str:
        """Return the tensor name of a key: 'name', or 'name.kind' for a tensor of equal shape, such as a moment."""
        return key if key in self.shapes else key.rpartition(".")[0]

    def part_of(self, key: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor as a flat view, or the tensor itself in a replicated layout."""
        if self.is_replicated:
            return tensor
        name = self.name(key)
        begin = sum(of_rank[name] for of_rank in self.lengths[: self.rank])
        return tensor.reshape(-1)[begin : begin + self.lengths[self.rank][name]]

    def longest(self, name: str) -> int:
        """Return the length of the longest part over all ranks."""
        return max(of_rank[name] for of_rank in self.lengths)

    def join(self, name: str, padded: Tensor) -> Tensor:
        """Join the padded parts of all ranks, (ranks, at least longest), to the whole tensor."""
        parts = [row[: of_rank[name]] for row, of_rank in zip(padded, self.lengths, strict=True)]
        return torch.cat(parts).reshape(self.shapes[name])


def local_part(layout: ShardLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's parts of whole tensors, copied if sharded, so that the whole tensors can be freed."""
    return {name: t if layout.is_replicated else layout.part_of(name, t).clone() for name, t in tensors.items()}


def shard_layout(shapes: Mapping[str, tuple[int, ...]], rank: int, lengths: Sequence[Mapping[str, int]]) -> ShardLayout:
    """Return a layout whose parts cover every tensor once. lengths may include trailing padding, which is dropped."""
    exact: list[dict[str, int]] = [{} for _ in lengths]
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        ends = [min(end, size) for end in accumulate(of_rank[name] for of_rank in lengths)]
        assert ends[-1] == size, f"the ranks hold {ends[-1]} of {size} numbers of '{name}'"
        for of_rank, begin, end in zip(exact, [0, *ends], ends, strict=False):
            of_rank[name] = end - begin
    return ShardLayout(shapes, rank, tuple(exact))
