"""DeepSpeed's ZeRO: shards moments (stage 1), also gradients (2), also weights (3) over the ranks.

DeepSpeed runs the passes, averages gradients and updates weights. Masking, clipping, learning rates and states are
handled here, on the shard that this rank owns. DeepSpeed's checkpoints are not used: states are named tensors under
every engine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines import sharding
from mirl_dist.distributed.engines.base import MOMENTS, Collectives, MakeOptimiser, step_count
from mirl_dist.distributed.engines.sharding import ShardLayout
from mirl_dist.distributed.engines.spec import EngineSpec
from mirl_dist.errors import InvariantError, UserError
from mirl_dist.pruning.partition import Partition

DEEPSPEED_BUCKET = 50_000_000
"""Upper limit of DeepSpeed's gradient reduction bucket, in weights; smaller networks get a bucket of their own size."""
DEEPSPEED_LIVE = 8
"""ZeRO-3: up to 1/DEEPSPEED_LIVE of the network may be gathered in addition to the layer in use."""
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


class _OwnedSlice(NamedTuple):
    """The owned part of a parameter: `length` elements of `flat` from `begin` on.

    first: flat index of the part in the whole parameter.
    """

    flat: Tensor
    begin: int
    length: int
    first: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.begin, self.length)


class ZeroEngine:
    """ShardedEngine of DeepSpeed. In stages 1 and 2 `weights` are replicated; moments and gradients are sharded.

    DeepSpeed keeps everything that a rank owns in one flat float32 tensor and passes that to the optimiser; each
    parameter is a slice of it.
    """

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
        self._collectives, self._offloaded = collectives, spec.offload_optimizer
        sharded = spec.name == "zero3"
        self.partition = Partition(rank, world, is_replicated=not sharded)
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        optimiser = make_optimiser(dict(network.named_parameters()))
        with collectives.collective("sharding of the network"):
            settings = _deepspeed_config(spec, sum(p.numel() for p in network.parameters()))
            self.network: Any = _initialize(_AutocastNetwork(network, half), optimiser, settings)
        self._parameters: dict[str, Any] = dict(network.named_parameters())
        slices = {name: self._find_slice(p) for name, p in self._parameters.items()}
        lengths = [owned.length for owned in slices.values()]
        self.owned_layout = sharding.shard_layout(shapes, rank, lengths, collectives.gather)
        exact = self.owned_layout.lengths[rank]
        self._slices = {name: owned._replace(length=exact[name]) for name, owned in slices.items()}
        self._masks: dict[str, Tensor] = {}
        self.layout = self.owned_layout if self._is_stage_3 else ShardLayout(shapes)
        self.weights: dict[str, Tensor] = {name: p.detach() for name, p in self._parameters.items()}
        if self._is_stage_3:
            self.weights = {name: owned.of(owned.flat.detach()) for name, owned in self._slices.items()}

    @property
    def runs_ahead(self) -> bool:
        return False  # DeepSpeed's step has no gate on the device

    @property
    def _is_stage_3(self) -> bool:
        return not self.partition.is_replicated

    @property
    def _deepspeed(self) -> Any:
        """DeepSpeed's optimiser, around that of torch."""
        return self.network.optimizer

    def _find_slice(self, parameter: Any) -> _OwnedSlice:
        """Return a parameter's slice. In stage 3 its length includes the padding at the end of a rank's part."""
        if self._is_stage_3:
            group, begin, length = self._deepspeed.grad_position[self._deepspeed.get_param_id(parameter)]
            return _OwnedSlice(self._deepspeed.fp32_partitioned_groups_flat[group], begin, length, 0)
        flat = self._deepspeed.single_partition_of_fp32_groups[0]
        mapping = parameter._hp_mapping
        if mapping is None:  # the parameter is owned entirely by other ranks
            return _OwnedSlice(flat, 0, 0, 0)
        inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _OwnedSlice(flat, inside.start, inside.numel, whole.start)

    def accumulate(self, more: bool) -> None:
        self.network.set_gradient_accumulation_boundary(not more)

    def backward(self, loss: Tensor) -> None:
        self.network.backward(loss)

    def _gradients(self) -> dict[str, Tensor]:
        """Return the averaged gradients that this rank owns, without copying."""
        if self._offloaded and torch.cuda.is_available():
            torch.cuda.synchronize()  # DeepSpeed copies them to the host asynchronously (0.19.8)
        return {name: self._gradient(parameter, self._slices[name]) for name, parameter in self._parameters.items()}

    def _gradient(self, parameter: Any, owned: _OwnedSlice) -> Tensor:
        if self._offloaded:
            assert owned.flat.grad is not None
            return owned.of(owned.flat.grad)
        if self._is_stage_3:
            part: Tensor = self._deepspeed.get_local_fp32_grad_for_param(parameter)
        elif parameter._hp_mapping is None:
            return owned.of(owned.flat.detach())
        else:
            part = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return part.reshape(-1)[: owned.length]

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = sharding.owned_masks(masks, self.layout, self.owned_layout)

    def mask_gradients(self) -> None:
        sharding.mask_gradients(self._gradients(), self._masks)

    def clip(self, max_norm: float | None) -> Tensor:
        return sharding.clip_gradients(self._gradients(), max_norm, self._collectives.gather)

    def step(self, lr: float, refused: Tensor) -> None:
        if bool(refused):
            self._drop_gradients()
            return
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        with self._collectives.collective("update of the weights"):
            self.network.step()

    def _drop_gradients(self) -> None:
        """Clear the gradients in the way DeepSpeed does after a skipped step."""
        self._deepspeed.zero_grad(set_to_none=True)
        if self._is_stage_3:
            self._deepspeed._partition_all_parameters()
        if self._offloaded:
            self._deepspeed.reset_cpu_buffers()
            for owned in self._slices.values():
                if owned.flat.grad is not None:
                    owned.flat.grad.zero_()
        elif self._is_stage_3:
            self._deepspeed.averaged_gradients = {}
        else:
            for group in list(self._deepspeed.averaged_gradients):
                self._deepspeed.averaged_gradients[group] = None
                self._deepspeed.all_grad_tensors[group] = None
        self._deepspeed.micro_step_id = 0 if self._is_stage_3 else -1

    def reset_optimizer(self) -> None:
        """Set moments and step counts to zero in place."""
        for state in self._deepspeed.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def weights_changed(self) -> None:
        """Copy `weights` to DeepSpeed's second copy: parameter partitions in stage 3, else the flat float32 tensor."""
        for name, parameter in self._parameters.items():
            owned = self._slices[name]
            if self._is_stage_3:
                parameter.ds_tensor.data.reshape(-1)[: owned.length].copy_(self.weights[name])
            else:
                whole = self.weights[name].reshape(-1)
                owned.of(owned.flat.detach()).copy_(whole[owned.first : owned.first + owned.length])

    def moments(self) -> dict[str, Tensor]:
        state = self._deepspeed.optimizer.state
        return {
            f"{name}.{kind}": owned.of(state[owned.flat][kind])
            for name, owned in self._slices.items()
            for kind in MOMENTS
            if kind in state.get(owned.flat, {})
        }

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Load moments and the step count `steps`. Do nothing if `moments` is empty, as before the first update."""
        if not moments:
            return
        state = self._deepspeed.optimizer.state
        for flat in {id(owned.flat): owned.flat for owned in self._slices.values()}.values():
            for kind in MOMENTS:
                state[flat].setdefault(kind, torch.zeros_like(flat))
            state[flat]["step"] = step_count(steps, self._deepspeed.optimizer, flat)
        for name, owned in self._slices.items():
            for kind in MOMENTS:
                owned.of(state[owned.flat][kind]).copy_(moments[f"{name}.{kind}"].reshape(-1))


def _deepspeed_config(spec: EngineSpec, parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's config: float32, one pass per step from its point of view, no clipping of its own."""
    stage = int(spec.name.removeprefix("zero"))
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


def _initialize(network: nn.Module, optimiser: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    cuda = next(network.parameters()).device.type == "cuda"
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed uses deprecated parts of torch
            import deepspeed
            from deepspeed.utils import logger
    except ImportError as error:  # under Accelerate it also imports transformers
        raise UserError(str(error), everywhere=True) from None
    logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", message=_OLD_NAMES, category=FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if not cuda:  # use gloo: it sums in rank order and needs no compiler. On GPUs reading this probes every op.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimiser, config=settings, dist_init_required=False)
    stage, given = settings["zero_optimization"]["stage"], engine.zero_optimization_stage()
    if given != stage:
        raise InvariantError(
            f"ZeRO-{stage} was requested, but DeepSpeed set up stage {given}. Please report it with your launch file.",
            everywhere=True,
        )
    return engine
