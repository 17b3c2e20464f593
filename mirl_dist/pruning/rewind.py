"""Surviving weights return to their first values, and a proof that they did.

MIR-L, Algorithm 1: theta <- m * theta_0. The released code resets tensors named 'weight' in every round, those
named 'bias' before round 1 only (the stored copy is overwritten by training), prompts and temperatures never, and
with several processes possibly to another process's initialisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mirl_dist.pruning.masks import apply_masks


def rewound_names(names: Iterable[str], what: str, round_: int) -> frozenset[str]:
    """The tensors that start round `round_` (1, 2, ...) from their first values. what: 'all' or 'published'."""
    if what == "all":
        return frozenset(names)
    endings = ("weight", "bias") if round_ == 1 else ("weight",)
    return frozenset(n for n in names if any(word in n for word in endings))


@torch.no_grad()
def rewind(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    names: frozenset[str],
) -> None:
    """weights <- mask x initial for `names`, in place; other tensors keep their values, pruned weights become zero."""
    for name in names:
        weights[name].copy_(initial[name])
    apply_masks(weights, masks)


def find_unrewound(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    names: frozenset[str],
) -> str | None:
    """The first tensor of `names` that is not mask x initial to the last bit, or None when all are."""
    for name in sorted(names):
        expected = initial[name].to(weights[name].device)
        if name in masks:
            expected = expected.masked_fill(~masks[name], 0.0)
        if not torch.equal(weights[name].detach(), expected):
            return name
    return None
