"""Finds the exact k-th smallest magnitude over the parts of all ranks by a radix search.

The bits of a non-negative float32, read as an integer, order like its value. Three passes determine 11, 10 and 10 of
the 31 bits: each builds a histogram of the next bits of all magnitudes with the prefix found so far, and an all-gather
of the histograms gives every rank the same next prefix. Nothing is sorted or interpolated, and only counts are sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mirl_dist.errors import UserError

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""All-gather: int64 (n,) of this rank -> int64 (ranks, n)."""

_WIDTHS = {0: 11, 11: 10, 21: 10}
"""Known bits of the result -> number of bits that the next pass determines."""
CHUNK = 1 << 20
"""Weights processed at once: bounds the extra memory of a selection for tensors of any size."""


class Threshold(NamedTuple):
    """The cut after the k smallest magnitudes: `below` are smaller than it, and the first `ties` equal to it make up k.

    bits: the cut as float32 bits; compare bits, which is exact even under flush-to-zero.
    """

    bits: int
    below: int
    ties: int

    @property
    def value(self) -> float:
        """The cut as a float."""
        exponent, fraction = divmod(self.bits, 1 << 23)
        return math.ldexp(fraction + (1 << 23), exponent - 150) if exponent else math.ldexp(fraction, -149)


def single_rank(counts: Tensor) -> Tensor:
    """Return (n,) as (1, n): the all-gather of a single rank."""
    return counts.unsqueeze(0)


def magnitude_bits(values: Tensor) -> Tensor:
    """Return |values| as int32 bits, which order like them and distinguish subnormals even under flush-to-zero."""
    return values.contiguous().view(torch.int32) & 0x7FFFFFFF


class BitSearch(NamedTuple):
    """State of the radix search: the top `known` of the 31 bits of the result are `prefix`; `below` magnitudes have a
    smaller prefix, and the result is the `remaining`-th smallest (1-based) of those with this prefix."""

    remaining: int
    prefix: int = 0
    known: int = 0
    below: int = 0

    @property
    def width(self) -> int:
        """The number of bits that the next pass determines; 0 when all are known."""
        return _WIDTHS.get(self.known, 0)

    def counts(self, magnitudes: Tensor) -> Tensor:
        """Return the histogram of the next bits of magnitudes with the known prefix: int64 (2**width,) on CPU."""
        width, last = self.width, 31 - self.known
        bits = magnitude_bits(magnitudes)
        if self.known:
            bits = bits[(bits >> last) == self.prefix]
        return torch.bincount((bits >> (last - width)) & ((1 << width) - 1), minlength=1 << width).cpu()

    def narrowed(self, counts: Tensor) -> BitSearch:
        """Return the state after a pass. counts: int64 (2**width,), the histogram over all magnitudes of all ranks."""
        upto = counts.cumsum(0)
        chosen = int(torch.searchsorted(upto, self.remaining))
        before = int(upto[chosen] - counts[chosen])
        prefix = (self.prefix << self.width) | chosen
        return BitSearch(self.remaining - before, prefix, self.known + self.width, self.below + before)


def _chunks(part: Tensor, surviving: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the values of a part, at most CHUNK at a time; only surviving ones if masks are given."""
    chunks = torch.split(part.detach().reshape(-1), CHUNK)
    if surviving is None:
        return iter(chunks)
    return (chunk[kept] for chunk, kept in zip(chunks, torch.split(surviving.reshape(-1), CHUNK), strict=True))


def _check_finite(parts: Mapping[str, Tensor], gather: Gather) -> None:
    """Raise UserError on every rank if any rank holds NaN or inf; a rank that does names its tensors. A collective."""
    not_finite = [n for n in sorted(parts) if not all(bool(torch.isfinite(c).all()) for c in _chunks(parts[n]))]
    per_rank = gather(torch.tensor([len(not_finite)], dtype=torch.int64)).reshape(-1).tolist()
    if any(per_rank):
        ranks = ", ".join(str(r) for r, n in enumerate(per_rank) if n)
        here = f"tensors: {', '.join(not_finite[:5])}" if not_finite else "none in this rank's share"
        raise UserError(
            f"found NaN or infinite weights on rank {ranks} ({here}); nothing was pruned. "
            "Lower optimiser.lr, or set optimiser.clip_norm, in a new run.folder."
        )


def kth_smallest(
    parts: Mapping[str, Tensor], k: int, gather: Gather = single_rank, surviving: Mapping[str, Tensor] | None = None
) -> Threshold:
    """Return the exact k-th smallest magnitude among all parts of all ranks, as a Threshold with below + ties == k.

    parts: named float32 tensors that this rank counts, any shape; parts of different ranks must not overlap.
    k: 1-based, at most the number of magnitudes on all ranks. gather: see `Gather`. surviving: bool masks of the parts'
    sizes; None counts all.
    Raises TypeError for another dtype (on the rank that holds it), and on every rank ValueError for k out of range and
    UserError for NaN or inf.
    Cost: a few reads of the parts, at most 2048 int64 sent per rank and pass, memory for a few times CHUNK weights.
    """
    for name, part in parts.items():
        if part.dtype != torch.float32:
            raise TypeError(f"magnitudes of '{name}' are {part.dtype}; pass float32")
    _check_finite(parts, gather)
    search = BitSearch(k)
    while search.width:
        bins = torch.zeros(1 << search.width, dtype=torch.int64)
        for name, part in parts.items():
            for chunk in _chunks(part, surviving[name] if surviving else None):
                bins += search.counts(chunk)
        counts = gather(bins).sum(dim=0)
        if search.known == 0 and not 1 <= k <= int(counts.sum()):
            raise ValueError(f"k = {k} is outside 1..{int(counts.sum())}, the number of magnitudes")
        search = search.narrowed(counts)
    return Threshold(search.prefix, search.below, search.remaining)
