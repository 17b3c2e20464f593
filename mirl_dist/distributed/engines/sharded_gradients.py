"""What a rank does to the averaged gradients that it owns: flat parts, of which every number lies on one rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mirl_dist.distributed.engines.base import Collectives
from mirl_dist.distributed.engines.sharding import ShardLayout

_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds as much to the norm


@torch.no_grad()
def mask(gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor], held: ShardLayout, owned: ShardLayout) -> None:
    """Set those of dead weights to zero, in place. masks: held as `held` says."""
    for name, mask in masks.items():
        gradients[name].mul_(owned.part_of(name, mask).reshape(-1) if held.is_replicated else mask)


@torch.no_grad()
def clip(gradients: Mapping[str, Tensor], most: float | None, meet: Collectives) -> Tensor:
    """The norm over all ranks, the same bits on each, float32 (); scales down to `most`, in place."""
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients.values()]
    mine = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    norm = meet.gather(mine, what="gather of gradient norms").sum().sqrt()
    if most is not None and bool(torch.isfinite(norm)):
        scale = torch.clamp(most / (norm + _EPSILON), max=1.0)
        for gradient in gradients.values():
            gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return norm.float()
