"""FSDP2: shards parameters, gradients and moments over the ranks by rows, and gathers each layer's weights for use.

Calls torch's fully_shard directly, because Accelerate's FSDP silently leaves the model unwrapped on a CPU. The
optimiser works on this rank's rows as plain tensors that share memory with torch's DTensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines import sharding
from mirl_dist.distributed.engines.base import Collectives, LocalEngine, MakeOptimiser
from mirl_dist.distributed.engines.spec import EngineSpec
from mirl_dist.errors import InvariantError
from mirl_dist.pruning.partition import Partition


class FsdpEngine(LocalEngine):
    """ShardedEngine of FSDP2. `parameters` are this rank's rows, flat and in the memory of torch's DTensors."""

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
        self._collectives = collectives
        self._dtensors: dict[str, Any] = dict(self.network.named_parameters())
        whole = [name for name, p in self._dtensors.items() if not hasattr(p, "to_local")]
        if whole:
            raise InvariantError(
                f"FSDP2 was requested, but '{whole[0]}' ({len(whole)} such) is not sharded on rank {rank}: nothing "
                "would be saved. This torch does not shard here; launch with a file for DDP.",
                everywhere=True,
            )
        with collectives.collective("first pass"), torch.no_grad():
            self.network(example)  # FSDP2 moves parameters to their final memory at the first forward pass
        self.network.reshard()
        rows = {name: nn.Parameter(p.detach().to_local().reshape(-1)) for name, p in self._dtensors.items()}
        layout = sharding.shard_layout(shapes, rank, [p.numel() for p in rows.values()], collectives.gather)
        super().__init__(rows, make_optimiser, layout, Partition(rank, is_replicated=False))
        self._masks: dict[str, Tensor] = {}
        self._local_gradients: dict[str, Tensor] = {}

    def accumulate(self, more: bool) -> None:
        """Do nothing: every pass reduce-scatters its gradients, so no rank keeps whole gradients between passes."""

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    @property
    def runs_ahead(self) -> bool:
        return False  # `clip` waits for the norms of all ranks

    @torch.no_grad()  # with which `to_local` makes no autograd node
    def _gradients(self) -> dict[str, Tensor]:
        """Return the averaged gradients of this rank's rows as flat views, which are made once in a step."""
        if not self._local_gradients:
            gradients = {name: p.grad for name, p in self._dtensors.items()}
            self._local_gradients = {n: g.to_local().reshape(-1) for n, g in gradients.items() if g is not None}
        return self._local_gradients

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = sharding.owned_masks(masks, self.layout, self.owned_layout)

    def mask_gradients(self) -> None:
        sharding.mask_gradients(self._gradients(), self._masks)

    def clip(self, max_norm: float | None) -> Tensor:
        return sharding.clip_gradients(self._gradients(), max_norm, self._collectives.gather)

    @torch.no_grad()
    def step(self, lr: float, refused: Tensor) -> None:
        for name, gradient in self._gradients().items():
            self.parameters[name].grad = gradient
        in_place = all(p.data_ptr() == self._dtensors[n].to_local().data_ptr() for n, p in self.parameters.items())
        assert in_place, "FSDP2 has moved its parameters"
        super().step(lr, refused)
        self._local_gradients = {}
        self.network.zero_grad()
        self.network.reshard()  # frees weights gathered by a forward pass without a backward pass


def _shard(network: nn.Module, device: torch.device, spec: EngineSpec) -> Any:
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
        if type(container) in (nn.Sequential, nn.ModuleList):  # subclasses are blocks of their own
            for block in container.children():
                if next(block.children(), None) is not None and next(block.parameters(), None) is not None:
                    yield block
