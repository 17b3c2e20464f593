"""Finds the exact k-th smallest magnitude over the parts of all ranks by a radix search.

Three passes determine 11, 10 and 10 of the 31 bits of the result: each builds a histogram of the next bits of all
magnitudes with the prefix found so far, and an all-gather of the histograms gives every rank the same next prefix.
Nothing is sorted or interpolated, and only counts are sent. See magnitudes.py for the counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.pruning.magnitudes import (
    NOT_FINITE,
    SAMPLED,
    BitSearch,
    CountedPart,
    Guess,
    Histogram,
    count,
    count_near,
    sample,
)

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""All-gather: int64 (n,) of this rank -> int64 (ranks, n)."""
_MANY = 1 << 18
"""For a k from here on, a sample is worth its time."""
_DEVIATIONS = 4
"""Standard deviations of a sample's rank, at most, for which a guess has room: it fails once in 10,000 cuts."""
_MOST_BINS = 16
"""A guess that spans more bins is not used."""
_RARE = 1 / 16
"""Magnitudes in the guess are copied, so that later passes read only them, if they are at most this share."""


class Threshold(NamedTuple):
    """The cut after the k smallest magnitudes: `below` are smaller than it, and the first `ties` of the `equal` ones
    that equal it make up k.

    bits: the cut as float32 bits; compare bits, which is exact even under flush-to-zero.
    """

    bits: int
    below: int
    ties: int
    equal: int

    @property
    def value(self) -> float:
        """The cut as a float."""
        exponent, fraction = divmod(self.bits, 1 << 23)
        return math.ldexp(fraction + (1 << 23), exponent - 150) if exponent else math.ldexp(fraction, -149)


def single_rank(counts: Tensor) -> Tensor:
    """Return (n,) as (1, n): the all-gather of a single rank."""
    return counts.unsqueeze(0)


def kth_smallest(
    parts: Mapping[str, Tensor], k: int, gather: Gather = single_rank, surviving: Mapping[str, Tensor] | None = None
) -> Threshold:
    """Return the exact k-th smallest magnitude among all parts of all ranks, as a Threshold with below + ties == k.

    parts: named float32 tensors that this rank counts, any shape, all on one device; parts of different ranks must not
    overlap. k: 1-based, at most the number of magnitudes on all ranks. gather: see `Gather`. surviving: bool masks of
    the parts' sizes; None counts all.
    Raises TypeError for another dtype (on the rank that holds it), and on every rank ValueError for k out of range and
    UserError for NaN or inf, in pruned weights too.
    Cost: one to three reads of the parts, at most 2049 int64 sent per rank and pass; memory for a few times
    magnitudes.CHUNK weights, and half a byte per weight at most.
    """
    for name, part in parts.items():
        if part.dtype != torch.float32:
            raise TypeError(f"magnitudes of '{name}' are {part.dtype}; pass float32")
    masks = {name: surviving[name].reshape(-1) for name in parts} if surviving else {}
    counted = [CountedPart(part.reshape(-1), masks.get(name)) for name, part in parts.items()]
    search = BitSearch(k)
    guess = _guess(counted, k, gather) if k >= _MANY else None
    if guess:
        own, near = count_near(counted, guess)
        guessed = search.narrowed(_sum_over_ranks(own, parts, k, gather))
        if guess.first <= guessed.prefix <= guess.last:
            search, counted = guessed, [*near]
    while search.width:
        own = count(counted, search)
        is_first = search.known == 0
        search = search.narrowed(_sum_over_ranks(own, parts, k, gather) if is_first else gather(own.counts).sum(dim=0))
    return Threshold(search.prefix, search.below, search.remaining, search.within)


def _guess(parts: Sequence[CountedPart], k: int, gather: Gather) -> Guess | None:
    """Return the bins of the first pass in which the k-th smallest magnitude lies, says a sample. A collective.

    None, on every rank, if these would be too many to be worth it.
    """
    own = count(sample(parts), BitSearch(1)).counts
    upto = gather(own).sum(dim=0).cumsum(0)
    rank, spread = k // SAMPLED, _DEVIATIONS * math.isqrt(k // SAMPLED)
    first, last = torch.searchsorted(upto, torch.tensor([max(rank - spread, 1), rank + spread])).tolist()
    last = min(last, (NOT_FINITE >> 20) - 1)
    first = min(first, last)
    if last + 1 - first > _MOST_BINS:
        return None
    return Guess(first, last, int(own[first : last + 1].sum()) <= _RARE * int(own.sum()))


def _sum_over_ranks(own: Histogram, parts: Mapping[str, Tensor], k: int, gather: Gather) -> Tensor:
    """Return the first pass's histogram over all ranks. A collective.

    Raises on every rank ValueError for k out of range, and UserError if any rank holds NaN or inf; a rank that does
    names its tensors.
    """
    is_finite = own.largest < NOT_FINITE
    of_ranks = gather(torch.cat([own.counts, torch.tensor([0 if is_finite else 1])]))
    if not bool(of_ranks[:, -1].any()):
        counts = of_ranks[:, :-1].sum(dim=0)
        if not 1 <= k <= int(counts.sum()):
            raise ValueError(f"k = {k} is outside 1..{int(counts.sum())}, the number of magnitudes")
        return counts
    ranks = ", ".join(str(rank) for rank, bad in enumerate(of_ranks[:, -1].tolist()) if bad)
    names = [] if is_finite else [n for n in sorted(parts) if not bool(torch.isfinite(parts[n]).all())]
    here = f"tensors: {', '.join(names[:5])}" if names else "none in this rank's share"
    raise UserError(
        f"found NaN or infinite weights on rank {ranks} ({here}); nothing was pruned. "
        "Lower optimiser.lr, or set optimiser.clip_norm, in a new run.folder."
    )
