"""Runs the forward and backward passes of a network under the launch's engine (DDP, ZeRO or FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines.base import Collectives, Engine, MakeOptimiser, ShardedEngine
from mirl_dist.distributed.engines.ddp import DdpEngine
from mirl_dist.distributed.engines.spec import EngineSpec, require
from mirl_dist.distributed.process_group import Membership
from mirl_dist.errors import InvariantError, UserError
from mirl_dist.pruning.partition import Partition


class ParallelNetwork:
    """The network that all ranks train: replicated under DDP, sharded over the ranks under other engines."""

    def __init__(self, spec: EngineSpec, membership: Membership, collectives: Collectives, *, half: bool) -> None:
        """half: run forward and backward passes in bfloat16 under autocast."""
        self.spec = spec
        self._membership, self._collectives, self._half = membership, collectives, half
        self._sharded: ShardedEngine | None = None
        self._all_reduces = True

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass is a collective, because weights may be gathered in it."""
        return self._sharded is not None

    def engine(self, model: nn.Module, make_optimiser: MakeOptimiser, example: Tensor) -> tuple[Engine, nn.Module]:
        """Build the engine around a model on this rank's device.

        Return the engine and the module to call in training. DDP broadcasts the weights of rank 0; other engines
        require equal weights on every rank. example: input of shape (B, 3, H, W) with arbitrary values.
        """
        rank, world = self._membership.rank, self._membership.world
        if self.spec.name == "ddp":
            wrapped = self.wrap(model)
            self.warm_up(wrapped, example)
            return DdpEngine(dict(model.named_parameters()), make_optimiser, Partition(rank, world)), wrapped
        try:
            require(self.spec.name)
        except LookupError as error:
            raise UserError(str(error), everywhere=True) from None
        if self.spec.name == "fsdp":
            from mirl_dist.distributed.engines.fsdp import FsdpEngine

            example = example.to(self._membership.device)
            sharded: ShardedEngine = FsdpEngine(model, make_optimiser, self.spec, rank, self._collectives, example)
        else:
            from mirl_dist.distributed.engines.deepspeed import ZeroEngine

            sharded = ZeroEngine(model, make_optimiser, self.spec, rank, world, self._collectives, self._half)
        self._sharded = sharded
        return sharded, sharded.network

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move the model to this rank's device and wrap it in DDP. Weights become those of rank 0.

        Raise InvariantError when several ranks would train a model that is not wrapped in DDP.
        """
        # Depthwise kernels (C, 1, 3, 3) have two equivalent memory layouts, and autograd picks the other: harmless.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with self._collectives.collective("wrapping of the network"):
            wrapped: nn.Module = self._membership.accelerator.prepare(model)
        if self._membership.world > 1 and not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            raise InvariantError(
                f"{self._membership.world} ranks, but the model is a {type(wrapped).__name__}: gradients would not be "
                "shared. Launch with a file from launch/.",
                everywhere=True,
            )
        return wrapped

    def warm_up(self, wrapped: nn.Module, example: Tensor) -> None:
        """Run one discarded forward and backward pass, so that all training steps sum gradients in the same order.

        It also compiles what is to be compiled.

        DDP rebuilds its buckets after its first backward pass. With three or more ranks, the first step after a restart
        would otherwise sum gradients in a different order than the same step of an uninterrupted run.
        """
        self.backward(self.forward(wrapped, example.to(self._membership.device)).sum() * 0)
        wrapped.zero_grad()

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Run the model in the configured precision. Weights, gradients and losses stay float32.

        A collective if the network is sharded.
        """
        collective = self._collectives.collective("gather of weights") if self.is_sharded else nullcontext()
        device = self._membership.device.type
        with collective, torch.autocast(device, dtype=torch.bfloat16, enabled=self._half):
            restored: Tensor = model(images)
        return restored

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients averaged over ranks. A collective, unless more passes follow in this step."""
        if self._sharded is not None:
            with self._collectives.collective("gradient reduction"):
                self._sharded.backward(loss)
            return
        shares = self._membership.world > 1 and self._all_reduces
        with self._collectives.collective("gradient all-reduce") if shares else nullcontext():
            self._membership.accelerator.backward(loss)

    @contextmanager
    def accumulate(self, model: nn.Module, more: bool) -> Iterator[None]:
        """Wrap one forward and backward pass. more: further passes follow in this step, so skip the all-reduce."""
        if self._sharded is not None:
            self._sharded.accumulate(more)
            yield
            return
        self._all_reduces = not more
        try:
            with self._membership.accelerator.no_sync(model) if more else nullcontext():
                yield
        finally:
            self._all_reduces = True
