"""Replicated training: every rank holds the whole network, under DDP or as a single process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines.base import MOMENTS, MakeOptimiser
from mirl_dist.distributed.engines.sharding import ShardLayout
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.partition import WHOLE, Partition


class DdpEngine:
    """Engine of a replicated network."""

    optimiser: torch.optim.Optimizer

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        make_optimiser: MakeOptimiser,
        partition: Partition = WHOLE,
    ) -> None:
        """parameters: those of the unwrapped network; DDP averages their gradients."""
        self.parameters, self._make_optimiser = dict(parameters), make_optimiser
        self.weights: dict[str, Tensor] = {name: p.detach() for name, p in parameters.items()}
        self.layout = self.owned_layout = ShardLayout({name: tuple(p.shape) for name, p in parameters.items()})
        self.partition = partition
        self.reset_optimizer()

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        masking.mask_gradients(self.parameters, masks)

    def clip(self, max_norm: float | None) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters.values(), max_norm or float("inf"))

    def step(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad()

    def drop_gradients(self) -> None:
        self.optimiser.zero_grad()

    def reset_optimizer(self) -> None:
        self.optimiser = self._make_optimiser(self.parameters)

    def weights_changed(self) -> None:
        pass

    def moments(self) -> dict[str, Tensor]:
        moments = {}
        for name, parameter in self.parameters.items():
            for kind in MOMENTS:
                if kind in self.optimiser.state[parameter]:
                    moments[f"{name}.{kind}"] = self.optimiser.state[parameter][kind]
        return moments

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        for name, parameter in self.parameters.items():
            if f"{name}.{MOMENTS[0]}" in moments:
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(steps)),
                    **{kind: moments[f"{name}.{kind}"].clone().to(parameter.device) for kind in MOMENTS},
                }
