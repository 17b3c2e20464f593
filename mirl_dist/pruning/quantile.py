"""The exact k-th smallest magnitude over the parts of all ranks, found by counting.

The bits of a non-negative float32, read as an integer, sort like its value. Three passes fix 11, 10 and 10 of the
31 bits: each counts how many magnitudes fall into each bin below the prefix found so far, and one all-gather of
those counts tells every rank the same next prefix. No sort, no interpolation, no weight leaves its rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mirl_dist.faults import Fault

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""int64 (n,) of this rank -> int64 (ranks, n) of all ranks."""

_PASSES = (11, 10, 10)
_CHUNK = 1 << 22  # weights counted at once: bounds the extra memory


class Cut(NamedTuple):
    """Where the k smallest magnitudes end: `below` are smaller than the cut, the first `ties` equal to it also go.

    bits: the cut as the bits of a float32, by which to compare: exact under any flush-to-zero mode.
    """

    bits: int
    below: int
    ties: int

    @property
    def value(self) -> float:
        """The cut as a number."""
        exponent, fraction = divmod(self.bits, 1 << 23)
        return math.ldexp(fraction + (1 << 23), exponent - 150) if exponent else math.ldexp(fraction, -149)


def alone(counts: Tensor) -> Tensor:
    """The `gather` of a single rank."""
    return counts.unsqueeze(0)


def _bits(part: Tensor) -> Tensor:
    """Flat int32 bits of |part|; sign removed by the bits, so that subnormals survive any flush-to-zero mode."""
    return part.detach().reshape(-1).contiguous().view(torch.int32) & 0x7FFFFFFF


def _count_bins(parts: Mapping[str, Tensor], prefix: int, known: int, width: int) -> Tensor:
    """int64 (2**width,): magnitudes whose top `known` of 31 bits equal prefix, by their next `width` bits."""
    shift = 31 - known - width
    bins = torch.zeros(1 << width, dtype=torch.int64)
    for part in parts.values():
        for chunk in torch.split(part.detach().reshape(-1), _CHUNK):
            bits = _bits(chunk)
            if known:
                bits = bits[(bits >> (31 - known)) == prefix]
            bins += torch.bincount((bits >> shift) & ((1 << width) - 1), minlength=1 << width).cpu()
    return bins


def refuse_non_finite(parts: Mapping[str, Tensor], gather: Gather = alone) -> None:
    """Raise Fault on every rank when any rank holds a NaN or an infinity; a rank that holds one names it."""
    odd = [name for name in sorted(parts) if not bool(torch.isfinite(parts[name]).all())]
    per_rank = gather(torch.tensor([len(odd)], dtype=torch.int64)).reshape(-1).tolist()
    if any(per_rank):
        ranks = ", ".join(str(r) for r, n in enumerate(per_rank) if n)
        here = f"tensors: {', '.join(odd[:5])}" if odd else "none in this rank's share"
        raise Fault(
            f"found NaN or infinite weights on rank {ranks} ({here}); nothing was pruned. "
            "Lower optimiser.lr, or set optimiser.clip_norm, in a new run.folder."
        )


def kth_smallest(parts: Mapping[str, Tensor], k: int, gather: Gather = alone) -> Cut:
    """The k-th smallest magnitude among all parts on all ranks, exactly.

    parts: named float32 tensors of this rank's share, any shape; shares of different ranks must not overlap.
    k: 1-based, 1 <= k <= number of magnitudes on all ranks. gather: see `Gather`.
    Returns Cut with below + ties == k. Raises TypeError for another dtype (on the rank that holds it),
    ValueError for k out of range and Fault for NaN or inf (on every rank).
    Cost: a few reads of the parts, 2048 int64 per rank and pass on the wire, 4 million weights' bits of memory.
    """
    for name, part in parts.items():
        if part.dtype != torch.float32:
            raise TypeError(f"magnitudes of '{name}' are {part.dtype}; pass float32")
    refuse_non_finite(parts, gather)
    prefix, known, remaining, below, ties = 0, 0, k, 0, 0
    for width in _PASSES:
        counts = gather(_count_bins(parts, prefix, known, width)).sum(dim=0)
        upto = counts.cumsum(0)
        if known == 0 and not 1 <= k <= int(upto[-1]):
            raise ValueError(f"k = {k} is outside 1..{int(upto[-1])}, the number of magnitudes")
        chosen = int(torch.searchsorted(upto, remaining))
        before = int(upto[chosen] - counts[chosen])
        below, remaining = below + before, remaining - before
        prefix, known, ties = (prefix << width) | chosen, known + width, remaining
    return Cut(prefix, below, ties)


__all__ = ["Cut", "Gather", "alone", "kth_smallest", "refuse_non_finite"]
