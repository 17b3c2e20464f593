"""Rewinds surviving weights to earlier values, and verifies the result.

MIR-L, Algorithm 1: theta <- m * theta_0. The released code resets tensors named 'weight' in every round, those named
'bias' only before round 1 (training then overwrites the stored copy), and prompts and temperatures never; with several
processes it may reset to the initialisation of another process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mirl_dist.pruning.masks import apply_masks


def rewound_names(names: Iterable[str], what: str, round_: int) -> frozenset[str]:
    """Return the tensors that are rewound at the start of round `round_` (1, 2, ...). what: 'all' or 'published'."""
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
    """Set weights <- mask * initial for `names`, in place; set pruned weights of all other tensors to zero."""
    for name in names:
        weights[name].copy_(initial[name])
    apply_masks(weights, masks)


def find_unrewound(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    names: frozenset[str],
) -> str | None:
    """Return the first tensor of `names`, by name, that does not equal mask * initial exactly, or None."""
    for name in sorted(names):
        expected = initial[name].to(weights[name].device)
        if name in masks:
            expected = expected.masked_fill(~masks[name], 0.0)
        if not torch.equal(weights[name].detach(), expected):
            return name
    return None
