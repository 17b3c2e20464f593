"""SynFlow: how much flows through each weight when nothing can cancel, without data. Tanaka et al. 2020, 2006.05467.

R is the sum of the outputs for an image of ones with every parameter replaced by its absolute value; a weight's score
is |w| dR/d|w|. In the paper's networks each layer passes on what it receives (theorems 1 and 2): a tensor of which few
weights are left has all its flow in them. With many small cuts, each scored anew, none is emptied before it must be
(theorem 3, algorithm 1).

A restoration transformer is no such network: R overflows (gates multiply), norms subtract, a normalised or gated signal
counts never or twice. So while scoring, by value as the network has it, by derivative as a network of the paper:
- a layer norm divides by the root mean square over channels, held constant, and subtracts no mean; unit vectors are
  divided by their length, held constant (the paper's batch norms divide by constants too);
- GELU and softmax multiply their input by output / input, held constant;
- a product of two signals (gate x value, query x key, attention x value, shares x prompts) passes half to each;
- every convolution and linear map is divided by its output's mean, held constant. This alters no order in a chain of
  layers; beside a skip connection it keeps the absolute values of the trunk from drowning the blocks.
The first two and the halves are rules of conservative relevance propagation in transformers: Ali et al. 2022,
arXiv 2202.07304; Achtibat et al. 2024, arXiv 2402.05602. Then no score is negative, and what enters by the first
convolution, prompts and biases is R, is what leaves by the last convolution. On convolutions and ReLU alone the scores
are the paper's up to one factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mirl_dist.errors import UserError
from mirl_dist.pruning.partition import ReplicatedPartition, count_weights
from mirl_dist.pruning.prune import PruneConfig, PruneGroup, PruneResult, form_groups, select
from mirl_dist.pruning.quantile import single_rank


def iterate(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    config: PruneConfig,
    image_shape: Sequence[int] = (1, 3, 64, 64),
    before_step: Callable[[], None] = lambda: None,
) -> PruneResult:
    """New masks after `config.iterations` steps, each of which scores what is left and cuts the weakest.

    The surviving share falls exponentially from 1 to what `prune` would leave; the counts at the end are exactly those.
    network: its weights are neither read nor changed; weights: all its parameters by name, of which the absolute values
    count; masks, config: as for `prune`; image_shape: (1, 3, H, W); before_step: called before each, may raise.
    `threshold` is that of the last step.
    The same bits whenever called on the same machine. Raises UserError as `prune` does.
    """
    groups = form_groups(count_weights(masks, ReplicatedPartition(), single_rank), config)
    surviving = [sum(int(masks[n].sum()) for n in group.names) for group in groups]
    removed = [0] * len(groups)
    pruned = select(masks.__getitem__, masks, [PruneGroup(group.names, 0) for group in groups])
    for step in range(1, config.iterations + 1):
        due = [_removed_after(step, config.iterations, n, group.k) for n, group in zip(surviving, groups, strict=True)]
        if due == removed:
            continue
        step_groups = [PruneGroup(g.names, d - before) for g, d, before in zip(groups, due, removed, strict=True)]
        before_step()
        step_scores = scores(network, weights, pruned.masks, image_shape)
        flat = {n: s.reshape(-1) for n, s in step_scores.items()}
        pruned, removed = select(flat.__getitem__, pruned.masks, step_groups, config.floor), due
    return pruned._replace(removed=sum(removed))


def _removed_after(step: int, steps: int, surviving: int, k: int) -> int:
    """How many of `surviving` weights are gone after a step, when k go in all and the rest falls exponentially."""
    if step == steps or k == 0:
        return k
    kept = surviving * math.pow((surviving - k) / surviving, step / steps)
    return min(k, surviving - math.ceil(kept))


def scores(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    image_shape: Sequence[int] = (1, 3, 64, 64),
) -> dict[str, Tensor]:
    """|w| dR/d|w| of every masked tensor: float32 of its shape, at most R, which is about 3 H W.

    A weight that lies on no path of surviving weights has 0, and every pruned one. Raises UserError for NaN or inf.
    """
    values = {n: w.detach().double().abs() for n, w in weights.items()}
    values |= {n: values[n].masked_fill(~mask.to(values[n].device), 0.0) for n, mask in masks.items()}
    for value in values.values():
        value.requires_grad_()
    device = next(iter(values.values())).device
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), _Conserving():
        image = torch.ones(tuple(image_shape), dtype=torch.float64, device=device)
        total = torch.func.functional_call(network, values, (image,)).sum()
    if not bool(total.isfinite()):
        raise UserError("found NaN or infinite first values, where SynFlow scored them. Give others in model.weights.")
    names = sorted(masks)
    slopes = torch.autograd.grad(total, [values[n] for n in names], allow_unused=True)
    flows = {n: _flow(values[n].detach(), slope) for n, slope in zip(names, slopes, strict=True)}
    return {n: flow.float().to(masks[n].device) for n, flow in flows.items()}


def _flow(value: Tensor, slope: Tensor | None) -> Tensor:
    if slope is None:
        return torch.zeros_like(value)
    assert bool((slope >= 0).all()), "the network does something that falls with its input"
    return value * slope


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    normed = x / (x.square().mean(axes, keepdim=True) + eps).sqrt().detach()
    scaled = normed if weight is None else normed * weight
    return scaled if bias is None else scaled + bias


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, p, dim, keepdim=True)
    return x / length.clamp_min(eps).detach()


def _conv2d(*args: Any, **kwargs: Any) -> Tensor:
    return _unit(torch.conv2d(*args, **kwargs))


def _linear(*args: Any, **kwargs: Any) -> Tensor:
    return _unit(F.linear(*args, **kwargs))


def _unit(x: Tensor) -> Tensor:
    """x over its mean; x itself where all is 0."""
    mean = x.detach().mean()
    return x / torch.where(mean > 0, mean, 1.0)


def _softmax(x: Tensor, dim: int) -> Tensor:
    return _in_proportion(x, x.softmax(dim))


def _gelu(x: Tensor) -> Tensor:
    return _in_proportion(x, F.gelu(x))


def _in_proportion(x: Tensor, y: Tensor) -> Tensor:
    """y as a multiple of x (>= 0); where x is 0, a constant."""
    some = x > 0
    return torch.where(some, x * (y / x.where(some, 1.0)).detach(), y.detach())


def _mul(a: Tensor, b: Tensor) -> Tensor:
    return _half(a, b) * _half(b, a)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _half(a, b) @ _half(b, a)


def _half(x: Tensor, other: Tensor) -> Tensor:
    """x, through which half of what flows passes where the other factor is computed too, and no parameter."""
    both = all(t.requires_grad and not t.is_leaf for t in (x, other))
    return 0.5 * x + (0.5 * x).detach() if both else x


_CONSERVED: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.normalize: _normalize,
    F.gelu: _gelu,
    F.linear: _linear,
    torch.conv2d: _conv2d,
    torch.Tensor.softmax: _softmax,
    torch.Tensor.mul: _mul,
    torch.Tensor.matmul: _matmul,
}
"""What the networks call -> what takes its place."""


class _Conserving(TorchFunctionMode):
    """While it is entered, on this thread, the functions of `_CONSERVED` are replaced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _CONSERVED.get(func, func)(*args, **(kwargs or {}))
