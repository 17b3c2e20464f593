"""Saves a run during training: step commits in the background, round commits with tickets, the rewind point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirl_dist.config import schema
from mirl_dist.data.loader import TrainLoader
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.evaluation.evaluate import EvalResult
from mirl_dist.observability.mlflow.tracker import Tracker
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.training.checkpointing.checkpoint import Checkpoints, rewind_name
from mirl_dist.training.progress import Progress
from mirl_dist.training.state import Snapshot, TrainState
from mirl_dist.training.ticket import Ticket, validation_score


@dataclass
class Committer:
    """Writes the state of all ranks. All ranks call the same methods in the same order; only rank 0 accesses the store.

    last_commit: round and number of updates of the newest step commit.
    """

    config: schema.CheckpointSection
    ranks: Ranks
    state: TrainState
    checkpoints: Checkpoints
    writer: AsyncWriter
    loader: TrainLoader
    tracker: Tracker
    last_commit: tuple[int, int] | None = None

    def failed(self) -> bool:
        """Whether this rank failed to write its last commit, or has lost the run's lease."""
        return self.writer.failed or self.checkpoints.lost()

    def raise_failure(self) -> None:
        """Raise the error of the last commit on every rank."""

        def on_main() -> None:
            self.writer.raise_failure()
            self.checkpoints.check()

        self.ranks.on_main(on_main, what="failure of the last commit")

    def commit_step(self, *, wait: bool) -> None:
        """Commit a step of the round: take a snapshot now, and write it in the background unless `wait`."""
        self.gather_damage()
        with self.ranks.in_phase("committing"):
            position = self.state.progress.round, self.state.progress.updates
            if position != self.last_commit:
                self._begin(self.checkpoints.commit_step)
                self.last_commit = position
            if wait:
                self.ranks.on_main(self.writer.wait, what="commit of the step")

    def commit_round(self, ticket: Ticket, result: EvalResult) -> None:
        """Commit a round with its ticket, and wait until the commit is complete."""

        def write(snapshot: Snapshot, keep_last: int, pending: bytes) -> None:
            self.checkpoints.commit_round(ticket, snapshot, result.table(), result.pictures, keep_last, pending)

        with self.ranks.in_phase("committing"):
            self._begin(write)
            self.ranks.on_main(self.writer.wait, what="commit of the round")

    def _begin(self, write: Callable[[Snapshot, int, bytes], None]) -> None:
        """Start to write a snapshot on rank 0, after the previous commit is written.

        Committed steps are not trained again, so their MLflow records would be lost: pending ones are part of the
        commit.
        """
        self.tracker.flush()
        self.ranks.on_main(self.writer.wait, what="commit before this one")
        snapshot = self.state.snapshot(keep=self.ranks.is_main)

        def on_main() -> None:
            assert snapshot is not None
            self.writer.begin(lambda: write(snapshot, self.config.keep_last, self.tracker.pending()), "a commit")

        self.ranks.on_main(on_main, what="snapshot")

    def gather_damage(self) -> None:
        """Merge the damage that any rank found in this round into every rank's progress."""
        for damaged in self.ranks.gather_objects(self.loader.damaged):
            self.state.progress.damaged |= damaged

    def save_rewind_point(self, progress: Progress) -> None:
        """Save the weights of the rewind step, before any commit that refers to them. Idempotent."""
        progress.rewind_digest = self.state.digest()
        self.ranks.check_agreement("the rewind point", progress.rewind_digest)
        name = rewind_name(progress.rewind_digest)
        weights = {n: w.cpu() for n, w in self.state.gather_full(self.state.weights) if self.ranks.is_main}
        self._write_now(lambda: self.checkpoints.save_tensors(name, weights), "the rewind point")

    def finish_run(self, keep: schema.KeepSection) -> None:
        """After the last round, remove step commits; mark the best round and drop other weights as configured.

        The weights of the last round that has them are always kept.
        """
        with self.ranks.in_phase("committing"):
            self._write_now(lambda: self._keep_rounds(keep), "the end of the run")

    def _keep_rounds(self, keep: schema.KeepSection) -> None:
        self.checkpoints.finish()
        if not keep.by:
            return
        tickets = self.checkpoints.tickets()
        complete = [t for t in tickets if self.checkpoints.has_weights(t.round)]
        scores = {t.round: validation_score(t, keep.by) for t in complete}
        best = max(scores, key=lambda r: (scores[r], r))
        self.checkpoints.mark_best(best, scores[best], keep.by)
        if keep.rounds == "best":
            for ticket in tickets:
                if ticket.round not in (best, complete[-1].round):
                    self.checkpoints.drop_weights(ticket.round)

    def _write_now(self, work: Callable[[], None], what: str) -> None:
        """Run a small write on rank 0 with the writer's retries, and wait for it."""

        def on_main() -> None:
            self.writer.begin(work, what)
            self.writer.wait()

        self.ranks.on_main(on_main, what=what)
