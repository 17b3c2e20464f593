"""Masks and clips the averaged gradients that a rank owns: flat slices, each element owned by exactly one rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mirl_dist.distributed.engines.base import Collectives
from mirl_dist.distributed.engines.sharding import ShardLayout

_EPSILON = 1e-6  # added to the norm, as in torch.nn.utils.clip_grad_norm_


@torch.no_grad()
def mask(gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor], layout: ShardLayout, owned: ShardLayout) -> None:
    """Set the gradients of pruned weights to zero in place. masks have `layout`, gradients have `owned`."""
    for name, mask in masks.items():
        gradients[name].mul_(owned.part_of(name, mask).reshape(-1) if layout.is_replicated else mask)


@torch.no_grad()
def clip(gradients: Mapping[str, Tensor], max_norm: float | None, collectives: Collectives) -> Tensor:
    """Return the global norm, a float32 scalar bit-identical on all ranks. Scale gradients down to `max_norm` in place.

    Gradients stay unscaled if the norm is not finite.
    """
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients.values()]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    norm = collectives.gather(total, what="gather of gradient norms").sum().sqrt()
    if max_norm is not None and bool(torch.isfinite(norm)):
        scale = torch.clamp(max_norm / (norm + _EPSILON), max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return norm.float()
