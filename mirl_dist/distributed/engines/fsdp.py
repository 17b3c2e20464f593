"""FSDP2: shards parameters, gradients and moments over the ranks by rows, and gathers each layer's weights for use.

Calls torch's fully_shard directly, because Accelerate's FSDP silently leaves the model unwrapped on a CPU. The
optimiser works on this rank's rows as plain tensors that share memory with torch's DTensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines import requirements, sharded_gradients
from mirl_dist.distributed.engines.base import MOMENTS, Collectives, EngineSpec, MakeOptimiser
from mirl_dist.distributed.engines.sharding import shard_layout
from mirl_dist.errors import InvariantError, UserError
from mirl_dist.pruning.partition import Partition


class _ShardedParameter(NamedTuple):
    """A parameter as torch's DTensor, and this rank's rows as a flat parameter in the same memory."""

    dtensor: Any
    local: nn.Parameter


class FsdpEngine:
    """ShardedEngine of FSDP2."""

    optimiser: torch.optim.Optimizer

    def __init__(
        self,
        network: nn.Module,
        make_optimiser: MakeOptimiser,
        spec: EngineSpec,
        rank: int,
        collectives: Collectives,
        example: Tensor,
    ) -> None:
        """network: equal weights on every rank, on this rank's device; sharded in place. example: (B, 3, H, W).

        Raise InvariantError if torch leaves a parameter unsharded.
        """
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        with collectives.collective("sharding of the network"):
            self.network: Any = _shard(network, next(network.parameters()).device, spec)
        dtensors: dict[str, Any] = dict(self.network.named_parameters())
        whole = [name for name, p in dtensors.items() if not hasattr(p, "to_local")]
        if whole:
            raise InvariantError(
                f"FSDP2 was asked for, but '{whole[0]}' ({len(whole)} such) is still whole on rank {rank}: nothing "
                "would be saved. This torch does not shard here; launch with a file for DDP.",
                everywhere=True,
            )
        with collectives.collective("first pass"), torch.no_grad():
            self.network(example)  # FSDP2 moves parameters to their final memory at the first forward pass
        self.network.reshard()
        self._make_optimiser, self._collectives = make_optimiser, collectives
        self._parameters = {
            name: _ShardedParameter(p, nn.Parameter(p.detach().to_local().reshape(-1))) for name, p in dtensors.items()
        }
        self.weights: dict[str, Tensor] = {name: p.local.detach() for name, p in self._parameters.items()}
        own_lengths = torch.tensor([p.numel() for p in self.weights.values()], dtype=torch.int64)
        lengths = collectives.gather(own_lengths, what="gather of shard sizes").tolist()
        self.layout = self.owned_layout = shard_layout(
            shapes, rank, [dict(zip(shapes, row, strict=True)) for row in lengths]
        )
        self.partition = Partition(rank, is_replicated=False)
        self.reset_optimizer()

    def accumulate(self, more: bool) -> None:
        """Do nothing: every pass reduce-scatters its gradients, so no rank keeps whole gradients between passes."""

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def _gradients(self) -> dict[str, Tensor]:
        """Return the averaged gradients of this rank's rows as flat views."""
        gradients = {name: p.dtensor.grad for name, p in self._parameters.items()}
        return {name: g.to_local().reshape(-1) for name, g in gradients.items() if g is not None}

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        gradients = self._gradients()
        present = {name: mask for name, mask in masks.items() if name in gradients}
        sharded_gradients.mask(gradients, present, self.layout, self.owned_layout)

    def clip(self, max_norm: float | None) -> Tensor:
        return sharded_gradients.clip(self._gradients(), max_norm, self._collectives)

    def step(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        for name, gradient in self._gradients().items():
            self._parameters[name].local.grad = gradient
        in_place = all(p.local.data_ptr() == p.dtensor.to_local().data_ptr() for p in self._parameters.values())
        assert in_place, "FSDP2 has moved its parameters"
        self.optimiser.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimiser.zero_grad()
        self.network.zero_grad()
        self.network.reshard()  # frees weights gathered by a forward pass without a backward pass

    def reset_optimizer(self) -> None:
        self.optimiser = self._make_optimiser({name: p.local for name, p in self._parameters.items()})

    def weights_changed(self) -> None:
        pass  # `weights` share memory with the parameters

    def moments(self) -> dict[str, Tensor]:
        state = {name: self.optimiser.state[p.local] for name, p in self._parameters.items()}
        return {f"{name}.{kind}": of_one[kind] for name, of_one in state.items() for kind in MOMENTS if kind in of_one}

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        for name, parameter in self._parameters.items():
            if f"{name}.{MOMENTS[0]}" in moments:
                device = parameter.local.device
                loaded = {kind: moments[f"{name}.{kind}"].clone().to(device) for kind in MOMENTS}
                self.optimiser.state[parameter.local] = {"step": torch.tensor(float(steps)), **loaded}


def _shard(network: nn.Module, device: torch.device, spec: EngineSpec) -> Any:
    try:
        requirements.require("fsdp")
    except LookupError as error:
        raise UserError(str(error), everywhere=True) from None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    # The network's output is a crop, hence a view; it is never modified in place here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    if spec.offload_parameters and device.type == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    for unit in _units(network):
        fully_shard(unit, **options)
    fully_shard(network, **options)
    return network


def _units(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules gathered and freed as a unit: each block of a sequence of blocks. The root takes the rest."""
    for container in network.modules():
        if isinstance(container, nn.Sequential | nn.ModuleList):
            for block in container.children():
                if next(block.children(), None) is not None and next(block.parameters(), None) is not None:
                    yield block
