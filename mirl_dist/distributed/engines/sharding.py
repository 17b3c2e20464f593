"""Tensors sharded over the ranks: each rank holds one flat slice of each named tensor, in rank order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mirl_dist.pruning.masks import with_pruned_weights

Gather = Callable[..., Tensor]
"""gather(tensor, what=...) returns the tensors of all ranks, of equal shape and dtype, as (ranks, *shape)."""
NORM_EPSILON = 1e-6
"""Added to the norm, as in torch.nn.utils.clip_grad_norm_."""


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


def local_part(layout: ShardLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's parts of whole tensors, copied if sharded, so that the whole tensors can be freed."""
    return {name: t if layout.is_replicated else layout.part_of(name, t).clone() for name, t in tensors.items()}


def shard_layout(
    shapes: Mapping[str, tuple[int, ...]], rank: int, own_lengths: Iterable[int], gather: Gather
) -> ShardLayout:
    """Return the layout whose parts cover every tensor once. A collective.

    own_lengths: lengths of this rank's slices in the order of `shapes`, maybe with trailing padding, which is dropped.
    """
    per_rank = gather(torch.tensor(list(own_lengths), dtype=torch.int64), what="gather of shard sizes").tolist()
    exact: list[dict[str, int]] = [{} for _ in per_rank]
    for (name, shape), lengths in zip(shapes.items(), zip(*per_rank, strict=True), strict=True):
        size = torch.Size(shape).numel()
        ends = [min(end, size) for end in accumulate(lengths)]
        assert ends[-1] == size, f"the ranks hold {ends[-1]} of {size} numbers of '{name}'"
        for of_rank, begin, end in zip(exact, [0, *ends], ends, strict=False):
            of_rank[name] = end - begin
    return ShardLayout(shapes, rank, tuple(exact))


def gather_full(parts: Mapping[str, Tensor], layout: ShardLayout, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """Yield whole tensors joined from the parts of all ranks, sorted by key, one at a time to bound memory.

    If tensors are sharded, each one is a collective: all ranks must exhaust the iterator. parts: 'name' or 'name.kind'
    -> this rank's part according to `layout`.
    """
    for key in sorted(parts):
        part = parts[key].detach()
        if layout.is_replicated:
            yield key, part
            continue
        name = layout.name(key)
        lengths = [of_rank[name] for of_rank in layout.lengths]
        wire = torch.uint8 if part.dtype is torch.bool else part.dtype
        padded = torch.zeros(max(lengths), dtype=wire, device=part.device)
        padded[: part.numel()] = part.reshape(-1)
        rows = gather(padded, what=f"gather of {key}")
        whole = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
        yield key, whole.reshape(layout.shapes[name]).to(part.dtype)


def owned_masks(masks: Mapping[str, Tensor], layout: ShardLayout, owned: ShardLayout) -> dict[str, Tensor]:
    """Return flat masks of the gradients that this rank owns, without those that prune nothing. masks: in `layout`."""
    parts = {name: owned.part_of(name, mask) if layout.is_replicated else mask for name, mask in masks.items()}
    return with_pruned_weights({name: part.reshape(-1) for name, part in parts.items()})


@torch.no_grad()
def mask_gradients(gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the gradients of pruned weights to zero in place. masks: `owned_masks`."""
    present = [name for name in masks if name in gradients]
    if present:
        torch._foreach_mul_([gradients[name] for name in present], [masks[name] for name in present])


@torch.no_grad()
def clip_gradients(gradients: Mapping[str, Tensor], max_norm: float | None, gather: Gather) -> Tensor:
    """Return the global norm, a float32 scalar bit-identical on all ranks. Scale gradients down to `max_norm` in place.

    gradients: the flat slices that this rank owns, each element owned by one rank. They stay unscaled if the norm is
    not finite.
    """
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients.values()]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    norm = gather(total, what="gather of gradient norms").sum().sqrt()
    if max_norm is not None and bool(torch.isfinite(norm)):
        scale = torch.clamp(max_norm / (norm + NORM_EPSILON), max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return norm.float()
