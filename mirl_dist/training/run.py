"""Runs training on one rank, from the config to the last ticket: the composition root."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from mirl_dist.config.canonical_json import to_json
from mirl_dist.config.config import Config
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import MirlError, Stopped
from mirl_dist.observability.mlflow.tracker import FAREWELL_SECONDS, Tracker
from mirl_dist.observability.progress import say
from mirl_dist.storage import Folder
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.training import builders, dataloaders, lottery, resume
from mirl_dist.training.checkpoint import RUN, Checkpoints
from mirl_dist.training.committer import Committer
from mirl_dist.training.dataloaders import RunInputs
from mirl_dist.training.initial import OpenTicket
from mirl_dist.training.preflight import RunPlan, describe, open_run_store, preflight_on_ranks
from mirl_dist.training.round import RoundRunner
from mirl_dist.training.round_report import RoundReporter, params_of, tags_of
from mirl_dist.training.selection import Pruner

LEAVE_SECONDS = 2.0  # of the stop deadline, reserved for closing store and lease
SETTLE_SECONDS = 10.0  # granted to a commit in progress when a run fails


def run(config: Config, resume_mode: str, stop: StopSignal, open_ticket: OpenTicket) -> str:
    """Train all rounds of a run on this rank; return the command that shows the run in MLflow.

    resume_mode: 'auto', 'never' or 'must'; open_ticket: opens `start.ticket`. Raises MirlError and Stopped.
    """
    ranks = builders.join_ranks(config, stop)
    plan = preflight_on_ranks(config, resume_mode, ranks, open_ticket)
    if ranks.is_main:
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
    tracker = builders.tracker_of(config, checkpoints, latest, run_id, ranks)
    crash_guard = resume.crash_loop_guard(run_id, plan, ranks)
    network, initial = builders.network_of(config, start, ranks)
    state = network.state
    newest = resume.restore(state, latest, ranks)
    # The writer retries writes to a folder (disk full); an S3 store retries by itself.
    writer = AsyncWriter(config.store.patience_seconds if isinstance(plan.store, Folder) else 0.0)
    committer = Committer(config.checkpoint, ranks, state, checkpoints, writer, inputs.loader, tracker)
    report = RoundReporter(config, checkpoints, tracker, crash_guard, status)
    runner = RoundRunner(plan, inputs, ranks, state, network, committer, report, stop)
    pruner = Pruner(plan, state, initial, network, inputs.calibration, checkpoints, ranks, stop)
    stop.busy = committer.busy
    stop.graceful = True  # from here on a stop request leads to a commit
    tracker.begin_run(params_of(config), tags_of(plan, ranks))
    tracker.log_file(RUN, to_json(config.dump()), "run")
    if newest is not None and config.prune.ends_after(newest.round, newest.total_sparsity) and ranks.is_main:
        say(f"all rounds are finished; nothing is left to train (prune.rounds: {config.prune.rounds})")
    with _ends_in_mlflow(tracker, committer, stop), crash_guard:
        lottery.play(runner, pruner, newest)
        committer.finish_run(config.keep)
    return tracker


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
