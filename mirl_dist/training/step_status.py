"""The outcome of a step: one vector of sums over all ranks, which gates the update before the host has read it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mirl_dist.distributed.host_copy import to_device
from mirl_dist.distributed.ranks import Ranks

_ENDS, _LOSS = 2, 5
"""In the vector of `sum_status`: one of the first 2 numbers, if not 0, ends training; loss and norm begin at 5."""


class StepStatus(NamedTuple):
    """The outcome of a step, the same on all ranks.

    A flag is set if any rank sets it (no_batch: a stop was requested while waiting for a shard). replaced: reads in
    which a damaged sample was replaced by another; loss: sum over samples; norm: of the averaged gradient.
    """

    no_batch: bool
    stop: bool
    commit_failed: bool
    commit_busy: bool
    replaced: int
    loss: float
    norm: float

    @classmethod
    def of(cls, total: list[float], world: int) -> StepStatus:
        """Interpret the vector of `sum_status`, to which each rank has added the same norm."""
        no_batch, stop, failed, busy, replaced, loss, norms = total
        return cls(no_batch > 0, stop > 0, failed > 0, busy > 0, int(replaced), loss, norms / world)

    @property
    def is_bad(self) -> bool:
        """Whether the loss or the gradient is not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))


def sum_status(flags: tuple[bool, bool, bool, bool], replaced: int, loss: Tensor, norm: Tensor, ranks: Ranks) -> Tensor:
    """Sum a rank's outcome of a step over all ranks: float64 (7,) on the device. A collective, one in a step.

    flags: no_batch, stop, commit_failed and commit_busy of this rank; loss: sum over its samples; norm: of the averaged
    gradient, equal on all ranks.
    """
    on_host = to_device([*flags, replaced], ranks.device)
    on_device = torch.stack([loss.double(), norm.to(ranks.device, torch.float64)])
    return ranks.sum_here(torch.cat([on_host, on_device]), what="sum of losses and flags")


class UpdateGate:
    """Decides on the device which steps change the weights, so that the host may queue a step before it knows.

    A step is refused if its loss or gradient is not finite, or if a rank has no batch. Every step after one with which
    training ends is refused too, so whatever was queued behind it has not happened. (After a failed commit no state is
    kept.)
    """

    def __init__(self, skips: int, device: torch.device) -> None:
        """skips: how many steps of this round may still be skipped for a loss or gradient that is not finite."""
        self._skips_left = torch.full((), skips, dtype=torch.float64, device=device)
        self._closed = torch.zeros((), dtype=torch.bool, device=device)

    def refuses(self, total: Tensor) -> Tensor:
        """Return a float32 scalar, 1 if the step of this `sum_status` must not change the weights, else 0."""
        is_bad = ~(total[_LOSS:] < math.inf).all()  # false for NaN too; neither is ever negative
        refused = self._closed | is_bad | (total[0] > 0)
        self._skips_left = self._skips_left - is_bad.double()
        self._closed = self._closed | (total[:_ENDS] > 0).any() | (self._skips_left < 0)
        return refused.float()
