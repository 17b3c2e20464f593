"""Uses a ticket's network: scores it with any protocol on any shards, or restores images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from mirl_dist.cli import show
from mirl_dist.config.config import Config, portable
from mirl_dist.config.tasks import Task
from mirl_dist.data.shards import Shards
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import UserError
from mirl_dist.evaluation import evaluate
from mirl_dist.evaluation.protocols import PROTOCOLS
from mirl_dist.evaluation.score import library_versions
from mirl_dist.observability import progress
from mirl_dist.storage import Folder, output_paths
from mirl_dist.storage.configured import open_configured
from mirl_dist.tickets.open import FileTicket, network, open_ticket
from mirl_dist.training import dataloaders


class EvalOptions(NamedTuple):
    """Overrides of the ticket's evaluation section; None: no override."""

    protocols: Sequence[str] | None = None
    tile_pixels: int | None = None
    precision: str | None = None
    compile: bool | None = None
    device: str | None = None


def _settings(config: Config, options: EvalOptions) -> evaluate.EvalSettings:
    unknown = [name for name in options.protocols or () if name not in PROTOCOLS]
    if unknown:
        raise UserError(f"--protocol: found '{unknown[0]}'. Use {', '.join(PROTOCOLS)}.")
    if options.precision not in (None, "fp32", "bf16"):
        raise UserError(f"--precision: found '{options.precision}'. Use fp32 or bf16.")
    check_tiles(options.tile_pixels, config.evaluate.tile_overlap)
    check_device(options.device)
    changes = options._asdict() | {"protocols": tuple(dict.fromkeys(options.protocols or ())) or None}
    given = {key: value for key, value in changes.items() if value is not None and key != "device"}
    return dataloaders.eval_settings_of(config.evaluate.model_copy(update=given))


def check_tiles(tile_pixels: int | None, overlap: int) -> None:
    """Raise UserError if tiles are too small."""
    if tile_pixels is not None and (tile_pixels < 64 or tile_pixels <= overlap):
        raise UserError(
            f"--tile: found {tile_pixels}. Give 64 or more pixels, and more than the {overlap} that tiles share."
        )


def check_device(device: str | None) -> None:
    """Raise UserError for a device that is none."""
    if device not in (None, "auto", "cpu", "cuda"):
        raise UserError(f"--device: found '{device}'. Use auto, cpu or cuda.")


def print_scores(
    reference: str,
    shards_address: str | None,
    options: EvalOptions,
    *,
    table: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Score a ticket on the run's shards or on others; the launched ranks share the images.

    Local paths in a ticket file are ignored in favour of this user's own; packed tickets contain none.
    """
    output_paths.check_file(table, "--table", overwrite=overwrite, reads=[reference])
    opened = open_ticket(reference)
    config, ticket = opened.config, opened.ticket()
    if isinstance(opened, FileTicket):
        if shards_address is None:
            raise UserError(
                f"found {reference}, a ticket file, which does not say where shards are. Name the shards with --shards."
            )
        config = portable(config)
    settings = _settings(config, options)
    address = shards_address or config.data.shards
    output_paths.check_file(table, "--table", overwrite=overwrite, reads=[address])
    shards = Shards(open_configured(config.store, address))
    jobs = _plan_jobs(config, shards, config.evaluate.sets if shards_address is None else None, settings)
    model = network(config, opened.trained_weights())
    ranks = Ranks(device=options.device or config.train.device)
    pool = dataloaders.shard_pool_of(config, shards, "evaluate", stop_requested=lambda: False)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):  # standard output is reserved for JSON
        if ranks.is_main and ranks.device_note:
            progress.say(ranks.device_note)
        scored = evaluate.evaluate(model.to(ranks.device), pool, jobs, ranks, settings)
    pool.close()
    if ranks.is_main:
        if table is not None:
            Folder(table.parent).put(table.name, scored.table())
        if as_json:
            print(json.dumps(_scores_as_dict(ticket.round, settings, shards, scored), indent=1))
        else:
            _print_tables(f"{reference}, round {ticket.round}", settings, scored)
            if table is not None:
                progress.say(f"scores of each image: {table}")
    ranks.close()


def _plan_jobs(
    config: Config, shards: Shards, sets: Sequence[str] | None, settings: evaluate.EvalSettings
) -> list[evaluate.EvalJob]:
    tasks = tuple(Task.of(name) for name in config.data.mix)
    jobs = evaluate.plan_jobs(shards, tasks, sets, by=settings.protocols)
    if not jobs:
        raise UserError(f"{shards.store.where()} holds no evaluation images for {', '.join(t.name for t in tasks)}.")
    return jobs


def _print_tables(title: str, settings: evaluate.EvalSettings, scored: evaluate.EvalResult) -> None:
    for protocol in settings.protocols:
        show.print_score_table(f"{title}, {protocol.name}", scored.scores[protocol.name])
    for protocol in settings.protocols:
        progress.say(f"{protocol.name}: {protocol.text}")
    by = ", ".join(protocol.name for protocol in settings.protocols if protocol.colour == "rgb")
    for name, count in scored.grey.items() if by else ():
        progress.say(f"{name}: grey images, scored as RGB with three equal channels by {by} (images: {count})")
    progress.say(", ".join(f"{key}: {value}" for key, value in settings.as_recorded().items()))


def _scores_as_dict(
    round_: int, settings: evaluate.EvalSettings, shards: Shards, scored: evaluate.EvalResult
) -> dict[str, object]:
    headline = settings.protocols[0]
    dumped = {p: {name: score.model_dump() for name, score in of.items()} for p, of in scored.scores.items()}
    return {
        "round": round_,
        "protocol": headline.text,
        "scores": dumped[headline.name],
        "protocols": {protocol.name: protocol.text for protocol in settings.protocols},
        "also": {name: of for name, of in dumped.items() if name != headline.name},
        "grey_images": scored.grey,
        "measured": settings.as_recorded(),
        "manifest_digest": shards.manifest.digest(),
        "versions": library_versions(),
    }
