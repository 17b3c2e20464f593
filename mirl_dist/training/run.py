"""Config to live objects: the only wiring. Literal dictionaries of words to builders."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mirl_dist import __version__
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import journal_folder
from mirl_dist.distributed.engines.base import MakeOptimiser
from mirl_dist.distributed.engines.sharding import local_part
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import Stopped, UserError
from mirl_dist.evaluation import evaluate
from mirl_dist.evaluation.protocols import PROTOCOLS
from mirl_dist.observability import progress
from mirl_dist.observability.console import rank_here
from mirl_dist.observability.mlflow.tracker import FAREWELL_SECONDS, MlflowTracker, NoTracker, Tracker
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import PruneConfig, in_scope
from mirl_dist.storage.commits import to_json as pretty
from mirl_dist.training import dataloaders, lottery, round_report
from mirl_dist.training import initial as starting
from mirl_dist.training import resume as resuming
from mirl_dist.training.checkpoint import OUTBOX, RUN, Checkpoints
from mirl_dist.training.initial import OpenTicket
from mirl_dist.training.preflight import RunPlan, check_run_folder, describe, preflight_on_ranks
from mirl_dist.training.resume import LatestCommit
from mirl_dist.training.round import RoundRunner
from mirl_dist.training.state import TrainState
from mirl_dist.training.ticket import Ticket

OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_DECAYS = {"adam": 0.0, "adamw": 0.01}
LEAVE_SECONDS = 2.0  # of the deadline, to take leave of store and lease
SETTLE_SECONDS = 10.0  # for a commit under way when a run fails


def optimiser_of(config: Config) -> MakeOptimiser:
    """A maker of fresh optimisers over named parameters."""
    made = config.optimiser

    def make(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        build: Callable[..., torch.optim.Optimizer] = OPTIMISERS[made.name]
        return build(
            list(parameters.values()),
            lr=made.lr,
            betas=made.betas,
            eps=made.eps,
            weight_decay=_DECAYS[made.name] if made.weight_decay is None else made.weight_decay,
        )

    return make


def rule_of(config: Config) -> PruneConfig:
    """How rounds are pruned."""
    prune = config.prune
    return PruneConfig(
        prune.fraction,
        prune.criterion,
        prune.per,
        prune.output_layers,
        prune.output_factor,
        config.run.seed,
        floor=prune.floor,
        iterations=prune.synflow_steps,
    )


def lottery_of(config: Config, steps_per_epoch: int) -> lottery.LotteryConfig:
    prune, rewind = config.prune, config.rewind
    return lottery.LotteryConfig(
        prune.rounds, prune.target_sparsity, config.rewinds_to(), rewind.what, rewind.step or 0, steps_per_epoch
    )


def scoring_of(config: Config) -> evaluate.EvalSettings:
    """How images are restored and scored."""
    said = config.evaluate
    return evaluate.EvalSettings(
        tuple(PROTOCOLS[name] for name in said.protocols),
        said.seed,
        said.tile_pixels,
        said.tile_overlap,
        said.precision,
        said.compile,
    )


def _tracker(
    config: Config, checkpoints: Checkpoints, newest: LatestCommit | None, run_id: str, ranks: Ranks
) -> Tracker:
    """MLflow's door on rank 0, its twin elsewhere; an address that is refused is refused on every rank."""
    if not config.tracking.enabled:
        return NoTracker()
    opened: list[Tracker] = []

    def on_main() -> None:
        opened.append(
            MlflowTracker(
                uri=config.tracking.uri,
                experiment=config.tracking.experiment,
                run_name=config.tracking.run_name or Path(config.run.folder).name,
                remembered=checkpoints.mlflow_ids(),
                remember=checkpoints.save_mlflow_ids,
                journal=journal_folder(config.run.folder, config.tracking.journal, run_id),
                inherited=b"" if newest is None else newest.parts.get(OUTBOX, b""),
            )
        )

    ranks.on_main(on_main, what="MLflow")
    return opened[0] if opened else NoTracker()


def _tags(config: Config, prepared: RunPlan, ranks: Ranks) -> dict[str, str]:
    """By what runs are found and compared in MLflow."""
    manifest = prepared.shards.manifest
    return {
        **round_report.tags_of(config),
        "shards": manifest.name,
        "manifest": manifest.digest(),
        "ranks": str(ranks.world),
        "engine": ranks.engine_spec.name,
    }


def _identity(
    config: Config, prepared: RunPlan, initial_digest: str, start_digest: str, parent: str | None
) -> dict[str, Any]:
    """What run.json says."""
    start = {"start_digest": start_digest, "parent": parent} if start_digest else {}
    return {
        "config": config.dump(),
        "fingerprint": config.fingerprint(),
        "manifest_digest": prepared.shards.manifest.digest(),
        "initial_digest": initial_digest,
        **start,
        "id": uuid.uuid4().hex,
        "versions": {"mirl_dist": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def run(config: Config, resume: str, stop_asked: StopSignal, open_ticket: OpenTicket) -> str:
    """The whole run on this rank; what to type to see it in MLflow.

    open_ticket: opens `start.ticket`. Raises UserError and Stopped.
    """
    ranks = Ranks(
        device=config.train.device,
        precision=config.train.precision,
        seed=config.run.seed,
        timeout_seconds=config.ranks.timeout_seconds,
    )
    stop_asked.deadline_seconds = config.preempt.deadline_seconds
    stop_asked.phase = lambda: ranks.phase
    stop_asked.sources.append(ranks.stop_requested)
    stop_asked.listeners.append(ranks.request_stop)
    prepared = preflight_on_ranks(config, resume, ranks, open_ticket)
    if ranks.is_main:
        progress.say(describe(config, prepared, ranks.world))
    supply = dataloaders.shard_pool_of(config, prepared.shards, rank_here(ranks.rank), stop_asked)
    stream = dataloaders.train_loader_of(config, supply, prepared.sampler, prepared.batch_split, ranks)
    look_ahead = dataloaders.evaluation_looks_ahead(supply, prepared.jobs, ranks)
    dataloaders.check_damage(supply, prepared.jobs, ranks, config.data.damage)
    held = dataloaders.resident_images_of(config, supply, prepared.jobs, ranks)
    news: dict[str, Any] = {}

    def refuse_another_run() -> None:
        check_run_folder(Checkpoints(prepared.store), config, prepared.shards.manifest.digest(), resume, open_ticket)

    with resuming.hold_lease(config, prepared.store, ranks, news, stop_asked, refuse_another_run) as checkpoints:
        newest = resuming.load_latest(checkpoints, ranks)
        begun = resuming.load_or_create_initial(
            checkpoints,
            lambda: starting.create_initial(config, open_ticket),
            lambda weights, masks, parent: _identity(config, prepared, weights, masks, parent),
            ranks,
        )
        tracker = _tracker(config, checkpoints, newest, begun.id, ranks)
        footprint = resuming.crash_loop_guard(begun.id, config, prepared.sampler, prepared.shards, ranks)
        model = starting.create_network(config)
        model.load_state_dict(begun.initial)
        model.to(ranks.device)
        pixels = config.data.patch_pixels
        engine, network = ranks.engine(model, optimiser_of(config), torch.zeros(1, 3, pixels, pixels))
        initial, masks = local_part(engine.layout, begun.initial), local_part(engine.layout, begun.masks or {})
        begun.initial.clear()  # where this rank is to keep a part, it keeps no more
        dense = masking.dense_masks(initial, in_scope(initial, config.prune.scope))
        state = TrainState(engine, masks or dense, begun.parent, ranks.gather_here)
        masking.apply_masks(state.weights, state.masks)
        engine.weights_changed()
        ticket = resuming.restore(state, newest, ranks)
        rounds = RoundRunner(
            config=config,
            rule=rule_of(config),
            ranks=ranks,
            state=state,
            model=network,
            bare=None if ranks.is_sharded else model,
            make_network=lambda: starting.create_network(config),
            initial=initial,
            shards=prepared.shards,
            supply=supply,
            order=prepared.sampler,
            shares=prepared.batch_split,
            stream=stream,
            jobs=prepared.jobs,
            how=scoring_of(config),
            held=held,
            probe=dataloaders.calibration_of(config, supply, prepared.sampler, ranks, stop_asked),
            look_ahead=look_ahead,
            checkpoints=checkpoints,
            keeper=resuming.commit_writer(config, prepared.store),
            footprint=footprint,
            tracker=tracker,
            stop_requested=stop_asked,
            news=news,
        )
        stop_asked.busy = lambda: rounds.keeper.busy
        stop_asked.graceful = True  # from here on there is something to commit
        tracker.begin_run(round_report.params_of(config), _tags(config, prepared, ranks))
        tracker.log_file(RUN, pretty(config.dump()), "run")
        with _told_how_it_ended(tracker, rounds, stop_asked), footprint:
            _play(config, rounds, ticket)
        supply.close()
    ranks.barrier()
    ranks.close()
    return tracker.address()


def _play(config: Config, rounds: RoundRunner, newest: Ticket | None) -> None:
    """All rounds that are still to do."""
    game = lottery_of(config, rounds.order.steps_per_epoch)
    if newest is not None and game.finished(newest) and rounds.ranks.is_main:
        progress.say(f"all rounds are finished; nothing is left to train (prune.rounds: {config.prune.rounds})")
    lottery.play(
        game,
        rounds.state,
        rounds.initial,
        rounds.ranks,
        newest=newest,
        train_and_score=rounds.train_and_score,
        record=rounds.record,
        select=rounds.select,
        rewind_point=rounds.rewind_point,
        stop_if_requested=rounds.stop_if_asked,
    )
    rounds.close()


@contextmanager
def _told_how_it_ended(tracker: Tracker, rounds: RoundRunner, stop_asked: StopSignal) -> Iterator[None]:
    """The run's end in MLflow: FINISHED, KILLED when it was asked to stop, FAILED by a fault or a lost rank. A run that
    was asked to stop ends when its last commit is written; one that fails gives it some seconds."""
    try:
        yield
    except Exception as end:
        if isinstance(end, UserError | Stopped):  # it will be said; ranks that have gone before are no news
            stop_asked.is_cleanup = lambda: False
        if rounds.checkpoints.lost():
            raise  # the run is another launch's, which tells how it ends
        status = "KILLED" if isinstance(end, Stopped) else "FAILED"
        tracker.end_round(status)
        try:
            with rounds.ranks.in_phase("uploading"):
                if isinstance(end, Stopped):
                    rounds.ranks.on_main(rounds.keeper.wait, what="last commit")
                rounds.keeper.wait_at_most(min(SETTLE_SECONDS, stop_asked.left_seconds() - LEAVE_SECONDS))
        finally:
            left = stop_asked.left_seconds() - LEAVE_SECONDS
            tracker.end_run(status, seconds=max(0.0, min(FAREWELL_SECONDS, left)))
        raise
    tracker.end_run()
