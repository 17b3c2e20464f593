"""Defines what every engine can do."""

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
    """The engine that a launch asks for. offload_*: moments and their weights, or parameters, stay with the host."""

    name: Name = "ddp"
    offload_optimizer: bool = False
    offload_parameters: bool = False


class Collectives(Protocol):
    """What engines use of the ranks. gather: a tensor of every rank, of one shape and dtype, as (ranks, *shape);
    collective: records one that the engine's library runs inside."""

    def gather(self, values: Tensor, *, what: str) -> Tensor: ...
    def collective(self, what: str) -> AbstractContextManager[None]: ...


class Engine(Protocol):
    """The live weights of one rank, and what updates them.

    weights: what this rank holds of each parameter, detached and live: whole tensors, or flat parts of them, as layout
    says. owned_layout: of what it keeps moments and the averaged gradient. partition: what it counts. Names and their
    order are the bare network's.
    """

    weights: dict[str, Tensor]
    layout: ShardLayout
    owned_layout: ShardLayout
    partition: Partition

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        """Set the averaged gradients of pruned weights to zero. masks: laid out as `weights` are."""
        ...

    def clip(self, max_norm: float | None) -> Tensor:
        """Return the norm of the averaged gradient over all ranks, the same on each; scale it down to `max_norm`."""
        ...

    def step(self, lr: float) -> None:
        """Update the weights once; there is no gradient afterwards."""
        ...

    def drop_gradients(self) -> None:
        """Drop the gradients: the step is skipped."""
        ...

    def reset_optimizer(self) -> None:
        """Start with a fresh optimiser: no moments, no steps counted."""
        ...

    def weights_changed(self) -> None:
        """Bring all copies of `weights` up to date after they were changed in place."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Return the live moments of what is owned, as '<weight>.exp_avg' and '<weight>.exp_avg_sq', float32."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Set what `moments` returns, after `steps` updates."""
        ...


class ShardedEngine(Engine, Protocol):
    """An engine that shards the network, or what updates it, over the ranks.

    network: to be called in training, by all ranks together: collectives may run in it.
    """

    network: nn.Module

    def accumulate(self, more: bool) -> None:
        """Announce, before each pass, whether `more` follow in this step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, which are averaged over ranks when no more passes follow: a collective."""
        ...


def gather_full(
    parts: Mapping[str, Tensor], layout: ShardLayout, gather: Callable[..., Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield whole tensors from the parts of all ranks, one after the other in the order of names; never two at once.

    A collective for each where tensors are sharded: all ranks must exhaust it. parts: by 'name' or 'name.kind', laid
    out as layout says.
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
