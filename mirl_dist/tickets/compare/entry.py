"""One ticket as comparisons see it, wherever it came from: a store, MLflow or a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.training.ticket import DENSE, Ticket

__all__ = ["DENSE", "Entry"]


class Entry(NamedTuple):
    """A ticket with what it is compared by.

    run: a short name of its run, unique in a comparison. method: DENSE for a whole network, else the run's method
    (config.method). seed: the run's. training: equal for runs that train and score alike, so that those of one seed
    have the same dense network (config.training); experiment: equal for the seeds of one experiment
    (config.experiment). parts: its prunable tensors in the network's order, name -> number of weights.
    mask: name -> alive bits, uint8, first weight in the highest bit (pruning.masks.pack); None where it is unknown.
    strip: its pictures as PNG bytes (image_strip.strip), None without.
    """

    run: str
    method: str
    seed: int
    training: str
    experiment: str
    ticket: Ticket
    parts: Mapping[str, int]
    mask: Mapping[str, NDArray[np.uint8]] | None
    strip: bytes | None

    @property
    def name(self) -> str:
        """'run, round 3'."""
        return f"{self.run}, round {self.ticket.round}"
