"""DeepSpeed's ZeRO: moments (stage 1), gradients (2) and weights (3) are dealt out over the ranks.

DeepSpeed runs the passes, averages gradients and updates; masks, clipping, rates and states are done here, on what this
rank owns. It keeps one flat float32 tensor of all that a rank owns and gives that to the optimiser: a parameter's part
of it is a place. Its own checkpoints are not used: states are named tensors, whatever the engine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines import requirements, sharded_gradients
from mirl_dist.distributed.engines.base import MOMENTS, Collectives, EngineSpec, MakeOptimiser, Name
from mirl_dist.distributed.engines.sharding import ShardLayout, shard_layout
from mirl_dist.errors import UserError
from mirl_dist.pruning.partition import Partition, ReplicatedPartition, ShardedPartition

DEEPSPEED_BUCKET = 50_000_000
"""Weights at most that DeepSpeed keeps room for to reduce gradients, as it is asked to here; never more than
the network has."""
DEEPSPEED_LIVE = 8
"""ZeRO-3: one part in so many of the network may be gathered beside the layer in use."""
_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_OLD_NAMES = r"`torch.distributed.\w+` is deprecated"  # of collectives, which DeepSpeed and FSDP2 call (torch 2.13)


class _OwnedSlice(NamedTuple):
    """Where a parameter's owned part lies: in `flat`, from `begin`; `first`: its flat index in the whole parameter."""

    flat: Tensor
    begin: int
    length: int
    first: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.begin, self.length)


class _InPrecision(nn.Module):
    """The network under autocast: DeepSpeed switches off one that is entered outside of it."""

    def __init__(self, network: nn.Module, half: bool) -> None:
        super().__init__()
        self.network, self._half = network, half

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self._half):
            restored: Tensor = self.network(images)
        return restored


class ZeroEngine:
    """Engine, Dealt. network: with the same weights on every rank, on the ranks' device; it is taken over."""

    def __init__(
        self,
        network: nn.Module,
        make_optimiser: MakeOptimiser,
        asked: EngineSpec,
        rank: int,
        world: int,
        meet: Collectives,
        half: bool,
    ) -> None:
        self._stage, self._meet = _STAGES[asked.name], meet
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        optimiser = make_optimiser(dict(network.named_parameters()))
        with meet.collective("sharding of the network"):
            settings = _settings(asked, self._stage, sum(p.numel() for p in network.parameters()))
            self._engine = _initialised(asked.name, _InPrecision(network, half), optimiser, settings)
        self.network: Any = self._engine
        self._parameters: dict[str, Any] = dict(network.named_parameters())
        self._zero: Any = self._engine.optimizer
        self._inner: Any = self._zero.optimizer
        self._offloaded = asked.offload_optimizer
        self._places = {name: self._place(p) for name, p in self._parameters.items()}
        lengths = torch.tensor([place.length for place in self._places.values()], dtype=torch.int64)
        table = meet.gather(lengths, what="gather of shard sizes").tolist()
        self.owned_layout = shard_layout(shapes, rank, [dict(zip(shapes, row, strict=True)) for row in table])
        self._places = {n: p._replace(length=self.owned_layout.lengths[rank][n]) for n, p in self._places.items()}
        self.partition: Partition = ShardedPartition(rank)
        if self._stage == 3:
            self.layout = self.owned_layout
            self.weights = {name: place.of(place.flat.detach()) for name, place in self._places.items()}
        else:
            self.layout = ShardLayout(shapes)
            self.partition = ReplicatedPartition(rank, world)
            self.weights = {name: p.detach() for name, p in self._parameters.items()}

    def _place(self, parameter: Any) -> _OwnedSlice:
        """In stage 3 its length counts the padding that every rank's part may end in."""
        if self._stage == 3:
            group, begin, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            return _OwnedSlice(self._zero.fp32_partitioned_groups_flat[group], begin, length, 0)
        flat = self._zero.single_partition_of_fp32_groups[0]
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it is owned by other ranks
            return _OwnedSlice(flat, 0, 0, 0)
        inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _OwnedSlice(flat, inside.start, inside.numel, whole.start)

    def accumulate(self, more: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(not more)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def _gradients(self) -> dict[str, Tensor]:
        """The averaged gradients that this rank owns, live."""
        if self._offloaded and torch.cuda.is_available():
            torch.cuda.synchronize()  # DeepSpeed sends them to the host without waiting (0.19.8)
        found = {}
        for name, parameter in self._parameters.items():
            place = self._places[name]
            if self._offloaded:
                assert place.flat.grad is not None
                found[name] = place.of(place.flat.grad)
            elif self._stage == 3:
                part = self._zero.get_local_fp32_grad_for_param(parameter)
                found[name] = part.reshape(-1)[: place.length]
            elif parameter._hp_mapping is None:
                found[name] = place.of(place.flat.detach())
            else:
                part = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
                found[name] = part.reshape(-1)[: place.length]
        return found

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        sharded_gradients.mask(self._gradients(), masks, self.layout, self.owned_layout)

    def clip(self, most: float | None) -> Tensor:
        return sharded_gradients.clip(self._gradients(), most, self._meet)

    def step(self, lr: float) -> None:
        for group in self._inner.param_groups:
            group["lr"] = lr
        with self._meet.collective("update of the weights"):
            self._engine.step()

    def drop_gradients(self) -> None:
        """As DeepSpeed itself does after a step that it leaves out."""
        self._zero.zero_grad(set_to_none=True)
        if self._stage == 3:
            self._zero._partition_all_parameters()
        if self._offloaded:
            self._zero.reset_cpu_buffers()
            for place in self._places.values():
                if place.flat.grad is not None:
                    place.flat.grad.zero_()
        elif self._stage == 3:
            self._zero.averaged_gradients = {}
        else:
            for group in list(self._zero.averaged_gradients):
                self._zero.averaged_gradients[group] = None
                self._zero.all_grad_tensors[group] = None
        self._zero.micro_step_id = 0 if self._stage == 3 else -1

    def reset_optimizer(self) -> None:
        for state in self._inner.state.values():
            for value in state.values():
                value.zero_()

    def weights_changed(self) -> None:
        for name, parameter in self._parameters.items():
            place = self._places[name]
            if self._stage == 3:
                parameter.ds_tensor.data.reshape(-1)[: place.length].copy_(self.weights[name])
            else:
                whole = parameter.detach().reshape(-1)
                place.of(place.flat.detach()).copy_(whole[place.first : place.first + place.length])

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}": place.of(self._inner.state[place.flat][kind])
            for name, place in self._places.items()
            for kind in MOMENTS
            if kind in self._inner.state.get(place.flat, {})
        }

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        if not moments:
            return
        for flat in {id(place.flat): place.flat for place in self._places.values()}.values():
            for kind in MOMENTS:
                self._inner.state[flat].setdefault(kind, torch.zeros_like(flat))
            self._inner.state[flat]["step"] = torch.tensor(float(steps))
        for name, place in self._places.items():
            for kind in MOMENTS:
                place.of(self._inner.state[place.flat][kind]).copy_(moments[f"{name}.{kind}"].reshape(-1))


def _settings(asked: EngineSpec, stage: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own config: float32, one pass a step as far as it knows, nothing of its own on top."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "round_robin_gradients": False}
    zero["reduce_bucket_size"] = min(DEEPSPEED_BUCKET, parameters)  # a buffer of that size is filled in each step
    if asked.offload_optimizer:
        zero["offload_optimizer"] = host
    if asked.offload_parameters and stage == 3:
        zero["offload_param"] = host
    if stage == 3:
        zero["memory_efficient_linear"] = False  # it would replace torch's linear function in this process, for all
        zero["stage3_param_persistence_threshold"] = 0  # no rank keeps what it does not own
        for limit in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
            zero[f"stage3_{limit}"] = max(1, parameters // DEEPSPEED_LIVE)  # for long
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _initialised(name: Name, network: nn.Module, optimiser: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    cuda = next(network.parameters()).device.type == "cuda"
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        requirements.require(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what DeepSpeed uses of torch
            import deepspeed
            from deepspeed.utils import logger

            compatible = deepspeed.ops.__compatible_ops__
    except (LookupError, ImportError) as error:  # it wants transformers too, under Accelerate
        raise UserError(str(error), everywhere=True) from None
    logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", message=_OLD_NAMES, category=FutureWarning)
    if not cuda:  # gloo sums in rank order, and needs no compiler on the user's machine
        compatible["deepspeed_shm_comm"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimiser, config=settings, dist_init_required=False)
    if engine.zero_optimization_stage() != settings["zero_optimization"]["stage"]:
        raise UserError(
            f"ZeRO-{settings['zero_optimization']['stage']} was asked for, and DeepSpeed gave stage "
            f"{engine.zero_optimization_stage()}. Please report this with your launch file.",
            everywhere=True,
        )
    return engine
