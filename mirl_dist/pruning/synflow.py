"""SynFlow scores and pruning, without data: Tanaka et al. 2020, arXiv 2006.05467.

R is the sum of the outputs for an image of ones with every parameter replaced by its absolute value; the score of a
weight is |w| dR/d|w|. In the paper's networks each layer conserves the total score (theorems 1 and 2), so the few
surviving weights of a tensor carry its whole score. With many small pruning steps, each with new scores, no tensor
loses all weights before it must (theorem 3, algorithm 1).

Restoration transformers do not conserve the score: R overflows (gates multiply), norms subtract, and a normalised or
gated signal is counted zero times or twice. While scoring, these operations are therefore replaced:
- layer norm divides by the root mean square over channels, a constant for autograd, and subtracts no mean; unit vectors
  are divided by their length, a constant too (as the paper's batch norms divide by constants);
- GELU and softmax multiply their input by the constant output / input;
- a product of two signals (gate x value, query x key, attention x value, shares x prompts) passes half of the gradient
  to each;
- every convolution and linear map is divided by the mean of its output, a constant. In a chain of layers this changes
  no order; next to a skip connection it keeps the large values of the trunk from dominating the blocks.
The first two rules and the halves are those of conservative relevance propagation in transformers: Ali et al. 2022,
arXiv 2202.07304; Achtibat et al. 2024, arXiv 2402.05602. With them no score is negative, and the total score of the
first convolution, prompts and biases equals R, and so does that of the last convolution. For networks of convolutions
and ReLU only, the scores equal the paper's up to a common factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mirl_dist.errors import UserError
from mirl_dist.models import channel_ops
from mirl_dist.pruning.partition import WHOLE, count_weights
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
    """Return new masks after `config.iterations` steps, each of which scores the survivors and prunes the weakest.

    The surviving share falls exponentially to that of `prune`; the final counts are exactly those of `prune`.
    network: its weights are neither read nor changed; weights: all its parameters by name; masks, config: as for
    `prune`; image_shape: (1, 3, H, W); before_step: called before each step, may raise.
    `threshold` of the result is that of the last step. Deterministic on one machine. Raises UserError like `prune`.
    """
    groups = form_groups(count_weights(masks, WHOLE, single_rank), config)
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
    """Return how many of `surviving` weights are removed after `step` of `steps`, k in total, for exponential decay."""
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
    """Return |w| dR/d|w| of every masked tensor: float32 of its shape, in [0, R], where R is about 3 H W.

    Pruned weights, and weights on no path of surviving weights, score 0. Raises UserError for NaN or inf.
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
    slopes = torch.autograd.grad(total, [values[n] for n in names], materialize_grads=True)
    assert all(bool((slope >= 0).all()) for slope in slopes), "the network does something that falls with its input"
    flows = {n: values[n].detach() * slope for n, slope in zip(names, slopes, strict=True)}
    return {n: flow.float().to(masks[n].device) for n, flow in flows.items()}


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


def _unit(x: Tensor) -> Tensor:
    """Return x divided by its mean (a constant); x itself if it is all zero."""
    mean = x.detach().mean()
    return x / torch.where(mean > 0, mean, 1.0)


def _in_proportion(x: Tensor, y: Tensor) -> Tensor:
    """Return y as x (>= 0) times a constant; where x is 0, y is a constant."""
    some = x > 0
    return torch.where(some, x * (y / x.where(some, 1.0)).detach(), y.detach())


def _half(x: Tensor, other: Tensor) -> Tensor:
    """Return x, with half of its gradient if both factors are activations (neither a parameter nor constant)."""
    both = all(isinstance(t, Tensor) and t.requires_grad and not t.is_leaf for t in (x, other))
    return 0.5 * x + (0.5 * x).detach() if both else x


def _linear(*args: Any, **kwargs: Any) -> Tensor:
    return _unit(F.linear(*args, **kwargs))


def _mul(a: Tensor, b: Tensor) -> Tensor:
    return _half(a, b) * _half(b, a)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _half(a, b) @ _half(b, a)


def _cosine_scores(queries_keys: Tensor, heads: int) -> Tensor:
    queries, keys = rearrange(queries_keys, "b p (two n d) -> two b n d p", two=2, n=heads)
    return _matmul(_normalize(queries, dim=-1), _normalize(keys, dim=-1).mT)


def _mix_values(attention: Tensor, values: Tensor, projection: Tensor) -> Tensor:
    mixed = _matmul(attention, rearrange(values, "b p (n d) -> b n d p", n=attention.shape[1]))
    return _linear(rearrange(mixed, "b n d p -> b p (n d)"), projection)


def _gated_projection(hidden: Tensor, projection: Tensor) -> Tensor:
    gate, value = hidden.chunk(2, dim=-1)
    return _linear(_mul(_in_proportion(gate, F.gelu(gate)), value), projection)


_CONSERVED: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    torch.conv2d: lambda *args, **kwargs: _unit(torch.conv2d(*args, **kwargs)),
    torch.Tensor.softmax: lambda x, dim: _in_proportion(x, x.softmax(dim)),
    torch.Tensor.mul: _mul,
    torch.Tensor.matmul: _matmul,
    channel_ops.pad_channels: lambda weight, dim: weight,  # zeros would change the mean of an output
    channel_ops.cosine_scores: _cosine_scores,
    channel_ops.mix_values: _mix_values,
    channel_ops.gated_projection: _gated_projection,
}
"""Function that the networks call -> its replacement while scoring."""


class _Conserving(TorchFunctionMode):
    """Context that replaces the functions of `_CONSERVED` on the current thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _CONSERVED.get(func, func)(*args, **(kwargs or {}))
