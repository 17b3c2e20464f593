"""Runs training on one rank, from the config to the last ticket: the composition root."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirl_dist.config.canonical_json import to_json
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import journal_folder
from mirl_dist.config.schema_training import OptimiserSection
from mirl_dist.data.sampler import split_batch
from mirl_dist.distributed.device_errors import out_of_memory_in_training
from mirl_dist.distributed.engines.base import MakeOptimiser
from mirl_dist.distributed.engines.sharding import local_part
from mirl_dist.distributed.engines.spec import engine_from_env
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import MirlError, Stopped, UserError
from mirl_dist.models.compiled import compile_blocks, compiles_for_training
from mirl_dist.observability.mlflow.tracker import FAREWELL_SECONDS, MlflowTracker, Tracker
from mirl_dist.observability.progress import say
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import in_scope
from mirl_dist.storage import Folder
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.training import dataloaders, lottery
from mirl_dist.training.checkpointing import resume
from mirl_dist.training.checkpointing.checkpoint import OUTBOX, RUN, Checkpoints
from mirl_dist.training.checkpointing.committer import Committer
from mirl_dist.training.checkpointing.resume import LatestCommit
from mirl_dist.training.dataloaders import RunInputs
from mirl_dist.training.initial import InitialState, OpenTicket, create_network
from mirl_dist.training.preflight import RunPlan, describe, open_run_store, preflight_on_ranks
from mirl_dist.training.round import RoundRunner, TrainNetwork
from mirl_dist.training.round_report import RoundReporter, params_of, tags_of
from mirl_dist.training.selection import Pruner
from mirl_dist.training.state import TrainState

LEAVE_SECONDS = 2.0  # of the stop deadline, reserved for closing store and lease
SETTLE_SECONDS = 10.0  # granted to a commit in progress when a run fails


def run(config: Config, resume_mode: str, stop: StopSignal, open_ticket: OpenTicket) -> str:
    """Train all rounds of a run on this rank; return the command that shows the run in MLflow.

    resume_mode: 'auto', 'never' or 'must'; open_ticket: opens `start.ticket`. Raises MirlError and Stopped.
    """
    ranks = join_ranks(config, stop)
    plan = preflight_on_ranks(config, resume_mode, ranks, open_ticket)
    if ranks.is_main:
        if ranks.device_note:
            say(ranks.device_note)
        say(describe(config, plan, ranks.world))
    inputs = dataloaders.open_inputs(plan, ranks, stop)
    status: dict[str, Any] = {}
    check_again = partial(open_run_store, config, plan.manifest_digest(), resume_mode, open_ticket)
    with resume.hold_lease(plan, ranks, status, stop, check_again) as checkpoints:
        tracker = train_under_lease(plan, inputs, ranks, checkpoints, status, stop, open_ticket)
        inputs.pool.close()
    ranks.barrier()
    ranks.close()
    return tracker.address()


def train_under_lease(
    plan: RunPlan,
    inputs: RunInputs,
    ranks: Ranks,
    checkpoints: Checkpoints,
    status: dict[str, Any],
    stop: StopSignal,
    open_ticket: OpenTicket,
) -> Tracker:
    """Start or resume the run and train all its rounds; return its tracker. status: the lease's heartbeats."""
    config = plan.config
    latest = resume.load_latest(checkpoints, ranks)
    start, run_id = resume.load_or_create_initial(checkpoints, plan, open_ticket, ranks)
    tracker = tracker_of(config, checkpoints, latest, run_id, ranks)
    crash_guard = resume.crash_loop_guard(run_id, plan, ranks)
    network, initial = network_of(config, start, ranks)
    state = network.state
    newest = resume.restore(state, latest, ranks)
    # The writer retries writes to a folder (disk full); an S3 store retries by itself.
    writer = AsyncWriter(config.store.patience_seconds if isinstance(plan.store, Folder) else 0.0)
    committer = Committer(config.checkpoint, ranks, state, checkpoints, writer, inputs.loader, tracker)
    report = RoundReporter(config, checkpoints, tracker, crash_guard, status)
    runner = RoundRunner(plan, inputs, ranks, state, network, committer, report, stop)
    pruner = Pruner(plan, state, initial, network, inputs.pool, checkpoints, ranks, stop)
    stop.busy = lambda: writer.busy
    stop.graceful = True  # from here on a stop request leads to a commit
    tracker.begin_run(params_of(config), tags_of(plan, ranks))
    tracker.log_file(RUN, to_json(config.dump()), "run")
    if newest is not None and config.prune.ends_after(newest.round, newest.total_sparsity) and ranks.is_main:
        say(f"all rounds are finished; nothing is left to train (prune.rounds: {config.prune.rounds})")
    with _ends_in_mlflow(tracker, committer, stop), crash_guard, out_of_memory_in_training():
        lottery.play(runner, pruner, newest)
        committer.finish_run(config.keep)
    return tracker


def join_ranks(config: Config, stop: StopSignal) -> Ranks:
    """Join the ranks of this launch; a stop request to any rank reaches all of them."""
    if config.train.compile and (engine := engine_from_env(os.environ).name) != "ddp":
        raise UserError(
            f"train.compile: found true with engine {engine}; blocks are compiled with DDP alone. Launch with a file "
            "for DDP, or set train.compile=false.",
            everywhere=True,
        )
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


def optimiser_of(section: OptimiserSection) -> MakeOptimiser:
    """Return a factory of fresh optimisers over named parameters."""
    build: Callable[..., torch.optim.Optimizer] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[section.name]
    usual_decay = {"adam": 0.0, "adamw": 0.01}[section.name]

    def make(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        # Not on a CPU: its fused update rounds the end of a tensor otherwise than the rest, so that engines which cut
        # tensors elsewhere would train other weights.
        on_gpu = all(parameter.device.type == "cuda" for parameter in parameters.values())
        return build(
            list(parameters.values()),
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=usual_decay if section.weight_decay is None else section.weight_decay,
            fused=on_gpu or None,
        )

    return make


def tracker_of(
    config: Config, checkpoints: Checkpoints, latest: LatestCommit | None, run_id: str, ranks: Ranks
) -> Tracker:
    """Return the tracker of this rank: MLflow's on rank 0. Raises UserError on every rank for a rejected address."""
    if not config.tracking.enabled:
        return Tracker()

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

    return ranks.keep_on_main(connect, what="MLflow") or Tracker()


def network_of(config: Config, start: InitialState, ranks: Ranks) -> tuple[TrainNetwork, dict[str, Tensor]]:
    """Build the network with a run's initial weights and masks, in the launch's engine. Clears start.weights.

    Returns also this rank's part of the initial weights.
    """
    model = create_network(config)
    model.load_state_dict(start.weights)
    model.to(ranks.device)
    pixels, samples = config.data.patch_pixels, 1
    if config.train.compile:
        compile_blocks(model)
        # The shape of training, so that nothing is compiled for the example alone.
        samples = split_batch(config.batch.global_, config.batch.forward, ranks.world).forward
    example = torch.zeros(samples, 3, pixels, pixels)
    with compiles_for_training() if config.train.compile else nullcontext():
        engine, wrapped = ranks.network.engine(model, optimiser_of(config.optimiser), example)
    initial, masks = local_part(engine.layout, start.weights), local_part(engine.layout, start.masks or {})
    start.weights.clear()  # frees the full tensors: a rank with a shard keeps only its part
    dense = masking.dense_masks(initial, in_scope(initial, config.prune.scope))
    state = TrainState(engine, masks or dense, start.parent, ranks.gather_here)
    masking.apply_masks(state.weights, state.masks)
    engine.weights_changed()
    # Images to score have many sizes, for each of which blocks would be compiled: they are restored by a copy.
    unwrapped = None if ranks.network.is_sharded or config.train.compile else model
    return TrainNetwork(wrapped, unwrapped, partial(create_network, config), state, ranks.device), initial


@contextmanager
def _ends_in_mlflow(tracker: Tracker, committer: Committer, stop: StopSignal) -> Iterator[None]:
    """Log the final status of the run to MLflow: FINISHED, KILLED after a stop request, FAILED after an error.

    After a stop request, waits until the last commit is written; after an error, at most SETTLE_SECONDS.
    """
    try:
        yield
    except Exception as end:
        if isinstance(end, MirlError | Stopped):
            # This process reports the error: it must not exit early when the launcher sends SIGTERM.
            stop.is_cleanup = lambda: False
        if committer.checkpoints.lost():
            raise  # another launch has taken over the run and logs its end
        status = "KILLED" if isinstance(end, Stopped) else "FAILED"
        tracker.end_round(status)
        try:
            with committer.ranks.in_phase("uploading"):
                if isinstance(end, Stopped):
                    committer.ranks.on_main(committer.writer.wait, what="last commit")
                committer.writer.wait_at_most(min(SETTLE_SECONDS, stop.left_seconds() - LEAVE_SECONDS))
        finally:
            left = stop.left_seconds() - LEAVE_SECONDS
            tracker.end_run(status, seconds=max(0.0, min(FAREWELL_SECONDS, left)))
        raise
    tracker.end_run()
