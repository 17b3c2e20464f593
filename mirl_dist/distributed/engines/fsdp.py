"""FSDP2: parameters, gradients and moments are dealt out over the ranks by rows; each layer's are gathered for use.

torch's fully_shard directly: Accelerate's own FSDP leaves the model unwrapped on a CPU, without a word. The optimiser
works on this rank's rows as plain tensors that share the memory of torch's DTensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines import requirements, sharded_gradients
from mirl_dist.distributed.engines.base import MOMENTS, Collectives, EngineSpec, MakeOptimiser
from mirl_dist.distributed.engines.sharding import shard_layout
from mirl_dist.errors import UserError
from mirl_dist.pruning.partition import Partition, ShardedPartition


class FsdpEngine:
    """Engine, Dealt. network: with the same weights on every rank, on the ranks' device; it is taken over."""

    optimiser: torch.optim.Optimizer

    def __init__(
        self,
        network: nn.Module,
        make_optimiser: MakeOptimiser,
        asked: EngineSpec,
        rank: int,
        meet: Collectives,
        example: Tensor,
    ) -> None:
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        with meet.collective("sharding of the network"):
            self.network: Any = _sharded(network, next(network.parameters()).device, asked)
        self._dealt: dict[str, Any] = dict(self.network.named_parameters())
        whole = [name for name, p in self._dealt.items() if not hasattr(p, "to_local")]
        if whole:
            raise UserError(
                f"FSDP2 was asked for, but '{whole[0]}' ({len(whole)} such) is still whole on rank {rank}: nothing "
                "would be saved. This torch does not shard here; launch with a file for DDP.",
                everywhere=True,
            )
        with meet.collective("first pass"), torch.no_grad():
            self.network(example)  # FSDP2 puts parameters in their last place when they are first used
        self.network.reshard()
        self._make, self._meet = make_optimiser, meet
        self._own = {name: nn.Parameter(p.detach().to_local().reshape(-1)) for name, p in self._dealt.items()}
        self.weights: dict[str, Tensor] = {name: p.detach() for name, p in self._own.items()}
        mine = torch.tensor([p.numel() for p in self._own.values()], dtype=torch.int64)
        lengths = meet.gather(mine, what="gather of shard sizes").tolist()
        self.layout = self.owned_layout = shard_layout(
            shapes, rank, [dict(zip(shapes, row, strict=True)) for row in lengths]
        )
        self.partition: Partition = ShardedPartition(rank)
        self.reset_optimizer()

    def accumulate(self, more: bool) -> None:
        """Every pass reduces and scatters its gradients: no rank keeps whole ones between passes."""

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def _gradients(self) -> dict[str, Tensor]:
        return {n: p.grad.to_local().reshape(-1) for n, p in self._dealt.items() if p.grad is not None}

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        found = self._gradients()
        sharded_gradients.mask(found, {n: m for n, m in masks.items() if n in found}, self.layout, self.owned_layout)

    def clip(self, most: float | None) -> Tensor:
        return sharded_gradients.clip(self._gradients(), most, self._meet)

    def step(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        for name, gradient in self._gradients().items():
            self._own[name].grad = gradient
        live = {name: p.to_local().data_ptr() for name, p in self._dealt.items()}
        assert all(own.data_ptr() == live[name] for name, own in self._own.items()), "FSDP2 has moved its parameters"
        self.optimiser.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimiser.zero_grad()
        self.network.zero_grad()
        self.network.reshard()  # after a forward pass that no backward pass followed

    def reset_optimizer(self) -> None:
        self.optimiser = self._make(self._own)

    def weights_changed(self) -> None:
        pass  # the parameters are views of the same memory

    def moments(self) -> dict[str, Tensor]:
        state = self.optimiser.state
        return {f"{n}.{k}": state[p][k] for n, p in self._own.items() for k in MOMENTS if k in state[p]}

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        for name, parameter in self._own.items():
            if f"{name}.{MOMENTS[0]}" in moments:
                kept = {kind: moments[f"{name}.{kind}"].clone().to(parameter.device) for kind in MOMENTS}
                self.optimiser.state[parameter] = {"step": torch.tensor(float(steps)), **kept}


def _sharded(network: nn.Module, device: torch.device, asked: EngineSpec) -> Any:
    try:
        requirements.require("fsdp")
    except LookupError as error:
        raise UserError(str(error), everywhere=True) from None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    # The network ends in a crop, a view, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    if asked.offload_parameters and device.type == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    for unit in _units(network):
        fully_shard(unit, **options)
    fully_shard(network, **options)
    return network


def _units(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered and freed as one: each block that stands in a row of blocks; the root takes the rest."""
    for holder in network.modules():
        if isinstance(holder, nn.Sequential | nn.ModuleList):
            for block in holder.children():
                if next(block.children(), None) is not None and next(block.parameters(), None) is not None:
                    yield block
