"""Defines the position of a run, which every commit records."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from mirl_dist.training.ticket import Curve


class Progress(BaseModel):
    """The position of a run. epoch, step: the next optimiser step of the round; updates: optimiser steps done in it.

    bad: global batches of this round that were skipped for a non-finite loss or gradient; unreported: losses and
    samples per task since the last report, summed over ranks; samples: read by all ranks in all rounds; skipped: reads
    of this round in which a damaged sample was replaced by another; damaged: damage found in this round, 'shard' or
    'shard key' -> problem; seconds: spent training in all rounds; threshold: of the round's mask; parent: digest of the
    ticket that the mask was made from (None in a dense round 0). began: the optimiser step at which the round began;
    curve: validation scores during it; rewind_digest: of the weights of the rewind step, '' without one.
    """

    model_config = ConfigDict(extra="forbid")

    round: int = 0
    epoch: int = 0
    step: int = 0
    updates: int = 0
    bad: int = 0
    unreported: list[list[float]] = []
    samples: int = 0
    skipped: int = 0
    damaged: dict[str, str] = {}
    seconds: float = 0.0
    threshold: float = 0.0
    parent: str | None = None
    mask_digest: str = ""
    began: int = 0
    curve: Curve = Curve()
    rewind_digest: str = ""

    def ahead(self, steps: int, steps_per_epoch: int) -> Progress:
        """Return the position after so many more optimiser steps; itself for 0."""
        if not steps:
            return self
        updates = self.updates + steps
        epoch, step = divmod(updates, steps_per_epoch)
        return self.model_copy(update={"updates": updates, "epoch": epoch, "step": step})
