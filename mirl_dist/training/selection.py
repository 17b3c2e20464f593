"""The masks of the next round: what each criterion needs is brought to it, and every rank cuts the same weights.

Scores that need the network or its gradients are made by rank 0 alone, on the same passes whatever the number of ranks,
and sent to the others: so a mask is the same bits on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mirl_dist.data.sample import Batch
from mirl_dist.distributed.engines.sharding import ShardLayout
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import Stopped
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning import saliency, synflow
from mirl_dist.pruning.criteria import CRITERIA, scores_of_weights
from mirl_dist.pruning.masks import Masks
from mirl_dist.pruning.prune import PruneConfig, PruneResult, prune
from mirl_dist.training import losses
from mirl_dist.training.state import TrainState

Batches = Callable[[], Iterable[Batch]]


def select(
    rule: PruneConfig,
    state: TrainState,
    initial: dict[str, Tensor],
    whole_network: Callable[[], AbstractContextManager[nn.Module]],
    batches: Batches,
    ranks: Ranks,
    stop_asked: Callable[[], bool],
) -> PruneResult:
    """New masks by a rule, of what each rank holds. whole_network: with the trained weights, left as it is.

    Where weights are dealt out, each rank counts magnitudes and chance on its own part, and no rank holds the network;
    criteria that need its gradients gather it. batches: called on rank 0 alone, by criteria that need gradients. Raises
    UserError, on every rank, for weights or scores that are not finite; Stopped, on every rank, when rank 0 is asked to
    stop while it makes scores.
    """
    criterion = CRITERIA[rule.criterion]
    values: dict[str, Tensor] = {n: p.detach() for n, p in state.weights.items()}
    if criterion.of == "initial":
        values = {n: initial[n].to(p.device, copy=True) for n, p in state.weights.items()}
        masking.apply_masks(values, state.masks)
    share, held = state.engine.partition, state.engine.layout
    if criterion.needs == "nothing":
        drawn = None if held.is_replicated or rule.criterion != "random" else _chance(rule, held)
        return prune(values, state.masks, rule, share, ranks.gather, drawn)
    values = {n: v for n, v in state.gather_full(values) if ranks.is_main}  # the others only help to gather them
    masks = {n: m for n, m in state.gather_full(state.masks) if ranks.is_main}

    def go_on() -> None:
        if stop_asked():
            raise Stopped("stopped as asked while selecting; all rounds that were trained are committed")

    if criterion.needs == "network":
        with whole_network() as network:
            return _by_flow(rule, state, values, masks, network, ranks, go_on)
    scored: list[dict[str, Tensor]] = []

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches():
            go_on()
            yield batch.degraded, batch.clean

    def sense() -> None:
        found = saliency.gradients(network, pairs(), _loss, at=values)
        scored.append({n: s for n, s in saliency.scores(values, found).items() if n in masks})

    with whole_network() as network:
        ranks.on_main(sense, what="gradients")
    scores = ranks.broadcast_tensors(scored[0] if scored else None, what="scores", layout=held)
    here = {n: scores[n].to(state.masks[n].device) for n in state.masks}
    return prune(state.weights, state.masks, rule, share, ranks.gather, here)


def _chance(rule: PruneConfig, held: ShardLayout) -> Callable[[str], Tensor]:
    """The parts of a rank of the scores that whole tensors would have."""

    def of(name: str) -> Tensor:
        whole = torch.empty(held.shapes[name])
        return held.part_of(name, scores_of_weights(rule.criterion, name, whole, rule.seed))

    return of


def _by_flow(
    rule: PruneConfig,
    state: TrainState,
    values: dict[str, Tensor],
    masks: Masks,
    network: nn.Module,
    ranks: Ranks,
    go_on: Callable[[], None],
) -> PruneResult:
    made: list[PruneResult] = []

    def flow() -> tuple[float, int, tuple[str, ...]]:
        made.append(synflow.iterate(network, values, masks, rule, before_step=go_on))
        return made[0].threshold, made[0].removed, made[0].collapsed

    told = ranks.on_main(flow, what="SynFlow")
    held = state.engine.layout
    new = ranks.broadcast_tensors(made[0].masks if made else None, what="masks", layout=held)
    return PruneResult({n: new[n].to(state.masks[n].device) for n in state.masks}, *told)


def _loss(restored: Tensor, clean: Tensor) -> Tensor:
    return losses.combine(losses.per_sample_l1(restored, clean))
