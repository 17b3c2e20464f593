"""Selects the weights to prune, globally or per layer, by their scores. Nothing here changes a weight.

MIR-L, Algorithm 1 and eq. 3 to 5: the p-quantile of the surviving magnitudes, over the network or per layer. The
released code removes exactly ceil(p * (n - 1)) of n distinct magnitudes. This code removes as many in any case; it
breaks ties by (tensor name, flat index).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.pruning.criteria import scores_of_weights
from mirl_dist.pruning.magnitudes import count_equal, drop_equal, keep_from
from mirl_dist.pruning.masks import Masks
from mirl_dist.pruning.partition import WHOLE, Counts, Partition, count_weights
from mirl_dist.pruning.quantile import Gather, Threshold, kth_smallest, single_rank


class PruneConfig(NamedTuple):
    """The pruning settings of a round.

    fraction: of the surviving weights to remove, in (0, 1); output_layers, output_factor: globs of layers and the
    factor on their fraction with per='layer' (MIR-L); floor: with per='global', the share of each tensor, in [0, 1),
    that always survives; iterations: steps of SynFlow.
    """

    fraction: float
    criterion: Literal["magnitude", "random", "synflow", "snip", "gradient"] = "magnitude"
    per: Literal["global", "layer"] = "global"
    output_layers: tuple[str, ...] = ("output.weight",)
    output_factor: float = 0.5
    seed: int = 0
    floor: float = 0.0
    iterations: int = 100


class PruneResult(NamedTuple):
    """New masks. threshold: the largest removed |score| (per layer: over all layers); removed: number of removed
    weights; collapsed: tensors without any surviving weight."""

    masks: Masks
    threshold: float
    removed: int
    collapsed: tuple[str, ...]


class PruneGroup(NamedTuple):
    """Tensors whose weights are ranked together, and the number k of weights to remove from them."""

    names: tuple[str, ...]
    k: int


def in_scope(names: Iterable[str], scope: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the prunable names, sorted. scope: 'published' (names that contain 'weight'), 'all', or globs.

    Raises UserError for a glob that matches nothing.
    """
    names = sorted(names)
    if scope == "published":
        return tuple(n for n in names if "weight" in n)
    if scope == "all":
        return tuple(names)
    for glob in scope:
        if not any(fnmatchcase(n, glob) for n in names):
            raise UserError(
                f"prune.scope: the glob '{glob}' matches no parameter. Names look like '{names[0]}'.",
                everywhere=True,
            )
    return tuple(n for n in names if any(fnmatchcase(n, glob) for glob in scope))


def count_to_remove(surviving: int, fraction: float, factor: float = 1.0) -> int:
    """Return ceil(fraction * factor * (surviving - 1)), computed exactly: as published for distinct magnitudes."""
    return math.ceil(Fraction(str(fraction)) * Fraction(str(factor)) * (surviving - 1)) if surviving > 0 else 0


def form_groups(counts: Counts, config: PruneConfig) -> list[PruneGroup]:
    """Group the tensors whose weights are ranked together, with the number of weights to remove per group.

    per='global' gives one group; per='layer' gives one per tensor, with `output_factor` for `output_layers`. Raises
    UserError if the floor leaves too few weights to remove, ValueError for a floor with per='layer'.
    """
    if config.floor and config.per != "global":
        raise ValueError("a floor belongs to per='global'")
    tensors = sorted(counts.total)
    groups = []
    for names in [tuple(tensors)] if config.per == "global" else [(name,) for name in tensors]:
        is_output = config.per == "layer" and any(fnmatchcase(names[0], glob) for glob in config.output_layers)
        surviving = sum(counts.surviving[n] for n in names)
        k = count_to_remove(surviving, config.fraction, config.output_factor if is_output else 1.0)
        spare = sum(_spare(counts, n, config.floor) for n in names) if config.floor else surviving
        if k > spare:
            raise UserError(
                f"prune.floor: found {config.floor:g}, which lets only {spare:,} of {surviving:,} alive weights go, "
                f"with prune.fraction {config.fraction:g}, which asks for {k:,}. Lower one of them, or prune.rounds.",
                everywhere=True,
            )
        groups.append(PruneGroup(names, k))
    return groups


def _spare(counts: Counts, name: str, floor: float) -> int:
    """Return how many surviving weights of a tensor may be removed: all but ceil(floor * size), in exact arithmetic."""
    return max(0, counts.surviving[name] - math.ceil(Fraction(str(floor)) * counts.total[name]))


def select(
    scores: Callable[[str], Tensor],
    masks: Mapping[str, Tensor],
    groups: Iterable[PruneGroup],
    floor: float = 0.0,
    partition: Partition = WHOLE,
    gather: Gather = single_rank,
) -> PruneResult:
    """Return new masks without the k surviving weights of smallest |score| of every group; ties by name and index.

    scores: name -> flat float32 scores, as many as the mask has elements, on its device; replicas must be equal on all
    ranks. masks, partition: as for `prune`.
    """
    new: Masks = {}
    threshold, removed = 0.0, 0
    for names, k in groups:
        if k == 0:
            new |= {n: masks[n].clone() for n in names}
            continue
        if floor:
            cut_masks, cut = _cut_above_floor(names, scores, masks, k, floor, partition, gather)
        else:
            cut_masks, cut = _cut_group(names, scores, masks, k, partition, gather)
        new |= cut_masks
        threshold, removed = max(threshold, cut.value), removed + k
    left = count_weights(new, partition, gather).surviving
    return PruneResult(new, threshold, removed, tuple(n for n in sorted(new) if not left[n]))


def _cut_above_floor(
    group: Sequence[str],
    scores: Callable[[str], Tensor],
    masks: Mapping[str, Tensor],
    k: int,
    floor: float,
    partition: Partition,
    gather: Gather,
) -> tuple[Masks, Threshold]:
    """Return the masks of a group without the k weakest weights that the floor does not protect, and the threshold.

    The floor protects the strongest weights of each tensor. A first cut of each tensor finds the others, its spare
    weights; a second one removes the k weakest spare weights of all tensors.
    """
    counts = count_weights({n: masks[n] for n in group}, partition, gather)
    spare: Masks = {}
    for name in group:
        number, spare[name] = _spare(counts, name, floor), torch.zeros_like(masks[name])
        if number:
            spare[name] = masks[name] & ~_cut_group([name], scores, masks, number, partition, gather)[0][name]
    kept, cut = _cut_group(group, scores, spare, k, partition, gather)
    return {n: masks[n] & (kept[n] | ~spare[n]) for n in group}, cut


def _cut_group(
    group: Sequence[str],
    scores: Callable[[str], Tensor],
    masks: Mapping[str, Tensor],
    k: int,
    partition: Partition,
    gather: Gather,
) -> tuple[Masks, Threshold]:
    """Return the masks of a group without its k smallest surviving |score|, and the threshold; a collective."""
    own = {n: partition.own_part(scores(n)) for n in group}
    cut = kth_smallest(own, k, gather, {n: partition.own_part(masks[n].reshape(-1)) for n in group})
    del own  # `scores` may compute them on demand; free this copy before the next
    least = cut.bits + 1 if cut.ties == cut.equal else cut.bits
    kept = {n: keep_from(scores(n), masks[n].reshape(-1), least) for n in group}
    if cut.ties < cut.equal:
        _drop_ties(kept, scores, cut, partition, gather)
    return {n: keep.reshape(masks[n].shape) for n, keep in kept.items()}, cut


def _drop_ties(
    kept: Masks, scores: Callable[[str], Tensor], cut: Threshold, partition: Partition, gather: Gather
) -> None:
    """Clear in `kept`, in place, the first `cut.ties` weights whose |score| equals the cut, in the order of names, then
    of ranks, then of indices; a collective if tensors are sharded."""
    own_ties = torch.stack([count_equal(scores(n), keep, cut.bits) for n, keep in kept.items()]).cpu()
    before, everywhere = torch.zeros_like(own_ties), own_ties
    if not partition.is_replicated:
        of_ranks = gather(own_ties)
        before, everywhere = of_ranks[: partition.rank].sum(dim=0), of_ranks.sum(dim=0)
    ties = cut.ties
    per_tensor = zip(kept, own_ties.tolist(), before.tolist(), everywhere.tolist(), strict=True)
    for name, own_equal, earlier, all_equal in per_tensor:
        dropped = min(max(ties - earlier, 0), own_equal)
        ties -= min(ties, all_equal)
        if dropped == own_equal > 0:
            kept[name] = keep_from(scores(name), kept[name], cut.bits + 1)
        elif dropped:
            drop_equal(scores(name), kept[name], cut.bits, dropped)
    assert ties == 0, "the ranks counted ties that no rank has"


def prune(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    config: PruneConfig,
    partition: Partition = WHOLE,
    gather: Gather = single_rank,
    scores: Callable[[str], Tensor] | Mapping[str, Tensor] | None = None,
) -> PruneResult:
    """Return masks with ceil(fraction * (surviving - 1)) fewer weights; a collective of all ranks.

    weights: float tensors, replicated on all ranks, or with a sharded partition the shards that this rank holds; masks:
    bool, laid out alike, as are the new ones. partition: the weights that this rank counts, so that each is counted
    once. per='layer' applies the count to each tensor separately, with fraction * output_factor for `output_layers`.
    scores: name -> float32 of the weights' shape, of any sign, laid out alike; None: computed from the weights by the
    criterion. Raises UserError for NaN or inf, and for a floor that leaves too few weights to remove. Extra memory: the
    new masks (one byte per weight held), and that of `kth_smallest`.
    """
    if scores is None:

        def flat(name: str) -> Tensor:
            return scores_of_weights(config.criterion, name, weights[name], config.seed)
    else:
        given = scores if callable(scores) else scores.__getitem__
        _check_scores(given, masks, config.criterion, partition)

        def flat(name: str) -> Tensor:
            return given(name).detach().reshape(-1).to(masks[name].device)

    groups = form_groups(count_weights(masks, partition, gather), config)
    return select(flat, masks, groups, config.floor, partition, gather)


def _check_scores(
    scores: Callable[[str], Tensor], masks: Mapping[str, Tensor], criterion: str, partition: Partition
) -> None:
    """Raise ValueError for scores of another shape, and UserError for NaN or inf, on every rank.

    Sharded scores may differ in this between ranks; `kth_smallest` checks them for NaN and inf with a collective.
    """
    not_finite = []
    for name in sorted(masks):
        tensor = scores(name)
        if tensor.shape != masks[name].shape:
            raise ValueError(f"scores of '{name}' are {tuple(tensor.shape)}, its weights {tuple(masks[name].shape)}")
        if partition.is_replicated and not bool(torch.isfinite(tensor).all()):
            not_finite.append(name)
    if not_finite:
        raise UserError(
            f"found NaN or infinite scores by prune.criterion {criterion} (tensors: {', '.join(not_finite[:5])}); "
            "nothing was pruned. Take another criterion, or look at the weights it scores.",
            everywhere=True,
        )
