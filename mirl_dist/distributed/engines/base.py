"""Interfaces of engines, and the gathering of whole tensors from shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines.sharding import ShardLayout
from mirl_dist.pruning.partition import Partition

MakeOptimiser = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
MOMENTS = ("exp_avg", "exp_avg_sq")
Name = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]


class EngineSpec(NamedTuple):
    """Engine requested by a launch.

    offload_optimizer: keep moments and the weights they update in host memory. offload_parameters: keep parameters in
    host memory.
    """

    name: Name = "ddp"
    offload_optimizer: bool = False
    offload_parameters: bool = False


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

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        """Set the averaged gradients of pruned weights to zero. masks: in the layout of `weights`."""
        ...

    def clip(self, max_norm: float | None) -> Tensor:
        """Return the global norm of the averaged gradient, equal on all ranks. Scale gradients down to `max_norm`."""
        ...

    def step(self, lr: float) -> None:
        """Update the weights once and clear the gradients."""
        ...

    def drop_gradients(self) -> None:
        """Clear the gradients without an update, to skip the step."""
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


def gather_full(
    parts: Mapping[str, Tensor], layout: ShardLayout, gather: Callable[..., Tensor]
) -> Iterator[tuple[str, Tensor]]:
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
        wire = torch.uint8 if part.dtype is torch.bool else part.dtype
        padded = torch.zeros(layout.longest(name), dtype=wire, device=part.device)
        padded[: part.numel()] = part.reshape(-1)
        yield key, layout.join(name, gather(padded, what=f"gather of {key}")).to(part.dtype)
