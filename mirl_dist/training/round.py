"""Runs one round: trains, scores, creates the ticket and commits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from mirl_dist import __version__
from mirl_dist.data.sampler import Position
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import Stopped
from mirl_dist.evaluation.evaluate import EvalResult
from mirl_dist.evaluation.score import library_versions
from mirl_dist.models import FORMULATION
from mirl_dist.observability.progress import bar
from mirl_dist.observability.step_times import PhaseClock, print_round
from mirl_dist.training import loop
from mirl_dist.training.checkpointing.committer import Committer
from mirl_dist.training.dataloaders import RunInputs
from mirl_dist.training.guards import check_pruned_weights
from mirl_dist.training.preflight import RunPlan
from mirl_dist.training.progress import Progress
from mirl_dist.training.round_report import RoundReporter, arithmetic_of, method_of
from mirl_dist.training.state import TrainState
from mirl_dist.training.ticket import Curve, Ticket

_IN_TICKET = {"round", "began", "updates", "samples", "skipped", "bad", "seconds", "threshold", "mask_digest", "parent"}
"""Fields of the progress that a ticket records under the same names."""


@dataclass
class TrainNetwork:
    """The network in training: `wrapped` for training steps, `unwrapped` for scoring (None if it is sharded).

    create: returns a new network of the same shape.
    """

    wrapped: nn.Module
    unwrapped: nn.Module | None
    create: Callable[[], nn.Module]
    state: TrainState
    device: torch.device

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Yield the trained network for calls without collectives, since ranks score different numbers of images.

        With a sharded network or optimiser this is a gathered copy. ZeRO-1 and ZeRO-2 need one too: their parameters
        are views of one flat tensor, with which CPU kernels round differently.
        """
        if self.unwrapped is not None:
            yield self.unwrapped
            return
        network = self.create().to(self.device)
        parameters = dict(network.named_parameters())
        for name, weight in self.state.gather_full(self.state.weights):
            parameters[name].data.copy_(weight)
        yield network


@dataclass
class RoundRunner:
    """Trains and scores rounds on one rank; the hooks of the training loop (loop.LoopHooks)."""

    plan: RunPlan
    inputs: RunInputs
    ranks: Ranks
    state: TrainState
    network: TrainNetwork
    committer: Committer
    report: RoundReporter
    stop: StopSignal
    clock: PhaseClock = field(default_factory=PhaseClock)

    def train_and_score(self, initial_digest: str) -> Ticket:
        """Train the round from its current position, score it, and commit its ticket."""
        with self.ranks.in_phase("training"):
            self._train()
        with self.ranks.in_phase("evaluating"):
            with self.network.gathered() as network:
                result = self.inputs.evaluation.score_all(network)
            if self.plan.config.evaluate.every_epochs is not None:
                self._add_to_curve(result)
        check_pruned_weights(self.state, self.ranks)
        self.committer.gather_damage()
        ticket = self._make_ticket(result, initial_digest)
        self.ranks.check_agreement("the ticket", ticket.digest())
        self.committer.commit_round(ticket, result)
        return ticket

    def _train(self) -> None:
        """Train the round from its current position to its end."""
        progress, epochs = self.state.progress, self.plan.config.round_epochs(self.state.progress.round)
        total = epochs * self.plan.sampler.steps_per_epoch
        self.report.open_round(self.state, total)
        stream = self.inputs.loader.batches(progress.round, Position(progress.epoch, progress.step), epochs)
        with (
            closing(stream) as batches,  # stops its workers at the end of the round, also after an error
            bar(f"round {progress.round}", total, start=progress.updates, shown=self.ranks.is_main) as advance,
        ):
            loop.train_round(self.state, self.network.wrapped, batches, self.plan, self.ranks, self, advance)
        self.report.crash_guard.end_step()
        if self.ranks.is_main:
            print_round(self.clock, progress.round)

    def evaluate_mid_round(self) -> None:
        """Score the first images of each 'task/set'. Raises Stopped on every rank if any was asked to stop."""
        self.report.crash_guard.end_step()
        with self.ranks.in_phase("evaluating"), self.network.gathered() as network:
            result = self.inputs.evaluation.score_first(network)
        self._add_to_curve(result)

    def _add_to_curve(self, result: EvalResult) -> None:
        """Add a point to the round's curve, at most one per number of updates."""
        progress, means = self.state.progress, self.inputs.evaluation.curve_point(result)
        if progress.updates in progress.curve.steps or not means:
            return
        progress.curve = Curve(
            steps=(*progress.curve.steps, progress.updates),
            psnr={name: (*progress.curve.psnr.get(name, ()), mean) for name, mean in means.items()},
        )
        self.report.log_curve(progress.updates, means)

    def _make_ticket(self, result: EvalResult, initial_digest: str) -> Ticket:
        progress, counts, config = self.state.progress, self.state.counts, self.plan.config
        settings = self.inputs.evaluation.settings
        headline, *others = settings.protocols
        densities = {name: counts.surviving[name] / size for name, size in counts.total.items()}
        return Ticket(
            **progress.model_dump(include=_IN_TICKET),
            alive=sum(counts.surviving.values()),
            prunable=sum(counts.total.values()),
            total=self.state.total(),
            layer_density=densities,
            initial_digest=initial_digest,
            weights_digest=self.state.digest(),
            fingerprint=config.fingerprint(),
            manifest_digest=self.plan.manifest_digest(),
            protocol=headline.text,
            scores=result.scores[headline.name],
            protocols={protocol.name: protocol.text for protocol in settings.protocols},
            also={protocol.name: result.scores[protocol.name] for protocol in others},
            measured=settings.as_recorded(),
            arithmetic=arithmetic_of(config),
            curve=progress.curve if progress.curve.steps else None,
            method=method_of(config, progress.round),
            seed=config.run.seed,
            collapsed=tuple(name for name, density in densities.items() if density == 0),
            damaged=dict(sorted(progress.damaged.items())),
            world=self.ranks.world,
            engine=self.ranks.network.spec.name,
            versions={
                "mirl_dist": __version__,
                "torch": torch.__version__,
                "network": FORMULATION,
                **library_versions(),
            },
        )

    def record(self, ticket: Ticket) -> None:
        """Print a committed ticket and log it to MLflow. Idempotent."""
        masks = {name: mask.cpu() for name, mask in self.state.gather_full(self.state.masks) if self.ranks.is_main}
        self.ranks.on_main(lambda: self.report.show_ticket(ticket, masks), what="record of the round")

    def stop_if_requested(self, before: str) -> None:
        """Raise Stopped on every rank if any was asked to stop. before: the phase that comes next, for the message."""
        if self.ranks.any(self.stop(), what="whether to stop"):
            raise Stopped(f"stopped on request before {before}; all rounds that were trained are committed")

    # -- hooks of the training loop (loop.LoopHooks) --------------------------------------------------------------

    def before_step(self, progress: Progress) -> None:
        """Save the rewind point and run the validation during the round when due. May raise Stopped on every rank."""
        config = self.plan.config
        self.report.status["step"] = progress.updates
        if progress.round == 0 and progress.updates == config.rewind.step:
            self.committer.save_rewind_point(progress)
        every = config.evaluate.every_epochs
        due = every is not None and progress.step == 0 and progress.epoch > 0 and progress.epoch % every == 0
        if due and progress.updates not in progress.curve.steps and progress.updates > progress.began:
            self.evaluate_mid_round()
        self.report.crash_guard.begin_step(progress.round, progress.updates)

    def flags(self) -> tuple[bool, bool, bool]:
        return self.stop(), self.committer.writer.busy, self.committer.failed()

    def raise_commit_failure(self) -> None:
        self.committer.raise_failure()

    def commit(self, *, wait: bool) -> None:
        if wait:
            self.report.crash_guard.end_step()  # a crash from here on does not count as one in a step
        self.committer.commit_step(wait=wait)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.report.log_step(step, values)

    def log_times(self, step: int, percent: dict[str, float]) -> None:
        self.report.tracker.log_step(step, percent)
