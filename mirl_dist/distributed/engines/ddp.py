"""Replicated training: every rank holds the whole network, under DDP or as a single process."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mirl_dist.distributed.engines.base import LocalEngine, MakeOptimiser
from mirl_dist.distributed.engines.sharding import ShardLayout
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

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        masking.mask_gradients(self.parameters, masks)

    def clip(self, max_norm: float | None) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters.values(), max_norm or float("inf"))
