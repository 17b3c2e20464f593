"""Which weights go: criteria x scopes over named tensors. Nothing here changes a weight.

MIR-L, Algorithm 1 and eq. 3 to 5: the p-quantile of the surviving magnitudes, over the network or per layer. The
released code removes, of n distinct survivors, exactly ceil(p (n - 1)); so does this, ties and all, by order of
(tensor name, flat index).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirl_dist.faults import Fault
from mirl_dist.pruning.masks import Masks
from mirl_dist.pruning.quantile import Cut, Gather, alone, kth_smallest


class Rule(NamedTuple):
    """How a round prunes. fraction: of the alive weights, in (0, 1); output_*: the layer-wise exception of MIR-L."""

    fraction: float
    criterion: Literal["magnitude", "random"] = "magnitude"
    per: Literal["global", "layer"] = "global"
    output_layers: tuple[str, ...] = ("output.weight",)
    output_factor: float = 0.5
    seed: int = 0


class Pruned(NamedTuple):
    """New masks; `threshold`: the largest removed score (per layer: the largest of all layers); `removed`: how many."""

    masks: Masks
    threshold: float
    removed: int


class Slice(NamedTuple):
    """This rank's share of replicated tensors: the `rank`-th of `ranks` contiguous pieces of each."""

    rank: int = 0
    ranks: int = 1

    def of(self, flat: Tensor) -> Tensor:
        n = flat.numel()
        return flat[n * self.rank // self.ranks : n * (self.rank + 1) // self.ranks]


def in_scope(names: Iterable[str], scope: str | tuple[str, ...]) -> tuple[str, ...]:
    """The prunable names, sorted. scope: 'published' (names that contain 'weight'), 'all', or globs.

    Raises Fault for a glob that matches nothing.
    """
    names = sorted(names)
    if scope == "published":
        return tuple(n for n in names if "weight" in n)
    if scope == "all":
        return tuple(names)
    for glob in scope:
        if not any(fnmatchcase(n, glob) for n in names):
            raise Fault(
                f"prune.scope: the glob '{glob}' matches no parameter. Names look like '{names[0]}'.",
                everywhere=True,
            )
    return tuple(n for n in names if any(fnmatchcase(n, glob) for glob in scope))


def count_to_remove(alive: int, fraction: float, factor: float = 1.0) -> int:
    """ceil(fraction x factor (alive - 1)) in exact decimal arithmetic: the published count for distinct magnitudes."""
    return math.ceil(Fraction(str(fraction)) * Fraction(str(factor)) * (alive - 1)) if alive > 0 else 0


def _random_scores(name: str, like: Tensor, seed: int) -> Tensor:
    """Uniform float32 scores that depend on nothing but the seed and the name."""
    key = hashlib.sha256(f"random-mask|{seed}|{name}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.random(like.numel(), dtype=np.float32)).to(like.device)


def _magnitude_scores(name: str, like: Tensor, seed: int) -> Tensor:
    return like.detach().float().reshape(-1)


CRITERIA: dict[str, Callable[[str, Tensor, int], Tensor]] = {
    "magnitude": _magnitude_scores,
    "random": _random_scores,
}
"""Name -> (tensor name, weights, seed) -> flat float32 scores; the smallest |score| goes first."""


def _cut_group(
    group: list[str],
    scores: Callable[[str], Tensor],
    masks: Mapping[str, Tensor],
    k: int,
    share: Slice,
    gather: Gather,
) -> tuple[Masks, Cut]:
    """New masks of a group of tensors after its k smallest alive scores went."""
    mine = {n: share.of(scores(n))[share.of(masks[n].reshape(-1))] for n in group}
    cut = kth_smallest(mine, k, gather)
    ties, new = cut.ties, {}
    for name in group:
        keep = masks[name].reshape(-1).clone()
        magnitude = _absolute(scores(name))
        keep &= magnitude >= cut.bits
        if ties:
            equal = torch.nonzero(keep & (magnitude == cut.bits)).reshape(-1)[:ties]
            keep[equal] = False
            ties -= equal.numel()
        new[name] = keep.reshape(masks[name].shape)
    assert ties == 0, "the ranks counted ties that this replica does not hold"
    return new, cut


def _absolute(scores: Tensor) -> Tensor:
    """|score| as int32 bits, which compare like values and keep subnormals apart under flush-to-zero."""
    return scores.contiguous().view(torch.int32) & 0x7FFFFFFF


def prune(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rule: Rule,
    share: Slice = Slice(),  # noqa: B008 - an immutable tuple
    gather: Gather = alone,
) -> Pruned:
    """New masks with ceil(fraction (alive - 1)) fewer alive weights, the same on every rank.

    weights: float tensors, replicated on all ranks; masks: the alive weights among them. Weights are counted once:
    each rank counts its `share`. per='layer' applies the count to every tensor by itself, with fraction x
    output_factor for `output_layers`. Raises Fault for NaN or inf.
    """
    score = CRITERIA[rule.criterion]
    groups = [sorted(masks)] if rule.per == "global" else [[name] for name in sorted(masks)]
    new: Masks = {}
    threshold, removed = 0.0, 0
    for group in groups:
        halved = rule.per == "layer" and any(fnmatchcase(group[0], glob) for glob in rule.output_layers)
        alive = sum(int(masks[n].sum()) for n in group)
        k = count_to_remove(alive, rule.fraction, rule.output_factor if halved else 1.0)
        if k == 0:
            new |= {n: masks[n].clone() for n in group}
            continue
        cut_masks, cut = _cut_group(group, lambda n: score(n, weights[n], rule.seed), masks, k, share, gather)
        new |= cut_masks
        threshold, removed = max(threshold, cut.value), removed + k
    return Pruned(new, threshold, removed)
