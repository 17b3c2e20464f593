"""Says which part of each named tensor each rank holds: flat slices, which follow one another in rank order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class ShardLayout(NamedTuple):
    """shapes: of the whole tensors, by name; lengths: of each rank's parts, by name, in rank order (some may be 0).

    Without lengths every rank holds every tensor whole, in its shape.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rank: int = 0
    lengths: Sequence[Mapping[str, int]] = ()

    @property
    def is_replicated(self) -> bool:
        return not self.lengths

    def name(self, key: str) -> str:
        """Return the tensor that a key is about: 'name', or 'name.kind' for what has its shape, as a moment has."""
        return key if key in self.shapes else key.rpartition(".")[0]

    def part_of(self, key: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor: a flat view of it; the tensor itself where all are replicated."""
        if self.is_replicated:
            return tensor
        name = self.name(key)
        begin = sum(of_rank[name] for of_rank in self.lengths[: self.rank])
        return tensor.reshape(-1)[begin : begin + self.lengths[self.rank][name]]

    def longest(self, name: str) -> int:
        """Return the length of the longest part."""
        return max(of_rank[name] for of_rank in self.lengths)

    def join(self, name: str, padded: Tensor) -> Tensor:
        """Join a whole tensor from the parts of all ranks, (ranks, longest or more)."""
        parts = [row[: of_rank[name]] for row, of_rank in zip(padded, self.lengths, strict=True)]
        return torch.cat(parts).reshape(self.shapes[name])


def local_part(layout: ShardLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what this rank holds of whole tensors, in memory of its own where that is a part."""
    return {name: t if layout.is_replicated else layout.part_of(name, t).clone() for name, t in tensors.items()}


def shard_layout(shapes: Mapping[str, tuple[int, ...]], rank: int, lengths: Sequence[Mapping[str, int]]) -> ShardLayout:
    """Lay out parts that cover every tensor once. lengths: may count padding after a tensor's end, which is dropped."""
    exact: list[dict[str, int]] = [{} for _ in lengths]
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        ends = [min(end, size) for end in accumulate(of_rank[name] for of_rank in lengths)]
        assert ends[-1] == size, f"the ranks hold {ends[-1]} of {size} numbers of '{name}'"
        for of_rank, begin, end in zip(exact, [0, *ends], ends, strict=False):
            of_rank[name] = end - begin
    return ShardLayout(shapes, rank, tuple(exact))
