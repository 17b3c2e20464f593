"""A ticket as used in comparisons, whether it was read from a store, MLflow or a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirl_dist.training.ticket import DENSE, Ticket

__all__ = ["CONTROL_PREFIX", "DENSE", "Entry"]

CONTROL_PREFIX = "control "
"""Prefix of a control's method."""


class Entry(NamedTuple):
    """A ticket with the values that comparisons need.

    run: short name of its run, unique in a comparison. method: DENSE for a dense network, else the run's method
    (Config.method). seed: of the run.
    training: digest of the training and scoring settings (Config.training_digest); runs with equal digest and seed have
    the same dense network. experiment: digest shared by all seeds of one experiment (Config.experiment_digest).
    parts: the prunable tensors in the network's order, name -> number of weights.
    mask: name -> packed mask, uint8, 1 for surviving, first weight in the highest bit (pruning.masks.pack); None if
    unknown. strip: sample images as PNG bytes (image_strip.strip); None if missing.
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
    def dense(self) -> bool:
        return self.method == DENSE

    @property
    def control(self) -> bool:
        return self.method.startswith(CONTROL_PREFIX)

    @property
    def name(self) -> str:
        """Name for display: 'RUN, round 3'."""
        return f"{self.run}, round {self.ticket.round}"
