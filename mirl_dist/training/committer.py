"""What a run keeps while it trains: commits of steps in the background, tickets of rounds, the rewind point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mirl_dist.config import schema
from mirl_dist.data.loader import TrainLoader
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.evaluation.evaluate import EvalResult
from mirl_dist.observability.mlflow.tracker import Tracker
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.training.checkpoint import Checkpoints, rewind_name
from mirl_dist.training.state import Progress, Snapshot, TrainState
from mirl_dist.training.ticket import Ticket, validation_score


@dataclass
class Committer:
    """Writes the state of all ranks; all call the same methods in the same order, and rank 0 alone touches the store.

    last_commit: round and updates of the newest commit of a step.
    """

    config: schema.CheckpointSection
    ranks: Ranks
    state: TrainState
    checkpoints: Checkpoints
    writer: AsyncWriter
    loader: TrainLoader
    tracker: Tracker
    last_commit: tuple[int, int] | None = None

    def busy(self) -> bool:
        """Whether this rank is writing a commit."""
        return self.writer.busy

    def failed(self) -> bool:
        """Whether this rank could not write its last commit, or has lost the run's lease."""
        return self.writer.failed or self.checkpoints.lost()

    def raise_failure(self) -> None:
        """Raise, on every rank, why the last commit could not be written."""

        def on_main() -> None:
            self.writer.raise_failure()
            self.checkpoints.check()

        self.ranks.on_main(on_main, what="failure of the last commit")

    def commit_step(self, *, wait: bool) -> None:
        """Commit the middle of a round: a snapshot now, the rest in the background unless `wait`."""
        self.gather_damage()
        with self.ranks.in_phase("committing"):
            position = self.state.progress.round, self.state.progress.updates
            if position != self.last_commit:
                self._begin(self.checkpoints.commit_step)
                self.last_commit = position
            if wait:
                self.ranks.on_main(self.writer.wait, what="commit of the step")

    def commit_round(self, ticket: Ticket, result: EvalResult) -> None:
        """Commit a round with its ticket; returns when it is written."""

        def write(snapshot: Snapshot, keep_last: int, pending: bytes) -> None:
            self.checkpoints.commit_round(ticket, snapshot, result.table(), result.pictures, keep_last, pending)

        with self.ranks.in_phase("committing"):
            self._begin(write)
            self.ranks.on_main(self.writer.wait, what="commit of the round")

    def _begin(self, write: Callable[[Snapshot, int, bytes], None]) -> None:
        """Begin to write a snapshot, on rank 0, once the commit before is written.

        Steps that are committed are not trained again, and so not logged to MLflow again: records that it has not
        received are committed with them.
        """
        self.tracker.flush()
        self.ranks.on_main(self.writer.wait, what="commit before this one")
        snapshot = self.state.snapshot(keep=self.ranks.is_main)

        def on_main() -> None:
            assert snapshot is not None
            self.writer.begin(lambda: write(snapshot, self.config.keep_last, self.tracker.pending()), "a commit")

        self.ranks.on_main(on_main, what="snapshot")

    def gather_damage(self) -> None:
        """Put what any rank found damaged in this round into every rank's progress."""
        for damaged in self.ranks.gather_objects(self.loader.damaged):
            self.state.progress.damaged |= damaged

    def save_rewind_point(self, progress: Progress) -> None:
        """Save the weights that later rounds return to, before any commit that is made after them. Idempotent."""
        progress.rewind_digest = self.state.digest()
        self.ranks.check_agreement("the rewind point", progress.rewind_digest)
        name = rewind_name(progress.rewind_digest)
        weights = {n: w.cpu() for n, w in self.state.gather_full(self.state.weights) if self.ranks.is_main}
        self._write_now(lambda: self.checkpoints.save_tensors(name, weights), "the rewind point")

    def finish_run(self, keep: schema.KeepSection) -> None:
        """After the last round: keep rounds only; name the best and drop other weights, if the config says so."""
        with self.ranks.in_phase("committing"):
            self._write_now(lambda: keep_rounds(self.checkpoints, keep), "the end of the run")

    def _write_now(self, work: Callable[[], None], what: str) -> None:
        """Write something small and wait for it, with the writer's retries."""

        def on_main() -> None:
            self.writer.begin(work, what)
            self.writer.wait()

        self.ranks.on_main(on_main, what=what)


def keep_rounds(checkpoints: Checkpoints, keep: schema.KeepSection) -> None:
    """Remove commits of steps; mark the best round by validation and drop other rounds' weights as `keep` says."""
    checkpoints.finish()
    if not keep.by:
        return
    tickets = [t for t in checkpoints.tickets() if checkpoints.has_weights(t.round)]
    scores = {t.round: validation_score(t, keep.by) for t in tickets}
    best = max(scores, key=lambda r: (scores[r], r))
    checkpoints.mark_best(best, scores[best], keep.by)
    if keep.rounds == "best":
        for ticket in checkpoints.tickets():
            if ticket.round not in (best, tickets[-1].round):
                checkpoints.drop_weights(ticket.round)
