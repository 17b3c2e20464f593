"""Builds objects from the config: ranks, optimiser, pruning, tracker, network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mirl_dist.config import schema_training
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import journal_folder
from mirl_dist.distributed.engines.base import MakeOptimiser
from mirl_dist.distributed.engines.sharding import local_part
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.observability.mlflow.tracker import MlflowTracker, NoTracker, Tracker
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import PruneConfig, in_scope
from mirl_dist.training.checkpoint import OUTBOX, Checkpoints
from mirl_dist.training.initial import InitialState, create_network
from mirl_dist.training.resume import LatestCommit
from mirl_dist.training.round import TrainNetwork
from mirl_dist.training.state import TrainState

OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_WEIGHT_DECAY = {"adam": 0.0, "adamw": 0.01}


def join_ranks(config: Config, stop: StopSignal) -> Ranks:
    """Join the ranks of this launch; a stop request to any rank reaches all of them."""
    ranks = Ranks(
        device=config.train.device,
        precision=config.train.precision,
        seed=config.run.seed,
        timeout_seconds=config.ranks.timeout_seconds,
    )
    stop.deadline_seconds = config.preempt.deadline_seconds
    stop.phase = lambda: ranks.phase
    stop.sources.append(ranks.stop_requested)
    stop.listeners.append(ranks.request_stop)
    return ranks


def optimiser_of(section: schema_training.OptimiserSection) -> MakeOptimiser:
    """Return a factory of fresh optimisers over named parameters."""

    def make(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        build: Callable[..., torch.optim.Optimizer] = OPTIMISERS[section.name]
        return build(
            list(parameters.values()),
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=_WEIGHT_DECAY[section.name] if section.weight_decay is None else section.weight_decay,
        )

    return make


def prune_config_of(section: schema_training.PruneSection, seed: int) -> PruneConfig:
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


def tracker_of(
    config: Config, checkpoints: Checkpoints, latest: LatestCommit | None, run_id: str, ranks: Ranks
) -> Tracker:
    """Return an MLflow tracker on rank 0, else NoTracker. Raises UserError on every rank for a rejected address."""
    if not config.tracking.enabled:
        return NoTracker()

    def connect() -> Tracker:
        return MlflowTracker(
            uri=config.tracking.uri,
            experiment=config.tracking.experiment,
            run_name=config.tracking.run_name or Path(config.run.folder).name,
            remembered=checkpoints.mlflow_ids(),
            remember=checkpoints.save_mlflow_ids,
            journal=journal_folder(config.run.folder, config.tracking.journal, run_id),
            inherited=b"" if latest is None else latest.parts.get(OUTBOX, b""),
        )

    return ranks.keep_on_main(connect, what="MLflow") or NoTracker()


def network_of(config: Config, start: InitialState, ranks: Ranks) -> tuple[TrainNetwork, dict[str, Tensor]]:
    """Build the network with a run's initial weights and masks, in the launch's engine. Clears start.weights.

    Returns also this rank's part of the initial weights.
    """
    model = create_network(config)
    model.load_state_dict(start.weights)
    model.to(ranks.device)
    pixels = config.data.patch_pixels
    engine, wrapped = ranks.network.engine(model, optimiser_of(config.optimiser), torch.zeros(1, 3, pixels, pixels))
    initial, masks = local_part(engine.layout, start.weights), local_part(engine.layout, start.masks or {})
    start.weights.clear()  # frees the full tensors: a rank with a shard keeps only its part
    dense = masking.dense_masks(initial, in_scope(initial, config.prune.scope))
    state = TrainState(engine, masks or dense, start.parent, ranks.gather_here)
    masking.apply_masks(state.weights, state.masks)
    engine.weights_changed()
    unwrapped = None if ranks.network.is_sharded else model
    return TrainNetwork(wrapped, unwrapped, partial(create_network, config), state, ranks.device), initial
