"""Builds objects from the config: ranks, optimiser, pruning, lottery, evaluation, tracker, network."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirl_dist import __version__
from mirl_dist.config import schema_training
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import journal_folder
from mirl_dist.distributed.engines.base import MakeOptimiser
from mirl_dist.distributed.engines.sharding import local_part
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.evaluation.evaluate import EvalSettings
from mirl_dist.evaluation.protocols import PROTOCOLS
from mirl_dist.observability.mlflow.tracker import MlflowTracker, Tracker
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import PruneConfig, in_scope
from mirl_dist.training.checkpoint import OUTBOX, Checkpoints
from mirl_dist.training.initial import create_network
from mirl_dist.training.lottery import LotteryConfig
from mirl_dist.training.resume import LatestCommit, RunOrigin
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


def lottery_of(config: Config, steps_per_epoch: int) -> LotteryConfig:
    """Return the schedule of rounds."""
    prune, rewind = config.prune, config.rewind
    return LotteryConfig(
        prune.rounds, prune.target_sparsity, config.rewinds_to(), rewind.what, rewind.step or 0, steps_per_epoch
    )


def eval_settings_of(section: schema_training.EvaluateSection) -> EvalSettings:
    """Return the settings for restoring and scoring images."""
    return EvalSettings(
        tuple(PROTOCOLS[name] for name in section.protocols),
        section.seed,
        section.tile_pixels,
        section.tile_overlap,
        section.precision,
        section.compile,
    )


def tracker_of(
    config: Config, checkpoints: Checkpoints, latest: LatestCommit | None, run_id: str, ranks: Ranks
) -> Tracker:
    """Return the tracker of this rank: MLflow's on rank 0. Raises UserError on every rank for a rejected address."""
    if not config.tracking.enabled:
        return Tracker()
    trackers: list[Tracker] = []

    def on_main() -> None:
        trackers.append(
            MlflowTracker(
                uri=config.tracking.uri,
                experiment=config.tracking.experiment,
                run_name=config.tracking.run_name or Path(config.run.folder).name,
                remembered=checkpoints.mlflow_ids(),
                remember=checkpoints.save_mlflow_ids,
                journal=journal_folder(config.run.folder, config.tracking.journal, run_id),
                inherited=b"" if latest is None else latest.parts.get(OUTBOX, b""),
            )
        )

    ranks.on_main(on_main, what="MLflow")
    return trackers[0] if trackers else Tracker()


class BuiltNetwork(NamedTuple):
    """The network with its state. initial: this rank's part of the initial weights."""

    network: TrainNetwork
    state: TrainState
    initial: dict[str, Tensor]


def network_of(config: Config, origin: RunOrigin, ranks: Ranks) -> BuiltNetwork:
    """Build the network with a run's initial weights and masks, in the launch's engine. Clears origin.initial."""
    model = create_network(config)
    model.load_state_dict(origin.initial)
    model.to(ranks.device)
    pixels = config.data.patch_pixels
    engine, wrapped = ranks.network.engine(model, optimiser_of(config.optimiser), torch.zeros(1, 3, pixels, pixels))
    initial, masks = local_part(engine.layout, origin.initial), local_part(engine.layout, origin.masks or {})
    origin.initial.clear()  # frees the full tensors: a rank with a shard keeps only its part
    dense = masking.dense_masks(initial, in_scope(initial, config.prune.scope))
    state = TrainState(engine, masks or dense, origin.parent, ranks.gather_here)
    masking.apply_masks(state.weights, state.masks)
    engine.weights_changed()
    unwrapped = None if ranks.network.is_sharded else model
    return BuiltNetwork(
        TrainNetwork(wrapped, unwrapped, partial(create_network, config), state, ranks.device), state, initial
    )


def identity_of(
    config: Config, manifest_digest: str, initial_digest: str, start_digest: str, parent: str | None
) -> dict[str, Any]:
    """Return the content of run.json. start_digest: of round 0's masks, '' if dense; parent: the ticket's digest."""
    start = {"start_digest": start_digest, "parent": parent} if start_digest else {}
    return {
        "config": config.dump(),
        "fingerprint": config.fingerprint(),
        "manifest_digest": manifest_digest,
        "initial_digest": initial_digest,
        **start,
        "id": uuid.uuid4().hex,
        "versions": {"mirl_dist": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
