"""What a round shows of itself: a line on the terminal, and a nested run in MLflow."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from torch import Tensor

from mirl_dist.config.config import Config
from mirl_dist.data.image_strip import rows, strip
from mirl_dist.errors import UserError
from mirl_dist.observability import progress
from mirl_dist.observability.mlflow.records import flat
from mirl_dist.observability.mlflow.tracker import Tracker
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.partition import Counts
from mirl_dist.training.checkpoint import MASK, PICTURES, SCORES, TICKET, Checkpoints, pack_tensors
from mirl_dist.training.ticket import DENSE, Ticket, metrics


def method(config: Config, round_: int) -> str:
    """The word for a round: the run's; for round 0 DENSE, or what control of a ticket it is."""
    if round_:
        return config.method()
    return DENSE if config.start.ticket is None else f"control {config.start.kind}"


def said_of(config: Config) -> dict[str, str]:
    """What runs and rounds are found and compared by."""
    return {
        "criterion": config.prune.criterion,
        "per": config.prune.per,
        "scope": str(config.prune.scope),
        "rewind": config.rewinds_to(),
        "seed": str(config.run.seed),
        "protocol": config.evaluate.protocols[0],
    }


def params_of(config: Config) -> dict[str, object]:
    """The params of a run: few, for MLflow writes all of them above each picture, and would hide it."""
    return {
        "method": config.method(),
        "seed": config.run.seed,
        "prune.fraction": config.prune.fraction,
        "prune.rounds": config.prune.rounds,
        "train.epochs": config.train.epochs,
        "batch.global": config.batch.global_,
        "optimiser.lr": config.optimiser.lr,
    }


def tags_of(config: Config) -> dict[str, str]:
    """The tags of a run: what it is found and compared by, and as `config.<key>` all that changes the numbers and is
    not as published. The whole config is run.json, among the run's files."""
    told = {f"config.{key}": text for key, text in flat(config.experiment_keys()).items()}
    own = told | said_of(config) | {"method": config.method(), "fingerprint": config.fingerprint()}
    return config.tracking.tags | own


def open_round(tracker: Tracker, config: Config, round_: int, counts: Counts, weights: int, mask: str) -> None:
    """Tell MLflow of a round, with tags and params to compare it by. weights: of the whole network; mask: the digest
    of the round's."""
    alive = weights - sum(counts.all.values()) + sum(counts.alive.values())
    said = said_of(config) | {
        "round": str(round_),
        "method": method(config, round_),
        "alive_weights": str(alive),
        "total_sparsity": f"{1 - alive / weights:.4f}",
    }
    tracker.begin_round(round_, said | {"mask": mask}, said)


def ticket(
    tracker: Tracker,
    config: Config,
    checkpoints: Checkpoints,
    ticket: Ticket,
    counts: Counts,
    masks: Mapping[str, Tensor],
) -> None:
    """Show a committed ticket. Twice is once."""
    scores = ", ".join(f"{n} {s.psnr:.2f} dB" for n, s in ticket.scores.items())
    progress.say(
        f"ticket {ticket.round}: {ticket.alive_total:,} of {ticket.total:,} weights "
        f"({ticket.total_sparsity:.1%} sparse); {scores or 'no evaluation sets'}"
    )
    open_round(tracker, config, ticket.round, counts, ticket.total, ticket.mask_digest)
    tracker.log_ticket(ticket.round, metrics(ticket))
    folder = f"tickets/{ticket.round:02d}"
    tracker.log_file(f"{folder}/{TICKET}", ticket.dump(), "round")
    tracker.log_file(f"{folder}/{MASK}", pack_tensors(masking.pack(masks)), "round")
    table, pictures = checkpoints.scores(ticket.round), checkpoints.pictures(ticket.round)
    if table is not None:
        tracker.log_file(f"{folder}/{SCORES}", table, "round")
    if pictures is not None:
        tracker.log_file(f"{folder}/{PICTURES}", pictures, "round")
        with contextlib.suppress(UserError):  # of a strip of older versions, which tells of no images
            for row in rows(pictures):
                tracker.log_image(row.title, strip([row]), ticket.round)
    tracker.end_round()
