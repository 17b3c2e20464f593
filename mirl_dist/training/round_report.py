"""Reports tickets and losses to the terminal and MLflow, and the position of the run to the lease and crash guard."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mirl_dist.config.config import Config
from mirl_dist.data.image_strip import rows, strip
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow.records import flatten
from mirl_dist.observability.mlflow.tracker import Tracker
from mirl_dist.observability.progress import say
from mirl_dist.pruning import masks as masking
from mirl_dist.training.checkpointing.checkpoint import MASK, PICTURES, SCORES, TICKET, Checkpoints
from mirl_dist.training.checkpointing.crash_loop import CrashLoopGuard
from mirl_dist.training.preflight import RunPlan
from mirl_dist.training.state import TrainState, pack_tensors
from mirl_dist.training.ticket import DENSE, Ticket, metrics


@dataclass
class RoundReporter:
    """Reports rounds. status: the content of the lease's heartbeats; written here, read by the lease's thread."""

    config: Config
    checkpoints: Checkpoints
    tracker: Tracker
    crash_guard: CrashLoopGuard
    status: dict[str, Any]

    def open_round(self, state: TrainState, total_steps: int) -> None:
        """Open the round of `state`, new or resumed, in MLflow and the heartbeats. total_steps: steps of the round."""
        progress, counts = state.progress, state.counts
        weights = state.total()
        surviving = weights - sum(counts.total.values()) + sum(counts.surviving.values())
        self._open_mlflow_round(progress.round, surviving, weights, progress.mask_digest)
        self.status.update(round=progress.round, step=progress.updates, steps=total_steps)

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Log the losses, the learning rate and the speed at a step."""
        self.tracker.log_step(step, values)
        self.status["samples_per_second"] = values["samples_per_second"]

    def log_curve(self, step: int, psnr: Mapping[str, float]) -> None:
        """Log validation during a round. step: optimiser steps done in it; psnr: 'task/set' -> mean PSNR in dB."""
        self.tracker.log_step(step, {f"valid/psnr/{name}": mean for name, mean in psnr.items()})

    def show_ticket(self, ticket: Ticket, masks: Mapping[str, Tensor]) -> None:
        """Print a committed ticket, and log it with its files to MLflow. Idempotent."""
        scores = ", ".join(f"{n} {s.psnr:.2f} dB" for n, s in ticket.scores.items())
        say(
            f"ticket {ticket.round}: {ticket.alive_total:,} of {ticket.total:,} weights "
            f"({ticket.total_sparsity:.1%} sparse); {scores or 'no evaluation sets'}"
        )
        self._open_mlflow_round(ticket.round, ticket.alive_total, ticket.total, ticket.mask_digest)
        self.tracker.log_ticket(ticket.round, metrics(ticket))
        folder = f"tickets/{ticket.round:02d}"
        self.tracker.log_file(f"{folder}/{TICKET}", ticket.dump(), "round")
        self.tracker.log_file(f"{folder}/{MASK}", pack_tensors(masking.pack(masks)), "round")
        table, pictures = self.checkpoints.scores(ticket.round), self.checkpoints.pictures(ticket.round)
        if table is not None:
            self.tracker.log_file(f"{folder}/{SCORES}", table, "round")
        if pictures is not None:
            self.tracker.log_file(f"{folder}/{PICTURES}", pictures, "round")
            with contextlib.suppress(UserError):  # strips of older versions lack image titles
                for row in rows(pictures):
                    self.tracker.log_image(row.title, strip([row]), ticket.round)
        self.tracker.end_round()

    def _open_mlflow_round(self, round_: int, surviving: int, weights: int, mask_digest: str) -> None:
        """Open a round's nested MLflow run, with tags and params for comparison.

        surviving, weights: counts over the whole network, unprunable weights included.
        """
        keys = comparison_keys(self.config) | {
            "round": str(round_),
            "method": method_of(self.config, round_),
            "alive_weights": str(surviving),
            "total_sparsity": f"{1 - surviving / weights:.4f}",
        }
        self.tracker.begin_round(round_, keys | {"mask": mask_digest}, keys)


def method_of(config: Config, round_: int) -> str:
    """Return the method name of a round: the run's; for round 0, DENSE or the kind of control."""
    if round_:
        return config.method()
    return DENSE if config.start.ticket is None else f"control {config.start.kind}"


def arithmetic_of(config: Config) -> dict[str, str]:
    """Return what a ticket records of the arithmetic of training: what differs from float32 and eager execution."""
    unusual = {} if config.train.precision == "fp32" else {"precision": config.train.precision}
    return unusual | ({"compile": "yes"} if config.train.compile else {})


def comparison_keys(config: Config) -> dict[str, str]:
    """Return the config values by which runs and rounds are searched and compared in MLflow."""
    return {
        "criterion": config.prune.criterion,
        "per": config.prune.per,
        "scope": str(config.prune.scope),
        "rewind": config.rewinds_to(),
        "seed": str(config.run.seed),
        "protocol": config.evaluate.protocols[0],
    }


def params_of(config: Config) -> dict[str, object]:
    """Return the params of a run: few, since MLflow lists all of them above each image."""
    return {
        "method": config.method(),
        "seed": config.run.seed,
        "prune.fraction": config.prune.fraction,
        "prune.rounds": config.prune.rounds,
        "train.epochs": config.train.epochs,
        "batch.global": config.batch.global_,
        "optimiser.lr": config.optimiser.lr,
    }


def tags_of(plan: RunPlan, ranks: Ranks) -> dict[str, str]:
    """Return the tags of a run: its comparison keys, its data and ranks, and as `config.<key>` each value that affects
    results and differs from the published one. The full config is in run.json, logged with the run's files."""
    config, manifest = plan.config, plan.shards.manifest
    changed = {f"config.{key}": text for key, text in flatten(config.experiment_keys()).items()}
    return {
        **config.tracking.tags,
        **changed,
        **comparison_keys(config),
        "method": config.method(),
        "fingerprint": config.fingerprint(),
        "shards": manifest.name,
        "manifest": manifest.digest(),
        "ranks": str(ranks.world),
        "engine": ranks.network.spec.name,
    }
