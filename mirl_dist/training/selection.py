"""Computes the masks of the next round by the configured criterion, identically on every rank.

Scores that need the network or its gradients are computed on rank 0 only, in passes that do not depend on the number of
ranks, and broadcast. The masks are therefore bit-identical for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirl_dist.data.sample import Batch
from mirl_dist.distributed.engines.sharding import ShardLayout
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import Stopped, UserError
from mirl_dist.observability.progress import say
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning import saliency, synflow
from mirl_dist.pruning.criteria import CRITERIA, scores_of_weights
from mirl_dist.pruning.masks import Masks
from mirl_dist.pruning.prune import PruneConfig, PruneResult, prune
from mirl_dist.training import losses
from mirl_dist.training.checkpoint import Checkpoints, rewind_name
from mirl_dist.training.round import TrainNetwork
from mirl_dist.training.state import TrainState

Calibration = Callable[[int], Iterable[Batch]]
"""Round -> its calibration batches."""


@dataclass
class Pruner:
    """Computes new masks and the rewind point between two rounds, on one rank.

    initial: this rank's part of the initial weights; rewind_step: the step of round 0 to rewind to, None for the
    initial weights; calibration: returns the samples of a round's first global batches.
    """

    config: PruneConfig
    rewind_step: int | None
    state: TrainState
    initial: dict[str, Tensor]
    network: TrainNetwork
    calibration: Calibration
    checkpoints: Checkpoints
    ranks: Ranks
    stop: StopSignal

    def select(self) -> PruneResult:
        """Return the masks of the next round; warn of tensors without any surviving weight."""
        next_round = self.state.progress.round + 1
        result = select(
            self.config,
            self.state,
            self.initial,
            self.network.gathered,
            lambda: self.calibration(next_round),
            self.ranks,
            self.stop,
        )
        if result.collapsed and self.ranks.is_main:
            names = ", ".join(result.collapsed[:5]) + (", ..." if len(result.collapsed) > 5 else "")
            say(f"warning: round {next_round} leaves nothing of {len(result.collapsed)} tensors ({names})")
        return result

    def rewind_point(self) -> dict[str, Tensor]:
        """Return this rank's part of the values to which surviving weights are rewound.

        Raises UserError, on every rank, if the file of the rewind point is damaged or missing.
        """
        if self.rewind_step is None:
            return self.initial
        name, layout = rewind_name(self.state.progress.rewind_digest), self.state.engine.layout
        weights: list[dict[str, Tensor] | None] = []
        self.ranks.on_main(lambda: weights.append(self.checkpoints.tensors(name)), what="rewind point")
        if weights and weights[0] is not None and weights[0].keys() != layout.shapes.keys():
            weights[0] = None
        own = (weights[0] or {}) if weights else None
        point = self.ranks.broadcast_tensors(own, what="rewind point", layout=layout)
        if not point or masking.digest_of(self.state.gather_full(point)) != self.state.progress.rewind_digest:
            raise UserError(
                f"{self.checkpoints.store.where(name)} is damaged or missing, and nothing else holds the weights of "
                f"step {self.rewind_step}. Restore a copy of it, or train in a new run.folder.",
                everywhere=True,
            )
        return point


def select(
    config: PruneConfig,
    state: TrainState,
    initial: dict[str, Tensor],
    gathered_network: Callable[[], AbstractContextManager[nn.Module]],
    calibration: Callable[[], Iterable[Batch]],
    ranks: Ranks,
    stop_requested: Callable[[], bool],
) -> PruneResult:
    """Return new masks by a criterion; each rank gets the masks of the weights that it holds.

    With sharded weights, each rank computes magnitude and random scores of its own part, so that the full network is
    never gathered; the other criteria gather it. gathered_network: yields it with the trained weights, which must not
    be changed. calibration: called on rank 0 only, by criteria that need gradients. Raises UserError, on every rank,
    for non-finite weights or scores; Stopped, on every rank, if a stop is requested while rank 0 computes scores.
    """
    criterion, partition, layout = CRITERIA[config.criterion], state.engine.partition, state.engine.layout
    values = _values(criterion.weights_from, state, initial)
    if criterion.needs == "nothing":
        local_scores = config.criterion == "random" and not layout.is_replicated
        scores_of_part = _random_part_scores(config, layout) if local_scores else None
        return prune(values, state.masks, config, partition, ranks.gather, scores_of_part)
    values = {n: v for n, v in state.gather_full(values) if ranks.is_main}  # the other ranks only join the collective
    masks = {n: m for n, m in state.gather_full(state.masks) if ranks.is_main}

    def check_stop() -> None:
        if stop_requested():
            raise Stopped("stopped as asked while selecting; all rounds that were trained are committed")

    with gathered_network() as network:
        if criterion.needs == "network":
            return _select_by_synflow(config, state, values, masks, network, ranks, check_stop)
        scores = _gradient_scores(values, masks, network, calibration, ranks, check_stop)
    own = ranks.broadcast_tensors(scores, what="scores", layout=layout)
    own = {n: own[n].to(state.masks[n].device) for n in state.masks}
    return prune(state.weights, state.masks, config, partition, ranks.gather, own)


def _values(of: str, state: TrainState, initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's part of the weights to score: the trained ones, or masked copies of the initial ones."""
    if of != "initial":
        return {name: weight.detach() for name, weight in state.weights.items()}
    values = {name: initial[name].to(weight.device, copy=True) for name, weight in state.weights.items()}
    masking.apply_masks(values, state.masks)
    return values


def _random_part_scores(config: PruneConfig, layout: ShardLayout) -> Callable[[str], Tensor]:
    """Return a function from a name to this rank's part of the scores of the whole tensor."""

    def scores_of(name: str) -> Tensor:
        whole = torch.empty(layout.shapes[name])
        return layout.part_of(name, scores_of_weights(config.criterion, name, whole, config.seed))

    return scores_of


def _gradient_scores(
    values: dict[str, Tensor],
    masks: Masks,
    network: nn.Module,
    calibration: Callable[[], Iterable[Batch]],
    ranks: Ranks,
    check_stop: Callable[[], None],
) -> dict[str, Tensor] | None:
    """Return gradient scores of the prunable weights from calibration batches, on rank 0; None on the others."""
    scores: list[dict[str, Tensor]] = []

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in calibration():
            check_stop()
            yield batch.degraded, batch.clean

    def compute() -> None:
        gradients = saliency.gradients(network, pairs(), _loss, at=values)
        scores.append({n: s for n, s in saliency.scores(values, gradients).items() if n in masks})

    ranks.on_main(compute, what="gradients")
    return scores[0] if scores else None


def _select_by_synflow(
    config: PruneConfig,
    state: TrainState,
    values: dict[str, Tensor],
    masks: Masks,
    network: nn.Module,
    ranks: Ranks,
    check_stop: Callable[[], None],
) -> PruneResult:
    """Run SynFlow on rank 0 and broadcast its masks."""
    results: list[PruneResult] = []

    def iterate() -> tuple[float, int, tuple[str, ...]]:
        results.append(synflow.iterate(network, values, masks, config, before_step=check_stop))
        return results[0].threshold, results[0].removed, results[0].collapsed

    threshold, removed, collapsed = ranks.on_main(iterate, what="SynFlow")
    whole = results[0].masks if results else None
    own = ranks.broadcast_tensors(whole, what="masks", layout=state.engine.layout)
    return PruneResult({n: own[n].to(state.masks[n].device) for n in state.masks}, threshold, removed, collapsed)


def _loss(restored: Tensor, clean: Tensor) -> Tensor:
    return losses.combine(losses.per_sample_l1(restored, clean))
