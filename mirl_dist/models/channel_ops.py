"""Operations of the blocks in restormer.py whose order of computing was chosen for speed or memory.

Each docstring starts with the formula; the bodies compute it, and its gradient where autograd's would be slower or keep
more. `torch.overrides` can replace each of them by name, as SynFlow does.

Shape letters: B batch, C channels, P pixels, N heads, D channels per head (C = N * D), F hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import wrap_torch_function

Function = TypeVar("Function", bound=Callable[..., Tensor])

_EPS = 1e-12  # least length of a query or key, as in F.normalize
_WIDTH = 8  # channels: matrix products and vector instructions run up to twice as fast on multiples of it


def _overridable(function: Function) -> Function:
    """Let TorchFunctionMode and tensor subclasses replace a function of this module."""

    def tensors(*args: Any, **_: Any) -> list[Tensor]:
        return [value for value in args if isinstance(value, Tensor)]

    return cast(Function, wrap_torch_function(tensors)(function))


@_overridable
def pad_channels(weight: Tensor, dim: int) -> Tensor:
    """Append zeros in dimension `dim` of a weight until its size is a multiple of 8; results stay the same."""
    after = weight.ndim - 1 - dim
    missing = -weight.shape[dim] % _WIDTH
    return F.pad(weight, (*(0, 0) * after, 0, missing)) if missing else weight


@_overridable
def cosine_scores(queries_keys: Tensor, heads: int) -> Tensor:
    """normalize(queries)^T @ normalize(keys) per head, over the pixels: (B, P, 2C) to (B, N, D, D), float32 or wider.

    Lengths below 1e-12 count as 1e-12. Computed as the products of the raw channels, divided by their lengths: the
    normalised queries and keys are never stored.
    """
    scores: Tensor = _CosineScores.apply(queries_keys, heads)  # type: ignore[no-untyped-call]
    return scores


class _CosineScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries_keys: Tensor, heads: int) -> Tensor:
        queries, keys = queries_keys.chunk(2, dim=-1)
        lengths_q, lengths_k = (_lengths(part, heads) for part in (queries, keys))
        per_head = zip(queries.chunk(heads, -1), keys.chunk(heads, -1), strict=True)
        products = torch.stack([q.mT @ k for q, k in per_head], dim=1)
        scores = products / lengths_q.unsqueeze(-1) / lengths_k.unsqueeze(-2)
        ctx.save_for_backward(queries_keys, scores, lengths_q, lengths_k)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor, None]:
        queries_keys, scores, lengths_q, lengths_k = ctx.saved_tensors
        queries, keys = queries_keys.chunk(2, dim=-1)
        # A longer query changes no score: take away the part of its gradient along itself.
        along = grad_scores * scores
        along_q, along_k = _radial(along.sum(-1), lengths_q), _radial(along.sum(-2), lengths_k)
        products = (grad_scores / lengths_q.unsqueeze(-1) / lengths_k.unsqueeze(-2)).to(queries.dtype)
        parts = (part.chunk(products.shape[1], -1) for part in (queries, keys, along_q, along_k))
        per_head = list(zip(products.unbind(1), *parts, strict=True))
        grad_q = [torch.baddbmm((q * radial).to(q.dtype), k, product.mT) for product, q, k, radial, _ in per_head]
        grad_k = [torch.baddbmm((k * radial).to(k.dtype), q, product) for product, q, k, _, radial in per_head]
        return torch.cat((*grad_q, *grad_k), dim=-1), None


def _lengths(channels: Tensor, heads: int) -> Tensor:
    """Return the lengths of channels over the pixels, at least _EPS: (B, P, C) to (B, N, D)."""
    wide = torch.promote_types(channels.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(channels, dim=1, dtype=wide)
    return rearrange(lengths.clamp_min(_EPS), "b (n d) -> b n d", n=heads)


def _radial(along: Tensor, lengths: Tensor) -> Tensor:
    """Return the factor (B, 1, C) by which a channel enters its own gradient; 0 where its length counts as _EPS."""
    return torch.where(lengths > _EPS, -along / lengths.square(), 0.0).flatten(1).unsqueeze(1)


@_overridable
def mix_values(attention: Tensor, values: Tensor, projection: Tensor) -> Tensor:
    """projection @ (attention @ values): (B, N, D, D), (B, P, C), (C', C) to (B, P, C').

    With more pixels than channels, attention and projection are multiplied first: one product over the pixels, not two.
    """
    heads, attention, projection = attention.shape[1], attention.to(values.dtype), projection.to(values.dtype)
    if values.shape[1] < values.shape[2]:
        mixed = rearrange(values, "b p (n d) -> b n p d", n=heads) @ attention.mT
        return F.linear(rearrange(mixed, "b n p d -> b p (n d)"), projection)
    projected = rearrange(projection, "c (n d) -> n c d", n=heads) @ attention
    return values @ rearrange(projected, "b n c d -> b (n d) c")


@_overridable
def gated_projection(hidden: Tensor, projection: Tensor) -> Tensor:
    """projection @ (gelu(gate) * value), where gate, value = halves of `hidden`: (B, H, W, 2F), (C, F) to (B, H, W, C).

    GELU is the exact one (erf). Only `hidden` is kept for the backward pass, which computes the rest again.
    """
    out: Tensor = _GatedProjection.apply(hidden, projection.to(hidden.dtype))  # type: ignore[no-untyped-call]
    return out


class _GatedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, projection: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, projection)
        gate, value = hidden.chunk(2, dim=-1)
        return F.linear(F.gelu(gate.contiguous()).mul_(value), projection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        hidden, projection = ctx.saved_tensors
        gate, value = hidden.chunk(2, dim=-1)
        gate = gate.contiguous()
        active = F.gelu(gate)
        grad_projection = grad_out.flatten(0, -2).mT @ (active * value).flatten(0, -2)
        grad_gated = grad_out @ projection
        grad_value = active.mul_(grad_gated)
        grad_gate = torch.ops.aten.gelu_backward(grad_gated.mul_(value), gate)
        return torch.cat((grad_gate, grad_value), dim=-1), grad_projection
