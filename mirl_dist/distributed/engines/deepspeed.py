"""DeepSpeed's ZeRO: shards moments (stage 1), also gradients (2), also weights (3) over the ranks.

DeepSpeed runs the passes, averages gradients and updates weights. Masking, clipping, learning rates and states are
handled here, on the shard that this rank owns (zero_shard.py). DeepSpeed's checkpoints are not used: states are named
tensors under every engine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines import requirements, sharded_gradients
from mirl_dist.distributed.engines.base import Collectives, EngineSpec, MakeOptimiser, Name
from mirl_dist.distributed.engines.sharding import ShardLayout, shard_layout
from mirl_dist.distributed.engines.zero_shard import ZeroShard
from mirl_dist.errors import InvariantError, UserError
from mirl_dist.pruning.partition import Partition

DEEPSPEED_BUCKET = 50_000_000
"""Upper limit of DeepSpeed's gradient reduction bucket, in weights; smaller networks get a bucket of their own size."""
DEEPSPEED_LIVE = 8
"""ZeRO-3: up to 1/DEEPSPEED_LIVE of the network may be gathered in addition to the layer in use."""
_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_OLD_NAMES = r"`torch.distributed.\w+` is deprecated"  # collectives that DeepSpeed and FSDP2 still call (torch 2.13)


class _AutocastNetwork(nn.Module):
    """The network under autocast, entered inside the module because DeepSpeed disables an outer autocast."""

    def __init__(self, network: nn.Module, half: bool) -> None:
        super().__init__()
        self.network, self._half = network, half

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self._half):
            restored: Tensor = self.network(images)
        return restored


class ZeroEngine:
    """ShardedEngine of DeepSpeed. In stages 1 and 2 `weights` are replicated; moments and gradients are sharded."""

    def __init__(
        self,
        network: nn.Module,
        make_optimiser: MakeOptimiser,
        spec: EngineSpec,
        rank: int,
        world: int,
        collectives: Collectives,
        half: bool,
    ) -> None:
        """network: equal weights on every rank, on this rank's device; modified by DeepSpeed. half: use bfloat16."""
        self._collectives, stage = collectives, _STAGES[spec.name]
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        optimiser = make_optimiser(dict(network.named_parameters()))
        with collectives.collective("sharding of the network"):
            settings = _deepspeed_config(spec, stage, sum(p.numel() for p in network.parameters()))
            self.network: Any = _initialize(spec.name, _AutocastNetwork(network, half), optimiser, settings)
        self._shard = ZeroShard(network, self.network.optimizer, stage, offloaded=spec.offload_optimizer)
        padded = torch.tensor(self._shard.lengths(), dtype=torch.int64)
        lengths = collectives.gather(padded, what="gather of shard sizes").tolist()
        self.owned_layout = shard_layout(shapes, rank, [dict(zip(shapes, row, strict=True)) for row in lengths])
        self._shard.drop_padding(self.owned_layout.lengths[rank])
        self.layout = self.owned_layout if stage == 3 else ShardLayout(shapes)
        self.partition = Partition(rank, world, is_replicated=stage != 3)
        self.weights = self._shard.weights()

    def accumulate(self, more: bool) -> None:
        self.network.set_gradient_accumulation_boundary(not more)

    def backward(self, loss: Tensor) -> None:
        self.network.backward(loss)

    def mask_gradients(self, masks: Mapping[str, Tensor]) -> None:
        sharded_gradients.mask(self._shard.gradients(), masks, self.layout, self.owned_layout)

    def clip(self, max_norm: float | None) -> Tensor:
        return sharded_gradients.clip(self._shard.gradients(), max_norm, self._collectives)

    def step(self, lr: float) -> None:
        self._shard.set_rate(lr)
        with self._collectives.collective("update of the weights"):
            self.network.step()

    def drop_gradients(self) -> None:
        self._shard.drop_gradients()

    def reset_optimizer(self) -> None:
        self._shard.reset_optimizer()

    def weights_changed(self) -> None:
        self._shard.copy_weights(self.weights)

    def moments(self) -> dict[str, Tensor]:
        return self._shard.moments()

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        self._shard.load_moments(moments, steps)


def _deepspeed_config(spec: EngineSpec, stage: int, parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's config: float32, one pass per step from its point of view, no clipping of its own."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "round_robin_gradients": False}
    zero["reduce_bucket_size"] = min(DEEPSPEED_BUCKET, parameters)  # a buffer of this size is filled in each step
    if spec.offload_optimizer:
        zero["offload_optimizer"] = host
    if spec.offload_parameters and stage == 3:
        zero["offload_param"] = host
    if stage == 3:
        zero["memory_efficient_linear"] = False  # it would replace torch's linear function in the whole process
        zero["stage3_param_persistence_threshold"] = 0  # ranks keep no parameters that they do not own
        for limit in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
            zero[f"stage3_{limit}"] = max(1, parameters // DEEPSPEED_LIVE)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _initialize(name: Name, network: nn.Module, optimiser: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    cuda = next(network.parameters()).device.type == "cuda"
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        requirements.require(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed uses deprecated parts of torch
            import deepspeed
            from deepspeed.utils import logger

            compatible = deepspeed.ops.__compatible_ops__
    except (LookupError, ImportError) as error:  # under Accelerate it also imports transformers
        raise UserError(str(error), everywhere=True) from None
    logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", message=_OLD_NAMES, category=FutureWarning)
    if not cuda:  # use gloo: it sums in rank order and needs no compiler on the user's machine
        compatible["deepspeed_shm_comm"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimiser, config=settings, dist_init_required=False)
    if engine.zero_optimization_stage() != settings["zero_optimization"]["stage"]:
        raise InvariantError(
            f"ZeRO-{settings['zero_optimization']['stage']} was asked for, and DeepSpeed gave stage "
            f"{engine.zero_optimization_stage()}. Please report this with your launch file.",
            everywhere=True,
        )
    return engine
