"""What is known of a run before any rank starts, and all that can be refused then."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from mirl_dist import models
from mirl_dist.config.config import Config, differences, from_dump
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, ranks_in_words, split_batch
from mirl_dist.data.shards import Shards
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import UserError
from mirl_dist.evaluation import evaluate
from mirl_dist.evaluation.protocols import PROTOCOLS
from mirl_dist.observability.mlflow import tracker
from mirl_dist.pruning.criteria import CRITERIA
from mirl_dist.pruning.prune import in_scope
from mirl_dist.storage import Store
from mirl_dist.storage.configured import open_configured
from mirl_dist.training import initial
from mirl_dist.training.checkpoint import Checkpoints
from mirl_dist.training.initial import OpenTicket


class RunPlan(NamedTuple):
    """What is known of a run before any rank starts: its data, its order, its shares, its place."""

    shards: Shards
    sampler: GlobalSampler
    batch_split: BatchSplit
    jobs: list[evaluate.EvalJob]
    store: Store


class _SharedPlan(NamedTuple):
    """What rank 0 has read and tells the others: so that a store is not asked by every rank."""

    manifest: bytes
    jobs: list[evaluate.EvalJob]


def preflight(config: Config, world: int, resume: str, open_ticket: OpenTicket) -> RunPlan:
    """Everything that can be refused before work begins, refused; nothing is written.

    resume: 'auto', 'never' or 'must'; open_ticket: opens `start.ticket`. Raises UserError.
    """
    shards = Shards(open_configured(config.store, config.data.shards))
    order, shares = sampler_of(config, shards), split_batch(config.batch.global_, config.batch.forward, world)
    shards.check_patch_size(config.data.patch_pixels)
    if config.data.damage == "refuse":
        shards.check_present("train", "evaluate")
    else:
        shards.check_present("evaluate")
    said = config.evaluate
    jobs = evaluate.plan_jobs(
        shards, order.tasks, said.sets, said.pictures, [PROTOCOLS[name] for name in said.protocols]
    )
    _check_score_globs(config.keep.by, sorted({job.name for job in jobs}))
    _check_step_numbers(config, order.steps_per_epoch)
    store = open_configured(config.store, config.run.folder)
    check_run_folder(Checkpoints(store), config, shards.manifest.digest(), resume, open_ticket)
    with torch.device("meta"):
        names = [n for n, _ in models.create(config.model.name, **config.model.sizes()).named_parameters()]
    in_scope(names, config.prune.scope)
    return RunPlan(shards, order, shares, jobs, store)


def preflight_on_ranks(config: Config, resume: str, ranks: Ranks, open_ticket: OpenTicket) -> RunPlan:
    """`prepare` on every rank, with all reading and judging done by rank 0 alone."""
    mine: list[RunPlan] = []

    def on_main() -> _SharedPlan:
        mine.append(preflight(config, ranks.world, resume, open_ticket))
        if config.tracking.enabled:
            tracker.check_reachable(config.tracking.uri)
        return _SharedPlan(mine[0].shards.manifest.dump(), mine[0].jobs)

    told = ranks.on_main(on_main, what="manifest")
    if mine:
        return mine[0]
    shards = Shards(open_configured(config.store, config.data.shards), told.manifest)
    shares = split_batch(config.batch.global_, config.batch.forward, ranks.world)
    return RunPlan(
        shards, sampler_of(config, shards), shares, told.jobs, open_configured(config.store, config.run.folder)
    )


def sampler_of(config: Config, shards: Shards) -> GlobalSampler:
    """The order of a config's samples. Raises UserError for a mix that the shards cannot feed."""
    return GlobalSampler(
        config.data.mix,
        shards.train,
        config.batch.global_,
        config.run.seed,
        mix_by=config.data.mix_by,
        steps_per_epoch=config.data.steps_per_epoch,
    )


def _check_score_globs(globs: tuple[str, ...], names: list[str]) -> None:
    """Raise UserError for a glob of keep.by that no score will answer to."""
    scores = [f"{kind}/{name}" for name in names for kind in ("psnr", "ssim")]
    for glob in globs:
        if not any(fnmatchcase(score, glob) for score in scores):
            raise UserError(
                f"keep.by: '{glob}' names no score; there will be {', '.join(scores) or 'none'}. Correct it."
            )


def _check_step_numbers(config: Config, steps_per_epoch: int) -> None:
    """Raise UserError for a rewind point that round 0 does not pass, and for more batches to score by than a round has."""
    steps, at, batches = steps_per_epoch * config.train.epochs, config.rewind.step, config.prune.criterion_batches
    if at is not None and at >= steps:
        raise UserError(f"rewind.step: found {at}, but a round has {steps} steps. Give an earlier one.")
    if CRITERIA[config.prune.criterion].needs == "gradients" and batches > steps:
        raise UserError(f"prune.criterion_batches: found {batches}, but a round has {steps} steps. Give fewer.")


def check_run_folder(
    checkpoints: Checkpoints, config: Config, manifest_digest: str, resume: str, open_ticket: OpenTicket
) -> None:
    """Raise UserError when the folder holds another run than this one, or resume says otherwise."""
    where = checkpoints.store.where()
    found = checkpoints.identity()
    if found is None:
        if resume == "must":
            raise UserError(f"--resume must, but {where} holds no run. Correct run.folder, or use --resume auto.")
        if checkpoints.commits():
            raise UserError(f"{where} holds commits but no run.json. Restore it, or choose another run.folder.")
        initial.check_start_exists(config, open_ticket)
        return
    if resume == "never":
        raise UserError(f"--resume never, but {where} holds a run. Choose another run.folder, or use --resume auto.")
    if found["fingerprint"] != config.fingerprint():
        other = from_dump(found["config"], f"{where}/run.json")
        said = "; ".join(differences(config, other)[:6]) or "another version wrote it"
        raise UserError(
            f"{where} belongs to another config (fingerprint {found['fingerprint']}, this one is "
            f"{config.fingerprint()}): {said}. Choose another run.folder, or restore those values."
        )
    if found["manifest_digest"] != manifest_digest:
        raise UserError(
            f"{where} was trained on shards with digest {found['manifest_digest'][:12]}, {config.data.shards} has "
            f"{manifest_digest[:12]}: other data. Point data.shards to the first ones, or choose another run.folder."
        )


def describe(config: Config, prepared: RunPlan, world: int) -> str:
    """The recipe in numbers, so that nobody's drifts silently with the number of ranks."""
    shares, steps = prepared.batch_split, prepared.sampler.steps_per_epoch
    passes = "pass" if shares.passes == 1 else "passes"
    samples = steps * config.batch.global_ * config.train.epochs
    o = config.optimiser
    return (
        f"{ranks_in_words(world)} x {shares.passes} {passes} x {shares.forward} samples = global batch "
        f"{config.batch.global_}; {steps} steps per epoch, {config.train.epochs} epochs, "
        f"{samples:,} samples per round; {o.name}, learning rate {o.lr:g}, "
        f"warm-up {config.schedule.warmup_epochs:g} epochs, {config.train.precision}"
    )
