"""Operations of the blocks in restormer.py whose order of computing was chosen for speed or memory.

Each docstring starts with the formula; the bodies compute it, and its gradient where autograd's would be slower or keep
more. `torch.overrides` can replace each of them by name, as SynFlow does.

Shape letters: B batch, C channels, P pixels, N heads, D channels per head (C = N * D), F hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import wrap_torch_function

Function = TypeVar("Function", bound=Callable[..., Tensor])

_EPS = 1e-12  # least length of a query or key, as in F.normalize
_meta_stands_for = ContextVar("_meta_stands_for", default="cuda")
_WIDTH = 8  # channels: matrix products and vector instructions run up to twice as fast on multiples of it


def _overridable(function: Function) -> Function:
    """Let TorchFunctionMode and tensor subclasses replace a function of this module."""

    def tensors(*args: Any, **_: Any) -> list[Tensor]:
        return [value for value in args if isinstance(value, Tensor)]

    return cast(Function, wrap_torch_function(tensors)(function))


def _on_cpu(tensor: Tensor) -> bool:
    """Whether operations cost what they compute; on a GPU each also costs a launch."""
    return tensor.is_cpu or (tensor.device.type == "meta" and _meta_stands_for.get() == "cpu")


@contextmanager
def meta_stands_for(kind: str) -> Iterator[None]:
    """Compute on the `meta` device as on devices of this kind, 'cuda' (as outside the context) or 'cpu'."""
    token = _meta_stands_for.set(kind)
    try:
        yield
    finally:
        _meta_stands_for.reset(token)


@_overridable
def pad_channels(weight: Tensor, dim: int) -> Tensor:
    """Append zeros in dimension `dim` of a weight until its size is a multiple of 8; results stay the same.

    On the CPU only: a GPU gains less from it than the launches cost.
    """
    after = weight.ndim - 1 - dim
    missing = -weight.shape[dim] % _WIDTH if _on_cpu(weight) else 0
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
        wide = torch.promote_types(queries_keys.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(queries_keys, dim=1, dtype=wide).clamp_min(_EPS)  # (B, 2C)
        of_queries, of_keys = rearrange(lengths, "b (two n d) -> two b n d", two=2, n=heads)
        scores: Tensor = _products(queries_keys, heads) / of_queries.unsqueeze(-1) / of_keys.unsqueeze(-2)
        ctx.save_for_backward(queries_keys, scores, lengths)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor, None]:
        queries_keys, scores, lengths = ctx.saved_tensors
        of_queries, of_keys = rearrange(lengths, "b (two n d) -> two b n d", two=2, n=scores.shape[1])
        # A longer query changes no score: take away the part of its gradient along itself, unless it counts as _EPS.
        along = grad_scores * scores
        along = torch.cat((along.sum(-1).flatten(1), along.sum(-2).flatten(1)), dim=1)  # (B, 2C)
        radial = torch.where(lengths > _EPS, -along / lengths.square(), 0.0).to(queries_keys.dtype)
        grad_products = (grad_scores / of_queries.unsqueeze(-1) / of_keys.unsqueeze(-2)).to(queries_keys.dtype)
        return _grad_of_products(queries_keys, grad_products, radial), None


def _products(queries_keys: Tensor, heads: int) -> Tensor:
    """queries^T @ keys of each head: (B, P, 2C) to (B, N, D, D).

    On the CPU head by head, without copies. A GPU, where each operation costs a launch, multiplies all channels with
    all, and the heads are the blocks on the diagonal.
    """
    queries, keys = queries_keys.chunk(2, dim=-1)
    if _on_cpu(queries_keys):
        return torch.stack([q.mT @ k for q, k in zip(queries.chunk(heads, -1), keys.chunk(heads, -1), strict=True)], 1)
    products: Tensor = queries.mT @ keys
    return _diagonal_blocks(rearrange(products, "b (m c) (n d) -> b m c n d", m=heads, n=heads))


def _grad_of_products(queries_keys: Tensor, grad_products: Tensor, radial: Tensor) -> Tensor:
    """Return the gradient of `_products`, plus each channel times its `radial` (B, 2C): (B, P, 2C)."""
    heads = grad_products.shape[1]
    if not _on_cpu(queries_keys):  # one product: the matrix has `radial` on its diagonal, and both gradients beside it
        matrix = torch.diag_embed(radial)
        blocks = rearrange(matrix, "b (i m c) (j n d) -> b i m c j n d", i=2, j=2, m=heads, n=heads)
        _diagonal_blocks(blocks[:, 0, :, :, 1]).copy_(grad_products)
        _diagonal_blocks(blocks[:, 1, :, :, 0]).copy_(grad_products.mT)
        return queries_keys @ matrix
    channels = [part.chunk(heads, -1) for part in queries_keys.chunk(2, dim=-1)]
    scaled = [part.chunk(heads, -1) for part in (queries_keys * radial.unsqueeze(1)).chunk(2, dim=-1)]
    per_head = list(zip(grad_products.unbind(1), *channels, *scaled, strict=True))
    grad_queries = [torch.baddbmm(scaled_q, k, product.mT) for product, _, k, scaled_q, _ in per_head]
    grad_keys = [torch.baddbmm(scaled_k, q, product) for product, q, _, _, scaled_k in per_head]
    return torch.cat((*grad_queries, *grad_keys), dim=-1)


def _diagonal_blocks(blocks: Tensor) -> Tensor:
    """View (B, N, D, N, D) as its blocks on the diagonal: (B, N, D, D)."""
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


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
