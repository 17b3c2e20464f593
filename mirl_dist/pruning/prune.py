"""Which weights go: criteria x scopes over named tensors. Nothing here changes a weight.

MIR-L, Algorithm 1 and eq. 3 to 5: the p-quantile of the surviving magnitudes, over the network or per layer. The
released code removes, of n distinct survivors, exactly ceil(p (n - 1)); so does this, ties and all, by order of
(tensor name, flat index).
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
from mirl_dist.pruning.masks import Masks
from mirl_dist.pruning.partition import Counts, Partition, ReplicatedPartition, count_weights
from mirl_dist.pruning.quantile import CHUNK, Gather, Threshold, kth_smallest, single_rank


class PruneConfig(NamedTuple):
    """How a round prunes. fraction: of the surviving weights, in (0, 1); output_*: the layer-wise exception of MIR-L.

    floor: with per='global', the share of each tensor, in [0, 1), that survives in any case; iterations: SynFlow's.
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
    """New masks; `threshold`: the largest removed score (per layer: the largest of all layers); `removed`: how many;
    `collapsed`: the tensors without any surviving weight."""

    masks: Masks
    threshold: float
    removed: int
    collapsed: tuple[str, ...]


class PruneGroup(NamedTuple):
    """Tensors whose weights compete with one another, and how many of them go."""

    names: tuple[str, ...]
    k: int


def in_scope(names: Iterable[str], scope: str | tuple[str, ...]) -> tuple[str, ...]:
    """The prunable names, sorted. scope: 'published' (names that contain 'weight'), 'all', or globs.

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
    """ceil(fraction x factor (surviving - 1)) in exact decimal arithmetic: as published for distinct magnitudes."""
    return math.ceil(Fraction(str(fraction)) * Fraction(str(factor)) * (surviving - 1)) if surviving > 0 else 0


def form_groups(counts: Counts, config: PruneConfig) -> list[PruneGroup]:
    """Say which tensors compete, and how many of their weights go.

    All tensors together, or each by itself, with `output_factor` for `output_layers`. Raises UserError when the floor
    leaves too few weights to remove, ValueError for a floor with per='layer'.
    """
    if config.floor and config.per != "global":
        raise ValueError("a floor belongs to per='global'")
    tensors = sorted(counts.total)
    groups = []
    for names in [tuple(tensors)] if config.per == "global" else [(name,) for name in tensors]:
        is_output = config.per == "layer" and any(fnmatchcase(names[0], glob) for glob in config.output_layers)
        surviving = sum(counts.surviving[n] for n in names)
        k = count_to_remove(surviving, config.fraction, config.output_factor if is_output else 1.0)
        spare = sum(_spare(counts, n, config.floor) for n in names)
        if k > spare:
            raise UserError(
                f"prune.floor: found {config.floor:g}, which lets only {spare:,} of {surviving:,} alive weights go, "
                f"with prune.fraction {config.fraction:g}, which asks for {k:,}. Lower one of them, or prune.rounds.",
                everywhere=True,
            )
        groups.append(PruneGroup(names, k))
    return groups


def _spare(counts: Counts, name: str, floor: float) -> int:
    """How many surviving weights of a tensor may go: all but ceil(floor x size), in exact decimal arithmetic."""
    return max(0, counts.surviving[name] - math.ceil(Fraction(str(floor)) * counts.total[name]))


def select(
    scores: Callable[[str], Tensor],
    masks: Mapping[str, Tensor],
    groups: Iterable[PruneGroup],
    floor: float = 0.0,
    partition: Partition = ReplicatedPartition(),  # noqa: B008 - an immutable tuple
    gather: Gather = single_rank,
) -> PruneResult:
    """New masks in which of every group the k surviving weights of smallest |score| are gone, ties by name and index.

    scores: name -> float32 of the mask's number of weights, on its device, the same on every rank that holds them.
    """
    new: Masks = {}
    threshold, removed = 0.0, 0
    for names, k in groups:
        if k == 0:
            new |= {n: masks[n].clone() for n in names}
            continue
        # a collective of all ranks
        cut_masks, cut = _cut_above_floor(names, scores, masks, k, floor, partition, gather)
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
    """New masks after the k weakest of the spare weights went: of each tensor all but the strongest `floor`.

    All surviving weights stand in one order: |score|, name, index. Call a tensor's weights spare but for its strongest
    ones, as many as the floor holds. Wanted are the k first of all spare weights. Where a cut that ignores the floor
    takes more of a tensor than is spare, it takes all that is spare of it, since those are the tensor's first; and the
    wanted cut ends no earlier in the order than that one, since it counts fewer candidates up to the same k. So all
    that is spare of such a tensor is wanted, and the rest of k is wanted of the other tensors: the same task, smaller.
    Where a cut takes no more than is spare of any tensor, it is the wanted one. No later cut ends before an earlier
    one, so the last is the threshold.
    """
    before = count_weights({n: masks[n] for n in group}, partition, gather)
    spare = {n: _spare(before, n, floor) for n in group}
    assert k <= sum(spare.values()), "form_groups() refuses a floor that leaves too few"
    free, low = list(group), list[str]()
    while True:
        new, cut = _cut_group(free, scores, masks, k, partition, gather)
        if not floor:
            return new, cut
        after = count_weights(new, partition, gather)
        overdrawn = [n for n in free if before.surviving[n] - after.surviving[n] > spare[n]]
        if not overdrawn:
            break
        k -= sum(spare[n] for n in overdrawn)
        low += overdrawn
        free = [n for n in free if n not in overdrawn]
    for name in low:
        if spare[name]:
            new |= _cut_group([name], scores, masks, spare[name], partition, gather)[0]
        else:
            new[name] = masks[name].clone()
    return new, cut


def _cut_group(
    group: Sequence[str],
    scores: Callable[[str], Tensor],
    masks: Mapping[str, Tensor],
    k: int,
    partition: Partition,
    gather: Gather,
) -> tuple[Masks, Threshold]:
    """New masks of a group of tensors after its k smallest surviving scores went."""
    own = {n: partition.own_part(scores(n)) for n in group}
    cut = kth_smallest(own, k, gather, {n: partition.own_part(masks[n].reshape(-1)) for n in group})
    del own  # scores that are made when they are asked for need not lie about twice
    new, equal = {}, []
    for name in group:
        keep = masks[name].reshape(-1).clone()
        equal.append(_keep_not_below(keep, scores(name), cut.bits))
        new[name] = keep
    own_ties = torch.tensor(equal, dtype=torch.int64)
    before, everywhere = torch.zeros_like(own_ties), own_ties
    if not partition.is_replicated:
        of_ranks = gather(own_ties)
        before, everywhere = of_ranks[: partition.rank].sum(dim=0), of_ranks.sum(dim=0)
    ties = cut.ties
    for name, own_equal, earlier, all_equal in zip(group, equal, before.tolist(), everywhere.tolist(), strict=True):
        _drop_ties(new[name], scores(name), cut.bits, min(max(ties - earlier, 0), own_equal))
        ties -= min(ties, all_equal)
    assert ties == 0, "the ranks counted ties that nobody holds"
    return {n: keep.reshape(masks[n].shape) for n, keep in new.items()}, cut


def _keep_not_below(keep: Tensor, scores: Tensor, bits: int) -> int:
    """Drop what is smaller than a cut, in place; how many of those left are equal to it."""
    equal = 0
    for kept, chunk in zip(torch.split(keep, CHUNK), torch.split(scores, CHUNK), strict=True):
        magnitude = _absolute(chunk)
        kept &= magnitude >= bits
        equal += int((kept & (magnitude == bits)).sum())
    return equal


def _drop_ties(keep: Tensor, scores: Tensor, bits: int, count: int) -> None:
    """Drop the first `count` that are equal to a cut, in place."""
    for kept, chunk in zip(torch.split(keep, CHUNK), torch.split(scores, CHUNK), strict=True):
        if not count:
            return
        first = torch.nonzero(kept & (_absolute(chunk) == bits)).reshape(-1)[:count]
        kept[first] = False
        count -= first.numel()


def _absolute(scores: Tensor) -> Tensor:
    """|score| as int32 bits, which compare like values and keep subnormals apart under flush-to-zero."""
    return scores.contiguous().view(torch.int32) & 0x7FFFFFFF


def prune(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    config: PruneConfig,
    partition: Partition = ReplicatedPartition(),  # noqa: B008 - an immutable tuple
    gather: Gather = single_rank,
    scores: Callable[[str], Tensor] | Mapping[str, Tensor] | None = None,
) -> PruneResult:
    """New masks with ceil(fraction (surviving - 1)) fewer weights, the same on every rank, or each rank's part.

    weights: float tensors, replicated on all ranks, or with `ShardedPartition` the shards that this rank holds; masks:
    the surviving weights among them. Weights are counted once: each rank counts its `partition`. per='layer' applies
    the count to every tensor by itself, with fraction x output_factor for `output_layers`. scores: name -> float32 of
    the weights' shape, of any sign, held as the weights are; None: of the weights, by the criterion. Raises UserError
    for NaN or inf, and for a floor that leaves too few weights to remove. Extra memory: the new masks, a byte for each
    weight that the rank holds, and a few times quantile.CHUNK weights.
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
    """Raise ValueError for scores of another shape, and UserError for NaN or inf, on every rank alike.

    Scores of sharded tensors are checked for NaN and inf when they are counted.
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
