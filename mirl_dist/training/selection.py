"""Computes the masks of the next round by the configured criterion, identically on every rank.

Scores that need the network or its gradients are computed on rank 0 only, in passes that do not depend on the number of
ranks, and broadcast. The masks are therefore bit-identical for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from mirl_dist.config.schema_training import PruneSection
from mirl_dist.data.loader import calibration_batches
from mirl_dist.data.sample import Batch
from mirl_dist.data.sampler import Position
from mirl_dist.data.shard_pool import ShardPool
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
from mirl_dist.training.checkpointing.checkpoint import Checkpoints, rewind_name
from mirl_dist.training.dataloaders import patch_reader_of
from mirl_dist.training.losses import per_sample_l1
from mirl_dist.training.preflight import RunPlan
from mirl_dist.training.round import TrainNetwork
from mirl_dist.training.state import TrainState


def prune_config_of(section: PruneSection, seed: int) -> PruneConfig:
    """Return the settings for pruning."""
    return PruneConfig(
        section.fraction,
        section.criterion,
        section.per,
        section.output_layers,
        section.output_factor,
        seed,
        floor=section.floor,
        iterations=section.synflow_steps,
    )


@dataclass
class Pruner:
    """Computes new masks and the rewind point between two rounds, on one rank.

    initial: this rank's part of the initial weights; pool: holds the samples from which gradients are computed.
    """

    plan: RunPlan
    state: TrainState
    initial: dict[str, Tensor]
    network: TrainNetwork
    pool: ShardPool
    checkpoints: Checkpoints
    ranks: Ranks
    stop: StopSignal

    def select(self) -> PruneResult:
        """Return the masks of the next round for the weights that this rank holds; warn of tensors left without any.

        With sharded weights, each rank computes magnitude and random scores of its own part, so that the full network
        is never gathered; the other criteria gather it. Raises UserError, on every rank, for non-finite weights or
        scores; Stopped, on every rank, if a stop is requested while rank 0 computes scores.
        """
        config = prune_config_of(self.plan.config.prune, self.plan.config.run.seed)
        result = self._select_by_part(config) if CRITERIA[config.criterion].needs == "nothing" else self._select(config)
        if result.collapsed and self.ranks.is_main:
            names = ", ".join(result.collapsed[:5]) + (", ..." if len(result.collapsed) > 5 else "")
            next_round = self.state.progress.round + 1
            say(f"warning: round {next_round} leaves nothing of {len(result.collapsed)} tensors ({names})")
        return result

    def _select_by_part(self, config: PruneConfig) -> PruneResult:
        """Select by scores that follow from single weights: each rank scores its part."""
        layout = self.state.engine.layout
        is_local = config.criterion == "random" and not layout.is_replicated
        scores = _random_part_scores(config, layout) if is_local else None
        values = self._values(config)
        return prune(values, self.state.masks, config, self.state.engine.partition, self.ranks.gather, scores)

    def _select(self, config: PruneConfig) -> PruneResult:
        """Select by scores of the whole network, computed on rank 0."""
        state, ranks, is_main = self.state, self.ranks, self.ranks.is_main
        values = {n: v for n, v in state.gather_full(self._values(config)) if is_main}  # others only join collectives
        masks = {n: m for n, m in state.gather_full(state.masks) if is_main}
        with self.network.gathered() as network:
            if CRITERIA[config.criterion].needs == "network":
                return self._select_by_synflow(config, network, values, masks)
            scores = ranks.keep_on_main(lambda: self._gradient_scores(network, values, masks), what="gradients")
        own = self._own_part(scores, "scores")
        return prune(state.weights, state.masks, config, state.engine.partition, ranks.gather, own)

    def _values(self, config: PruneConfig) -> dict[str, Tensor]:
        """Return this rank's part of the weights to score: the trained ones, or masked copies of the initial ones."""
        weights = self.state.weights
        if CRITERIA[config.criterion].weights_from != "initial":
            return {name: weight.detach() for name, weight in weights.items()}
        values = {name: self.initial[name].to(weight.device, copy=True) for name, weight in weights.items()}
        masking.apply_masks(values, self.state.masks)
        return values

    def _gradient_scores(self, network: nn.Module, values: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
        """Return gradient scores of the prunable weights from the first global batches of the next round.

        They are taken one sample at a time, the same for any number of ranks; one shard is held at a time.
        """
        config, sampler = self.plan.config, self.plan.sampler
        patches = patch_reader_of(config, sampler)
        positions = islice(sampler.positions(Position(0, 0), config.train.epochs), config.prune.criterion_batches)
        slots = [slot for at in positions for slot in sampler.slots(self.state.progress.round + 1, at)]

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for sample in calibration_batches(slots, self.pool, patches, self.stop):
                self._check_stop()
                batch = Batch.of(sample, pin=False).to(self.ranks.device)
                yield batch.degraded, batch.clean

        def loss(restored: Tensor, clean: Tensor) -> Tensor:
            return per_sample_l1(restored, clean).mean()

        gradients = saliency.gradients(network, pairs(), loss, at=values)
        return {n: s for n, s in saliency.scores(values, gradients).items() if n in masks}

    def _select_by_synflow(
        self, config: PruneConfig, network: nn.Module, values: dict[str, Tensor], masks: Masks
    ) -> PruneResult:
        """Run SynFlow on rank 0 and broadcast its masks."""
        results: list[PruneResult] = []

        def iterate() -> tuple[float, int, tuple[str, ...]]:
            results.append(synflow.iterate(network, values, masks, config, before_step=self._check_stop))
            return results[0][1:]

        numbers = self.ranks.on_main(iterate, what="SynFlow")
        return PruneResult(self._own_part(results[0].masks if results else None, "masks"), *numbers)

    def _own_part(self, whole: dict[str, Tensor] | None, what: str) -> dict[str, Tensor]:
        """Broadcast rank 0's tensors; return this rank's part of the prunable ones on its device."""
        own = self.ranks.broadcast_tensors(whole, what=what, layout=self.state.engine.layout)
        return {name: own[name].to(mask.device) for name, mask in self.state.masks.items()}

    def _check_stop(self) -> None:
        if self.stop():
            raise Stopped("stopped on request while selecting; all rounds that were trained are committed")

    def rewind_point(self) -> dict[str, Tensor]:
        """Return this rank's part of the values to which surviving weights are rewound.

        Raises UserError, on every rank, if the file of the rewind point is damaged or missing.
        """
        if self.plan.config.rewinds_to() != "step":
            return self.initial
        digest, layout = self.state.progress.rewind_digest, self.state.engine.layout
        name = rewind_name(digest)

        def read() -> dict[str, Tensor]:
            weights = self.checkpoints.tensors(name) or {}
            return weights if weights.keys() == layout.shapes.keys() else {}

        weights = self.ranks.keep_on_main(read, what="rewind point")
        point = self.ranks.broadcast_tensors(weights, what="rewind point", layout=layout)
        if not point or masking.digest_of(self.state.gather_full(point)) != digest:
            raise UserError(
                f"{self.checkpoints.store.where(name)} is damaged or missing, and nothing else holds the weights of "
                f"step {self.plan.config.rewind.step}. Restore a copy of it, or train in a new run.folder.",
                everywhere=True,
            )
        return point


def _random_part_scores(config: PruneConfig, layout: ShardLayout) -> Callable[[str], Tensor]:
    """Return a function from a name to this rank's part of the scores of the whole tensor."""

    def scores_of(name: str) -> Tensor:
        whole = torch.empty(layout.shapes[name])
        return layout.part_of(name, scores_of_weights(config.criterion, name, whole, config.seed))

    return scores_of
