"""Interfaces of engines, and what engines share whose optimiser works on plain parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines.sharding import ShardLayout
from mirl_dist.pruning.partition import Partition

MakeOptimiser = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Collectives(Protocol):
    """The collectives that engines need.

    gather: tensors of equal shape and dtype from all ranks, as (ranks, *shape). collective: records a collective that
    the engine's library runs in the context.
    """

    def gather(self, values: Tensor, *, what: str) -> Tensor: ...
    def collective(self, what: str) -> AbstractContextManager[None]: ...


class Engine(Protocol):
    """The live weights of one rank, with their gradients and optimiser.

    weights: this rank's part of each parameter, detached but sharing memory: whole tensors or flat slices, according to
    `layout`. owned_layout: layout of the moments and averaged gradients that this rank keeps. partition: the weights
    that this rank counts. Names and their order are those of the unwrapped network.
    """

    weights: dict[str, Tensor]
    layout: ShardLayout
    owned_layout: ShardLayout
    partition: Partition

    @property
    def runs_ahead(self) -> bool:
        """Whether the host may queue another step before it knows whether this one was refused."""
        ...

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks of the round. masks: in the layout of `weights`."""
        ...

    def mask_gradients(self) -> None:
        """Set the averaged gradients of pruned weights to zero; launches nothing for tensors without any."""
        ...

    def clip(self, max_norm: float | None) -> Tensor:
        """Return the global norm of the averaged gradient, equal on all ranks. Scale gradients down to `max_norm`."""
        ...

    def step(self, lr: float, refused: Tensor) -> None:
        """Update the weights once unless `refused`, a float32 scalar, is 1, and clear the gradients.

        A refused update changes no weight, no moment and no step count.
        """
        ...

    def reset_optimizer(self) -> None:
        """Reset the optimiser: no moments, step count 0."""
        ...

    def weights_changed(self) -> None:
        """Update all copies of `weights` after an in-place change."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Return the live moments that this rank owns: '<weight>.exp_avg' and '<weight>.exp_avg_sq', float32."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Load moments as returned by `moments`, and set the step count to `steps`."""
        ...


class ShardedEngine(Engine, Protocol):
    """An engine that shards the network or its optimiser over the ranks.

    network: module to call in training. All ranks must call it together, because it may run collectives.
    """

    network: nn.Module

    def accumulate(self, more: bool) -> None:
        """Announce before each pass whether more passes follow in this step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; average them over ranks after the step's last pass. A collective."""
        ...


class LocalEngine:
    """What engines share whose torch optimiser updates plain `parameters` of this rank. Subclasses mask and clip."""

    optimiser: torch.optim.Optimizer

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        make_optimiser: MakeOptimiser,
        layout: ShardLayout,
        partition: Partition,
    ) -> None:
        self.parameters, self._make_optimiser = dict(parameters), make_optimiser
        self.weights: dict[str, Tensor] = {name: p.detach() for name, p in parameters.items()}
        self.layout = self.owned_layout = layout
        self.partition = partition
        self.reset_optimizer()

    @property
    def _is_fused(self) -> bool:
        return bool(self.optimiser.defaults["fused"])

    def step(self, lr: float, refused: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        if self._is_fused:  # reads this attribute on the device, so the host does not wait (torch.amp.GradScaler)
            self.optimiser.found_inf = refused  # type: ignore[attr-defined]
            self.optimiser.step()
        elif not bool(refused):
            self.optimiser.step()
        self.optimiser.zero_grad()

    def reset_optimizer(self) -> None:
        self.optimiser = self._make_optimiser(self.parameters)

    def weights_changed(self) -> None:
        pass  # `weights` share memory with the parameters

    def moments(self) -> dict[str, Tensor]:
        state = {name: self.optimiser.state[p] for name, p in self.parameters.items()}
        return {f"{name}.{kind}": of_one[kind] for name, of_one in state.items() for kind in MOMENTS if kind in of_one}

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        for name, parameter in self.parameters.items():
            if f"{name}.{MOMENTS[0]}" in moments:
                loaded = {kind: moments[f"{name}.{kind}"].clone().to(parameter.device) for kind in MOMENTS}
                self.optimiser.state[parameter] = {"step": step_count(steps, self.optimiser, parameter), **loaded}


def step_count(steps: int, optimiser: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return the optimiser's state 'step' of a parameter: a tensor beside it if fused, else on the CPU."""
    return torch.full((), float(steps), device=parameter.device if optimiser.defaults["fused"] else "cpu")
