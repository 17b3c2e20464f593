"""Estimates the GPU memory of a run without a GPU.

Activations are counted on torch's `meta` device, whose tensors have shapes and dtypes but no data: the bytes that
autograd saves in a forward pass, and the peak of live bytes during forward and backward. The rest is arithmetic:
float32 weights, gradients and two moments take 4 + 4 + 8 bytes per weight, sharded over W ranks according to the engine
(ZeRO: Rajbhandari et al., SC 2020, figure 1).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mirl_dist import models
from mirl_dist.distributed.engines.deepspeed import DEEPSPEED_BUCKET, DEEPSPEED_LIVE
from mirl_dist.distributed.engines.spec import EngineName
from mirl_dist.errors import UserError
from mirl_dist.models import channel_ops
from mirl_dist.pruning.prune import in_scope
from mirl_dist.training import losses

GIB = 2**30
GPUS: dict[str, float] = {"A40": 44.3, "A100-40": 39.4, "A100-80": 79.1, "H100": 79.1, "H200": 139.8}
"""GiB that CUDA makes available to programs; less than the nominal size."""
OVERHEAD = 3 * GIB // 2
"""Bytes of CUDA's context, NCCL's buffers and cuDNN's workspaces; an assumption, since they cannot be counted here."""

_BF16_OPS = ("conv2d", "linear", "matmul", "__matmul__")
_FP32_OPS = {"cuda": ("layer_norm", "softmax", "normalize"), "cpu": ()}  # torch's lists, limited to our networks' ops


class Size(NamedTuple):
    """Numbers of weights of a network: all, prunable, and gathered at once by FSDP.

    unit: the largest block of any sequence of blocks, plus all weights outside such blocks.
    """

    weights: int
    prunable: int
    unit: int


class Pass(NamedTuple):
    """Bytes of one forward and backward pass: saved for backward, and the peak of live bytes beyond these."""

    saved: int
    working: int


class Passes(NamedTuple):
    """Bytes of a pass over n samples: what any pass saves, and n times what each sample saves and works with."""

    fixed: int
    per_sample: Pass

    def of(self, samples: int) -> Pass:
        return Pass(self.fixed + samples * self.per_sample.saved, samples * self.per_sample.working)


class Budget(NamedTuple):
    """Bytes on one rank's GPU by name, in display order, and bytes on its host."""

    gpu: dict[str, int]
    host: int

    @property
    def total(self) -> int:
        return sum(self.gpu.values())


def size_of(name: str, sizes: Mapping[str, Any], scope: str | tuple[str, ...]) -> Size:
    """Count a network's weights without allocating them.

    name, sizes: as for `models.create`. scope: as for `in_scope`.
    """
    with torch.device("meta"):
        model = models.create(name, **sizes)
    counts = {n: p.numel() for n, p in model.named_parameters()}
    rows = [row for row in model.modules() if type(row) in (nn.Sequential, nn.ModuleList)]
    blocks = [
        sum(p.numel() for p in block.parameters()) for row in rows for block in row.children() if any(block.children())
    ]
    unit = sum(counts.values()) - sum(blocks) + max(blocks, default=0)
    return Size(sum(counts.values()), sum(counts[n] for n in in_scope(counts, scope)), unit)


def state_bytes(size: Size, engine: EngineName, world: int, *, offload: bool = False) -> Budget:
    """Return an upper bound of the bytes of weights, gradients, moments and masks on one of `world` ranks.

    ddp: everything is replicated, with buckets as large as the gradients. zero1, zero2, zero3: moments, then also
    gradients, then also weights are sharded to 1/world; DeepSpeed adds its copy of the weights that the rank updates,
    and a bucket. fsdp: everything is sharded. If weights are sharded, one unit is gathered with its gradients; zero3
    keeps 1/DEEPSPEED_LIVE of the weights besides. offload: moments and DeepSpeed's copy are on the host; with fsdp also
    weights and gradients.
    """
    whole, part = 4 * size.weights, -(-4 * size.weights // world)
    keeps_weights, keeps_gradients = engine in ("ddp", "zero1", "zero2"), engine in ("ddp", "zero1")
    gpu = {
        "weights": whole if keeps_weights else part,
        "gradients": whole if keeps_gradients else part,
        "moments": 2 * (whole if engine == "ddp" else part),
        "masks": size.prunable if keeps_weights else -(-size.prunable // world),
    }
    if engine == "ddp":
        gpu["masks"] += 4 * size.prunable  # the float32 factors of the gradients
    if engine.startswith("zero"):
        gpu |= {"DeepSpeed's copy of weights": part, "DeepSpeed's bucket": min(whole, 4 * DEEPSPEED_BUCKET)}
    if engine == "ddp" and world > 1:
        gpu["buckets"] = whole
    if not keeps_weights and world > 1:
        gpu["gathered for use"] = 8 * size.unit + (whole // DEEPSPEED_LIVE if engine == "zero3" else 0)
    host = 0
    if offload:
        names = ("weights", "gradients", "moments") if engine == "fsdp" else ("moments", "DeepSpeed's copy of weights")
        host = sum(gpu.pop(name, 0) for name in names)
    return Budget(gpu, host)


def largest_forward(passes: Passes, taken: int, room: int, per_rank: int) -> int:
    """Return the largest batch.forward that fits, a divisor of `per_rank`; 0 if none fits.

    taken: bytes in use without the pass. room: bytes available in total.
    """
    divisors = (n for n in range(per_rank, 0, -1) if per_rank % n == 0)
    return next((n for n in divisors if taken + sum(passes.of(n)) <= room), 0)


class Gpu(NamedTuple):
    """A GPU: its name, and the bytes available to programs."""

    name: str
    bytes: int


def gpu_of(name: str) -> Gpu:
    """Return the entry of GPUS with that name, ignoring case. Raises UserError for an unknown name."""
    for known, gib in GPUS.items():
        if known.casefold() == name.casefold():
            return Gpu(known, int(gib * GIB))
    raise UserError(f"--gpu: found '{name}'. Give one of {', '.join(GPUS)}.")


# -- activations --------------------------------------------------------------------------------------------------


def passes_of(name: str, sizes: Mapping[str, Any], side: int, precision: str, kind: str = "cuda") -> Passes:
    """Count the bytes of passes over patches of side x side pixels.

    Extrapolates from passes with two and three samples; with one sample, tensors have a different memory layout.
    precision: as in the config. kind: 'cuda' or 'cpu', whose autocast rules and order of computing are counted.
    """
    with torch.device("meta"), channel_ops.meta_stands_for(kind):
        model = models.create(name, **sizes)
        losses_of = [loss_of(model, torch.rand(samples, 3, side, side), precision, kind) for samples in (2, 3)]
        two, three_saved = measure_pass(model, losses_of[0]), saved_bytes(losses_of[1], model)
    each = Pass(three_saved - two.saved, -(-two.working // 2))
    return Passes(max(0, two.saved - 2 * each.saved), each)


def loss_of(model: nn.Module, images: Tensor, precision: str, kind: str) -> Callable[[], Tensor]:
    """Return the training loss of images (B, 3, H, W) on `meta`, as a function; bf16 with the autocast of `kind`."""

    def loss() -> Tensor:
        with _Autocast(kind) if precision == "bf16" else nullcontext():
            restored = model(images)
        return losses.per_sample_l1(restored, images).mean()

    return loss


def measure_pass(model: nn.Module, loss: Callable[[], Tensor]) -> Pass:
    """Count the bytes of one forward and backward pass. `working` includes the gradients of the weights."""
    saved = saved_bytes(loss, model)
    live = _LiveBytes({_storage_id(p) for p in model.parameters()})
    with live:
        loss().backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return Pass(saved, max(0, live.peak - saved))


def saved_bytes(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Count the bytes that autograd saves in a forward pass for the backward pass, without the parameters."""
    own = {_storage_id(p) for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage_id(tensor) not in own:
            saved[_storage_id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = loss()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del output
    return total


def scoring_bytes(name: str, sizes: Mapping[str, Any], height: int, width: int) -> int:
    """Count the peak bytes of restoring one image of height x width in float32, weights and image included."""
    with torch.device("meta"):
        model = models.create(name, **sizes)
        image = torch.rand(1, 3, height, width)
    live = _LiveBytes({_storage_id(p) for p in model.parameters()})
    with torch.no_grad(), live:
        model(image)
    weights_and_image: int = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), image))
    return live.peak + weights_and_image


def _storage_id(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of storages created inside, until they are freed; `own` is not counted. peak: the maximum."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now: int = 0
        self._sizes: dict[int, int] = dict.fromkeys(own, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [a for a in args if isinstance(a, Tensor)]
        for tensor in inputs:  # storages from outside count as 0 bytes
            self._sizes.setdefault(_storage_id(tensor), 0)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and _storage_id(tensor) not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[_storage_id(tensor)] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._on_freed, _storage_id(tensor))
        self.peak = max(self.peak, self._now)
        return out

    def _on_freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


class _Autocast(TorchFunctionMode):
    """Emulates autocast to bfloat16 on `meta`, which torch lacks: the same casts, with cached copies of weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._fp32_ops = _FP32_OPS[kind]
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _BF16_OPS or name in self._fp32_ops:
            to = torch.bfloat16 if name in _BF16_OPS else torch.float32
            args = [self._cast(a, to) for a in args]
            kwargs = {key: self._cast(value, to) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any, to: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == to:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(to)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(to)
        return self._copies[id(value)]
