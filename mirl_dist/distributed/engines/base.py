"""What every engine can do."""

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
    """Meetings of all ranks. gather: a tensor of every rank, of one shape and dtype, as (ranks, *shape) on its device;
    meeting: around one that somebody else holds."""

    def gather(self, values: Tensor, *, what: str) -> Tensor: ...
    def collective(self, what: str) -> AbstractContextManager[None]: ...


class Engine(Protocol):
    """The live weights of one rank, and what updates them.

    weights: what this rank holds of each parameter, detached and live: whole tensors, or flat parts of them; held:
    which. owned: of what it keeps moments and the averaged gradient. share: what it counts. Names and their order are
    the bare network's.
    """

    weights: dict[str, Tensor]
    layout: ShardLayout
    owned_layout: ShardLayout
    partition: Partition

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        """Set the averaged gradients of dead weights to zero. masks: held as `weights` are."""
        ...

    def clip(self, most: float | None) -> Tensor:
        """The norm of the averaged gradient over all ranks, the same on each; scales it down to `most`."""
        ...

    def step(self, lr: float) -> None:
        """One update, after which there is no gradient."""
        ...

    def drop_gradients(self) -> None:
        """Drop the gradients: the step is left out."""
        ...

    def reset_optimizer(self) -> None:
        """A fresh optimiser: no moments, no steps counted."""
        ...

    def weights_changed(self) -> None:
        """`weights` were changed in place: whatever copies of them there are follow."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Live first and second moments of what is owned, as '<weight>.exp_avg' and '<weight>.exp_avg_sq', float32."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """The inverse of `moments`, after `steps` updates."""
        ...


class ShardedEngine(Engine, Protocol):
    """An engine that shares the network, or what updates it, out over the ranks.

    network: to be called in training, by all ranks together: they may meet in it.
    """

    network: nn.Module

    def accumulate(self, more: bool) -> None:
        """Said before each pass: whether `more` follow in this step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, which are averaged over ranks when no more passes follow: a meeting."""
        ...


def gather_full(
    parts: Mapping[str, Tensor], held: ShardLayout, gather: Callable[..., Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors from what ranks hold of them, one after the other in the order of names; never two at once.

    A meeting of all ranks for each, which all must go through, where they hold parts. parts: 'name' or 'name.kind'.
    """
    for key in sorted(parts):
        part = parts[key].detach()
        if held.is_replicated:
            yield key, part
            continue
        name = held.name(key)
        wire = torch.uint8 if part.dtype is torch.bool else part.dtype
        padded = torch.zeros(held.longest(name), dtype=wire, device=part.device)
        padded[: part.numel()] = part.reshape(-1)
        yield key, held.join(name, gather(padded, what=f"gather of {key}")).to(part.dtype)
