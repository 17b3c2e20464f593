"""What one round of a run does with the outside: train, score, make the ticket, keep it, show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from mirl_dist import __version__
from mirl_dist.config.config import Config
from mirl_dist.data.loader import TrainLoader
from mirl_dist.data.resident_images import ResidentImages
from mirl_dist.data.sample import Batch
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, Position
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.data.shards import Shards
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import Stopped, UserError
from mirl_dist.evaluation import evaluate
from mirl_dist.observability.mlflow.tracker import Tracker
from mirl_dist.observability.progress import bar, say
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import PruneConfig, PruneResult
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.training import loop, round_report, schedule, selection
from mirl_dist.training.checkpoint import Checkpoints, rewind_name
from mirl_dist.training.crash_loop import CrashLoopGuard
from mirl_dist.training.lottery import check_pruned_weights
from mirl_dist.training.state import Progress, Snapshot, TrainState
from mirl_dist.training.ticket import Curve, Ticket, validation_score


def library_versions() -> dict[str, str]:
    """Of the libraries that scores depend on."""
    return {name: metadata.version(name) for name in ("numpy", "scikit-image")}


@dataclass
class RoundRunner:
    """The live parts of a run on one rank, and the verbs that `lottery.play` calls."""

    config: Config
    rule: PruneConfig
    ranks: Ranks
    state: TrainState
    model: nn.Module
    bare: nn.Module | None
    make_network: Callable[[], nn.Module]
    initial: dict[str, Tensor]
    shards: Shards
    supply: ShardPool
    order: GlobalSampler
    shares: BatchSplit
    stream: TrainLoader
    jobs: list[evaluate.EvalJob]
    how: evaluate.EvalSettings
    held: ResidentImages
    probe: Callable[[int], Iterator[Batch]]
    look_ahead: bool
    checkpoints: Checkpoints
    keeper: AsyncWriter
    footprint: CrashLoopGuard
    tracker: Tracker
    stop_requested: Callable[[], bool]
    news: dict[str, Any]
    committed: tuple[int, int] | None = None
    point: dict[str, Tensor] | None = None

    def train_and_score(self) -> Ticket:
        """Train the round from where it stands, score it, and commit its ticket."""
        with self.ranks.in_phase("training"):
            self._train()
        with self.ranks.in_phase("evaluating"):
            with self._whole_network() as network:
                scored = evaluate.evaluate(
                    network, self.supply, self.jobs, self.ranks, self.how, self.look_ahead, self.stop_requested
                )
            if self.config.evaluate.every_epochs is not None:
                self._add_to_curve(scored)
        check_pruned_weights(self.state, self.ranks)
        self._gather_damage()
        ticket = self._ticket(scored)
        self.ranks.check_agreement("the ticket", ticket.digest())
        with self.ranks.in_phase("committing"):
            self._begin_commit(
                lambda snapshot, last, waits: self.checkpoints.commit_round(
                    ticket, snapshot, scored.table(), scored.pictures, last, waits
                )
            )
            self.ranks.on_main(self.keeper.wait, what="commit of the round")
        return ticket

    @contextmanager
    def _whole_network(self) -> Iterator[nn.Module]:
        """The network that is trained, to be called by each rank for itself, for ranks score different numbers of
        images. Where it, or what updates it, is dealt out, that is a copy: as well under ZeRO-1 and 2, whose parameters
        lie in one flat tensor, which is enough for the CPU's kernels to round otherwise."""
        if self.bare is not None:
            yield self.bare
            return
        network = self.make_network().to(self.ranks.device)
        parameters = dict(network.named_parameters())
        for name, weight in self.state.gather_full(self.state.weights):
            parameters[name].data.copy_(weight)
        yield network

    def _train(self) -> None:
        progress, config = self.state.progress, self.config
        epochs = config.round_epochs(progress.round)
        plan = loop.RoundConfig(
            tasks=self.order.tasks,
            epochs=epochs,
            steps_per_epoch=self.order.steps_per_epoch,
            batch=config.batch.global_,
            passes=self.shares.passes,
            clip_norm=config.optimiser.clip_norm,
            commit_every=config.checkpoint.every_steps,
            report_every=config.tracking.every_steps,
            skip_bad=config.guard.skip_bad_batches,
            spike_factor=config.guard.spike_factor,
            slow_factor=config.ranks.slow_factor,
            patch_pixels=config.data.patch_pixels,
        )
        round_report.open_round(
            self.tracker, config, progress.round, self.state.counts, self.state.total(), progress.mask_digest
        )
        total = epochs * plan.steps_per_epoch
        what = f"round {progress.round}"
        self.news.update(round=progress.round, step=progress.updates, steps=total)
        stream = self.stream.batches(progress.round, Position(progress.epoch, progress.step), epochs)
        with (
            closing(stream) as batches,  # its workers end with the round, also with one that fails
            bar(what, total, start=progress.updates, shown=self.ranks.is_main) as advance,
        ):
            loop.train_round(self.state, self.model, batches, plan, self.ranks, self, advance)
        self.footprint.end_step()

    # -- what the loop asks for (train.Around) ------------------------------------------------------------------

    def rate(self, progress: Progress) -> float:
        """The learning rate at a position; a one-shot's fine-tuning has a cosine of its own."""
        config, epochs = self.config, self.config.round_epochs(progress.round)
        tuning = config.is_finetuning(progress.round)
        return schedule.rate(
            (config.prune.finetune_lr if tuning else None) or config.optimiser.lr,
            by="step" if tuning else config.schedule.by,
            epoch=progress.epoch,
            step=progress.step,
            steps_per_epoch=self.order.steps_per_epoch,
            warmup_epochs=0 if tuning else config.schedule.warmup_epochs,
            horizon_epochs=epochs if tuning else config.schedule.horizon_epochs or epochs,
        )

    def before_step(self, progress: Progress) -> None:
        self.news.update(round=progress.round, step=progress.updates)
        if progress.round == 0 and progress.updates == self.config.rewind.step:
            self._keep_rewind_point(progress)
        every = self.config.evaluate.every_epochs
        due = every is not None and progress.step == 0 and progress.epoch > 0 and progress.epoch % every == 0
        if due and progress.updates not in progress.curve.steps and progress.updates > progress.began:
            self.evaluate_mid_round()
        self.footprint.begin_step(progress.round, progress.updates)

    def evaluate_mid_round(self) -> None:
        """Score a few images in the midst of a round. Raises Stopped on every rank when asked to stop."""
        self.footprint.end_step()
        few = evaluate.first_images(self.jobs, self.config.evaluate.curve_images)
        how = self.how._replace(protocols=self.how.protocols[:1])
        with self.ranks.in_phase("evaluating"), self._whole_network() as network:
            scored = evaluate.evaluate(network, self.held, few, self.ranks, how, False, self.stop_requested)
        self._add_to_curve(scored)

    def _add_to_curve(self, scored: evaluate.EvalResult) -> None:
        """One more point of the round's curve: the mean of the first images of each score, by the headline protocol."""
        progress = self.state.progress
        few = {
            (job.name, job.place.entry.key)
            for job in evaluate.first_images(self.jobs, self.config.evaluate.curve_images)
        }
        found: dict[str, list[float]] = {}
        for image in scored.images:
            if image.protocol == self.how.protocols[0].name and (image.name, image.image) in few:
                found.setdefault(image.name, []).append(image.psnr)
        if progress.updates in progress.curve.steps or not found:
            return
        means = {name: fmean(values) for name, values in found.items()}
        progress.curve = Curve(
            steps=(*progress.curve.steps, progress.updates),
            psnr={name: (*progress.curve.psnr.get(name, ()), mean) for name, mean in means.items()},
        )
        self.tracker.log_step(progress.updates, {f"valid/psnr/{name}": mean for name, mean in means.items()})

    def _keep_rewind_point(self, progress: Progress) -> None:
        """What later rounds return to, kept before any commit that is made after it. Twice is once."""
        progress.rewind_digest = self.state.digest()
        self.ranks.check_agreement("the rewind point", progress.rewind_digest)
        name = rewind_name(progress.rewind_digest)
        if not self.state.engine.layout.is_replicated:
            self.point = {name: weight.to("cpu", copy=True) for name, weight in self.state.weights.items()}
        weights = {n: w.cpu() for n, w in self.state.gather_full(self.state.weights) if self.ranks.is_main}
        self._write(lambda: self.checkpoints.save_tensors(name, weights), "the rewind point")

    # -- what the story asks for (lottery.play) -----------------------------------------------------------------

    def select(self) -> PruneResult:
        """The masks of the next round. A tensor that they leave nothing of is told."""
        next_round = self.state.progress.round + 1
        pruned = selection.select(
            self.rule,
            self.state,
            self.initial,
            self._whole_network,
            lambda: self.probe(next_round),
            self.ranks,
            self.stop_requested,
        )
        if pruned.collapsed and self.ranks.is_main:
            shown = ", ".join(pruned.collapsed[:5]) + (", ..." if len(pruned.collapsed) > 5 else "")
            say(f"warning: round {next_round} leaves nothing of {len(pruned.collapsed)} tensors ({shown})")
        return pruned

    def rewind_point(self) -> dict[str, Tensor]:
        """The values that survivors return to: the first ones, or those of a step of round 0.

        A rank that holds a part of the network keeps its part of them: after a restart the file is read once.
        """
        if self.config.rewinds_to() != "step":
            return self.initial
        if self.point is not None:
            return self.point
        kept: list[dict[str, Tensor] | None] = []
        name = rewind_name(self.state.progress.rewind_digest)
        self.ranks.on_main(lambda: kept.append(self.checkpoints.tensors(name)), what="rewind point")
        held = self.state.engine.layout
        if kept and kept[0] is not None and kept[0].keys() != held.shapes.keys():
            kept[0] = None
        point = self.ranks.broadcast_tensors((kept[0] or {}) if kept else None, what="rewind point", layout=held)
        if not point or masking.digest_of(self.state.gather_full(point)) != self.state.progress.rewind_digest:
            raise UserError(
                f"{self.checkpoints.store.where(name)} is damaged or missing, and nothing else holds the weights of "
                f"step {self.config.rewind.step}. Restore a copy of it, or train in a new run.folder.",
                everywhere=True,
            )
        self.point = None if held.is_replicated else point
        return point

    def commit_busy(self) -> bool:
        return self.keeper.busy

    def commit_failed(self) -> bool:
        return self.keeper.failed or self.checkpoints.lost()

    def raise_commit_failure(self) -> None:
        def on_main() -> None:
            self.keeper.raise_failure()
            self.checkpoints.check()

        self.ranks.on_main(on_main, what="failure of the last commit")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.tracker.log_step(step, values)
        self.news["samples_per_second"] = values["samples_per_second"]

    def commit(self, *, wait: bool) -> None:
        """Commit the middle of a round: a snapshot now, the rest in the background unless `wait`."""
        if wait:
            self.footprint.end_step()  # whoever dies from here on has not died of a step
        self._gather_damage()
        with self.ranks.in_phase("committing"):
            at = self.state.progress.round, self.state.progress.updates
            if at != self.committed:
                self._begin_commit(self.checkpoints.commit_step)
                self.committed = at
            if wait:
                self.ranks.on_main(self.keeper.wait, what="commit of the step")

    def _begin_commit(self, write: Callable[[Snapshot, int, bytes], None]) -> None:
        """Begin to write a snapshot, on rank 0, once the commit before is written. Steps that are committed are not
        trained, and so not told to MLflow, again: what it has not heard is committed with them."""

        self.tracker.flush()
        self.ranks.on_main(self.keeper.wait, what="commit before this one")
        snapshot, keep_last = self.state.snapshot(keep=self.ranks.is_main), self.config.checkpoint.keep_last

        def on_main() -> None:
            assert snapshot is not None
            self.keeper.begin(lambda: write(snapshot, keep_last, self.tracker.pending()), "a commit")

        self.ranks.on_main(on_main, what="snapshot")

    def _gather_damage(self) -> None:
        """What any rank found damaged in this round, into every rank's progress."""
        for found in self.ranks.gather_objects(self.stream.damaged):
            self.state.progress.damaged |= found

    def stop_if_asked(self, before: str) -> None:
        """Raise Stopped on every rank when any was asked to stop."""
        if self.ranks.any(self.stop_requested(), what="whether to stop"):
            raise Stopped(f"stopped as asked before {before}; all rounds that were trained are committed")

    def _ticket(self, scored: evaluate.EvalResult) -> Ticket:
        progress, counts = self.state.progress, self.state.counts
        headline, *others = self.how.protocols
        densities = {name: counts.alive[name] / size for name, size in counts.all.items()}
        return Ticket(
            round=progress.round,
            alive=sum(counts.alive.values()),
            prunable=sum(counts.all.values()),
            total=self.state.total(),
            threshold=progress.threshold,
            layer_density=densities,
            mask_digest=progress.mask_digest,
            initial_digest=masking.digest_of(self.state.gather_full(self.initial)),
            weights_digest=self.state.digest(),
            parent=progress.parent,
            fingerprint=self.config.fingerprint(),
            manifest_digest=self.shards.manifest.digest(),
            protocol=headline.text,
            scores=scored.scores[headline.name],
            protocols={protocol.name: protocol.text for protocol in self.how.protocols},
            also={protocol.name: scored.scores[protocol.name] for protocol in others},
            measured=self.how.as_recorded(),
            curve=progress.curve if progress.curve.steps else None,
            method=round_report.method(self.config, progress.round),
            seed=self.config.run.seed,
            began=progress.began,
            collapsed=tuple(name for name, density in densities.items() if density == 0),
            updates=progress.updates,
            samples=progress.samples,
            skipped=progress.skipped,
            bad=progress.bad,
            damaged=dict(sorted(progress.damaged.items())),
            seconds=progress.seconds,
            world=self.ranks.world,
            engine=self.ranks.engine_spec.name,
            versions={"mirl_dist": __version__, "torch": torch.__version__, **library_versions()},
        )

    def _write(self, work: Callable[[], None], what: str) -> None:
        """Small things, at once, with the keeper's patience."""

        def on_main() -> None:
            self.keeper.begin(work, what)
            self.keeper.wait()

        self.ranks.on_main(on_main, what=what)

    def record(self, ticket: Ticket) -> None:
        """Show a committed ticket: one line, and MLflow. Twice is once."""
        state = self.state
        masks = {name: mask.cpu() for name, mask in state.gather_full(state.masks) if self.ranks.is_main}
        self.ranks.on_main(
            lambda: round_report.ticket(self.tracker, self.config, self.checkpoints, ticket, state.counts, masks),
            what="record of the round",
        )

    def close(self) -> None:
        """After the last round: keep rounds only; name the best and drop other weights, if the config says so."""
        with self.ranks.in_phase("committing"):
            self._write(self._close, "the end of the run")

    def _close(self) -> None:
        self.checkpoints.finish()
        by = self.config.keep.by
        if not by:
            return
        tickets = [t for t in self.checkpoints.tickets() if self.checkpoints.has_weights(t.round)]
        scores = {t.round: validation_score(t, by) for t in tickets}
        best = max(scores, key=lambda r: (scores[r], r))
        self.checkpoints.mark_best(best, scores[best], by)
        if self.config.keep.rounds == "best":
            for ticket in self.checkpoints.tickets():
                if ticket.round not in (best, tickets[-1].round):
                    self.checkpoints.drop_weights(ticket.round)
