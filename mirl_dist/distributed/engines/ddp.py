"""Replicated training: every rank holds the whole network, under DDP or as a single process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines.base import LocalEngine, MakeOptimiser
from mirl_dist.distributed.engines.sharding import NORM_EPSILON, ShardLayout
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.partition import WHOLE, Partition


class DdpEngine(LocalEngine):
    """Engine of a replicated network."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        make_optimiser: MakeOptimiser,
        partition: Partition = WHOLE,
    ) -> None:
        """parameters: those of the unwrapped network; DDP averages their gradients."""
        layout = ShardLayout({name: tuple(p.shape) for name, p in parameters.items()})
        super().__init__(parameters, make_optimiser, layout, partition)
        self._factors: dict[str, Tensor] = {}

    @property
    def runs_ahead(self) -> bool:
        return self._is_fused

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self._factors = masking.gradient_factors(masks)

    def mask_gradients(self) -> None:
        masking.mask_gradients(self.parameters, self._factors)

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> Tensor:
        """Compute what torch.nn.utils.clip_grad_norm_ computes, without scaling by 1 where nothing is to be clipped."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if max_norm is not None:
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + NORM_EPSILON), max=1.0))
        return norm
