"""Checks and plans a run before any work begins: data, batches, images to score, store."""

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
from mirl_dist.evaluation.evaluate import plan_jobs
from mirl_dist.evaluation.protocols import PROTOCOLS
from mirl_dist.evaluation.scorer import EvalJob
from mirl_dist.models.compiled import check_compiler
from mirl_dist.observability.mlflow.tracker import check_reachable
from mirl_dist.pruning.criteria import CRITERIA
from mirl_dist.pruning.prune import in_scope
from mirl_dist.storage import Store
from mirl_dist.storage.configured import open_configured
from mirl_dist.training.checkpointing.checkpoint import Checkpoints
from mirl_dist.training.initial import OpenTicket, check_start


class RunPlan(NamedTuple):
    """The plan of a run: config, shards, the order of samples, the split of batches, the images to score, and store."""

    config: Config
    shards: Shards
    sampler: GlobalSampler
    batch_split: BatchSplit
    jobs: list[EvalJob]
    store: Store

    def manifest_digest(self) -> str:
        """Return the digest of the shards' manifest."""
        return self.shards.manifest.digest()


def preflight(config: Config, world: int, resume: str, open_ticket: OpenTicket) -> RunPlan:
    """Check everything that can be checked before work begins, and return the plan. Writes nothing.

    world: the number of ranks; resume: 'auto', 'never' or 'must'; open_ticket: opens `start.ticket`. Raises UserError.
    """
    shards = Shards(open_configured(config.store, config.data.shards))
    sampler = sampler_of(config, shards)
    batch_split = split_batch(config.batch.global_, config.batch.forward, world)
    shards.check_patch_size(config.data.patch_pixels)
    shards.check_present(*(("train", "evaluate") if config.data.damage == "refuse" else ("evaluate",)))
    scoring = [PROTOCOLS[name] for name in config.evaluate.protocols]
    jobs = plan_jobs(shards, sampler.tasks, config.evaluate.sets, config.evaluate.pictures, scoring)
    _check_score_globs(config.keep.by, sorted({job.name for job in jobs}))
    _check_step_numbers(config, sampler.steps_per_epoch)
    store = open_run_store(config, shards.manifest.digest(), resume, open_ticket)
    with torch.device("meta"):
        names = [n for n, _ in models.create(config.model.name, **config.model.sizes()).named_parameters()]
    in_scope(names, config.prune.scope)
    if config.train.compile:
        check_compiler()
    return RunPlan(config, shards, sampler, batch_split, jobs, store)


def preflight_on_ranks(config: Config, resume: str, ranks: Ranks, open_ticket: OpenTicket) -> RunPlan:
    """Run `preflight` on rank 0, so that only one rank queries the store, and return the plan on every rank.

    Raises UserError on every rank.
    """
    plans: list[RunPlan] = []

    def on_main() -> tuple[bytes, list[EvalJob]]:
        plans.append(preflight(config, ranks.world, resume, open_ticket))
        if config.tracking.enabled:
            check_reachable(config.tracking.uri)
        return plans[0].shards.manifest.dump(), plans[0].jobs

    manifest, jobs = ranks.on_main(on_main, what="manifest")
    if plans:
        return plans[0]
    shards = Shards(open_configured(config.store, config.data.shards), manifest)
    batch_split = split_batch(config.batch.global_, config.batch.forward, ranks.world)
    store = open_configured(config.store, config.run.folder)
    return RunPlan(config, shards, sampler_of(config, shards), batch_split, jobs, store)


def sampler_of(config: Config, shards: Shards) -> GlobalSampler:
    """Return the sampler of a config. Raises UserError for a task mix that the shards cannot supply."""
    return GlobalSampler(
        config.data.mix,
        shards.train,
        config.batch.global_,
        config.run.seed,
        mix_by=config.data.mix_by,
        steps_per_epoch=config.data.steps_per_epoch,
    )


def open_run_store(config: Config, manifest_digest: str, resume: str, open_ticket: OpenTicket) -> Store:
    """Open the store of run.folder and check its content with `check_run_folder`.

    Called before a launch, and again under the run's lease, because another launch may have created the run in between.
    """
    store = open_configured(config.store, config.run.folder)
    check_run_folder(Checkpoints(store), config, manifest_digest, resume, open_ticket)
    return store


def _check_score_globs(globs: tuple[str, ...], names: list[str]) -> None:
    """Raise UserError for a glob of keep.by that matches no score."""
    scores = [f"{kind}/{name}" for name in names for kind in ("psnr", "ssim")]
    for glob in globs:
        if not any(fnmatchcase(score, glob) for score in scores):
            raise UserError(
                f"keep.by: '{glob}' names no score; there will be {', '.join(scores) or 'none'}. Correct it."
            )


def _check_step_numbers(config: Config, steps_per_epoch: int) -> None:
    """Raise UserError if a round is too short for the rewind step or for the number of calibration batches."""
    steps, at, batches = steps_per_epoch * config.train.epochs, config.rewind.step, config.prune.criterion_batches
    if at is not None and at >= steps:
        raise UserError(f"rewind.step: found {at}, but a round has {steps} steps. Give an earlier one.")
    if CRITERIA[config.prune.criterion].needs == "gradients" and batches > steps:
        raise UserError(f"prune.criterion_batches: found {batches}, but a round has {steps} steps. Give fewer.")


def check_run_folder(
    checkpoints: Checkpoints, config: Config, manifest_digest: str, resume: str, open_ticket: OpenTicket
) -> None:
    """Raise UserError if the folder holds a different run, or if `resume` does not allow its state.

    A different run is one with another config fingerprint or other shards. resume: 'auto', 'never' (the folder must
    hold no run) or 'must' (it must hold the run).
    """
    folder = checkpoints.store.where()
    identity = checkpoints.identity()
    if identity is None:
        if resume == "must":
            raise UserError(f"--resume must, but {folder} holds no run. Correct run.folder, or use --resume auto.")
        if checkpoints.commits():
            raise UserError(f"{folder} holds commits but no run.json. Restore it, or choose another run.folder.")
        check_start(config, open_ticket)
        return
    if resume == "never":
        raise UserError(f"--resume never, but {folder} holds a run. Choose another run.folder, or use --resume auto.")
    if identity["fingerprint"] != config.fingerprint():
        other = from_dump(identity["config"], f"{folder}/run.json")
        changes = "; ".join(differences(config, other)[:6]) or "another version wrote it"
        raise UserError(
            f"{folder} belongs to another config (fingerprint {identity['fingerprint']}, this one is "
            f"{config.fingerprint()}): {changes}. Choose another run.folder, or restore those values."
        )
    if identity["manifest_digest"] != manifest_digest:
        raise UserError(
            f"{folder} was trained on shards with digest {identity['manifest_digest'][:12]}, {config.data.shards} has "
            f"{manifest_digest[:12]}: other data. Point data.shards to the first ones, or choose another run.folder."
        )


def describe(config: Config, plan: RunPlan, world: int) -> str:
    """Return the training recipe in numbers, so that an unintended effect of the number of ranks is visible."""
    split, steps = plan.batch_split, plan.sampler.steps_per_epoch
    passes = "pass" if split.passes == 1 else "passes"
    samples = steps * config.batch.global_ * config.train.epochs
    optimiser = config.optimiser
    return (
        f"{ranks_in_words(world)} x {split.passes} {passes} x {split.forward} samples = global batch "
        f"{config.batch.global_}; {steps} steps per epoch, {config.train.epochs} epochs, "
        f"{samples:,} samples per round; {optimiser.name}, learning rate {optimiser.lr:g}, "
        f"warm-up {config.schedule.warmup_epochs:g} epochs, {config.train.precision}"
        f"{', compiled' if config.train.compile else ''}"
    )
