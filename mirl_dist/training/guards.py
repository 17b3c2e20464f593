"""Guards training: detects non-finite losses and gradients, loss spikes, and pruned weights that moved."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from mirl_dist.data.sample import Batch
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import InvariantError, UserError
from mirl_dist.observability.progress import say
from mirl_dist.pruning import masks as masking
from mirl_dist.training.state import Progress, TrainState
from mirl_dist.training.step_status import StepStatus

_REMEMBERED, _NAMED = 50, 3


@dataclass
class StepLosses:
    """The per-sample losses of a step on this rank, pass by pass. no_batch: this rank lacks a batch in some pass."""

    passes: list[tuple[Tensor, Batch]] = field(default_factory=list)
    no_batch: bool = False

    def add(self, losses: Tensor, batch: Batch) -> None:
        self.passes.append((losses, batch))

    def sum(self, device: torch.device) -> Tensor:
        """Return the sum of all losses, a float64 scalar on the device."""
        return torch.cat([torch.zeros(0, device=device), *(losses for losses, _ in self.passes)]).double().sum()

    def replaced(self) -> int:
        """Return the number of reads in which a damaged sample was replaced by another."""
        return sum(batch.skipped for _, batch in self.passes)

    def keys(self) -> list[str]:
        """Return the samples of the step as task:key."""
        return [key for _, batch in self.passes for key in batch.keys]

    def not_finite(self) -> list[str]:
        """Return the samples whose loss is not finite, as task:key."""
        finite = [is_finite for losses, _ in self.passes for is_finite in torch.isfinite(losses).tolist()]
        return [key for key, is_finite in zip(self.keys(), finite, strict=True) if not is_finite]

    def worst(self) -> list[tuple[float, str]]:
        """Return the (loss, task:key) of the samples with the highest losses, highest first."""
        losses = torch.cat([losses for losses, _ in self.passes]).tolist()
        return sorted(zip(losses, self.keys(), strict=True), reverse=True)[:_NAMED]


def position(progress: Progress) -> str:
    """Return the position in words, for messages."""
    return f"round {progress.round}, epoch {progress.epoch}, step {progress.step}"


def check_step(status: StepStatus, losses: StepLosses, progress: Progress, skip: int, ranks: Ranks) -> bool:
    """Return whether the step was skipped because a loss or the averaged gradient is not finite; warn if so.

    All ranks call this, with the same status. progress: before the step. Raises UserError on every rank, naming the
    samples, if the round has already skipped `skip` steps.
    """
    if not status.is_bad:
        return False
    if not math.isfinite(status.loss):
        named = _name_samples(losses.not_finite(), ranks)
        problem = f"the loss is not finite at {position(progress)}, samples as task:key: {named}"
        advice = "Check those samples, or lower optimiser.lr or optimiser.clip_norm"
    else:
        named = _name_samples(losses.keys(), ranks)
        problem = f"the gradient is not finite at {position(progress)} though every loss was; samples: {named}"
        advice = "Lower optimiser.lr, or train in fp32,"
    _skip_step(problem, advice, progress, skip, ranks)
    return True


def _name_samples(keys: list[str], ranks: Ranks) -> str:
    """Return the samples of all ranks that have any, by rank."""
    per_rank = zip(ranks.names, ranks.gather_objects(keys), strict=True)
    return "; ".join(f"{name}: {', '.join(keys)}" for name, keys in per_rank if keys)


def _skip_step(problem: str, advice: str, progress: Progress, skip: int, ranks: Ranks) -> None:
    if progress.bad >= skip:
        before = f" {progress.bad} such batches were skipped before (guard.skip_bad_batches)." if progress.bad else ""
        raise UserError(
            f"{problem}. Nothing of this step was applied.{before} {advice} in a new run.folder, or allow some with "
            f"guard.skip_bad_batches={max(2 * skip, 10)} and go on from the last commit.",
            everywhere=True,
        )
    if ranks.is_main:
        say(f"warning: {problem}. The step is skipped ({progress.bad + 1} of {skip} allowed in a round).")


class SpikeDetector:
    """Warns of a step whose loss is more than `factor` times the median of the previous 50 steps.

    All ranks must call it at every step, with the same loss. factor: None disables it.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor, self._before = factor, deque[float](maxlen=_REMEMBERED)

    def check(self, loss: float, step_losses: StepLosses, progress: Progress, ranks: Ranks) -> None:
        """Warn, naming the samples with the highest losses, if `loss` (mean over the global batch) is a spike."""
        usual = median(self._before) if len(self._before) == _REMEMBERED else None
        if self._factor is not None and usual is not None and loss > self._factor * usual:
            per_rank = ranks.gather_objects(step_losses.worst(), what="gather of the worst samples")
            worst = [(value, key, rank) for rank, pairs in enumerate(per_rank) for value, key in pairs]
            worst = sorted(worst, reverse=True)[:_NAMED]
            named = ", ".join(f"{key} ({value:.3g}, {ranks.names[rank]})" for value, key, rank in worst)
            if ranks.is_main:
                times = loss / usual if usual else float("inf")
                say(
                    f"warning: the loss at {position(progress)} is {loss:.3g}, {times:.0f} times the median "
                    f"{usual:.3g} of the {_REMEMBERED} steps before. Highest: {named}."
                )
        self._before.append(loss)


def check_pruned_weights(state: TrainState, ranks: Ranks) -> None:
    """Check that pruned weights are exactly zero on every rank after training."""
    moved = masking.find_nonzero_pruned(state.weights, state.masks)
    check_on_ranks(f"pruned weights moved in round {state.progress.round}", moved, ranks)


def check_on_ranks(broken: str, tensor: str | None, ranks: Ranks) -> None:
    """Raise InvariantError on every rank if any rank passes the name of a tensor. broken: the invariant, in words."""
    tensors = zip(ranks.names, ranks.gather_objects(tensor), strict=True)
    violations = [f"{rank}, tensor '{name}'" for rank, name in tensors if name is not None]
    if violations:
        raise InvariantError(
            f"{broken}: {'; '.join(violations)}. The round cannot be trusted and was not recorded; start again with "
            "--resume auto, and report this with the run's config.",
            everywhere=True,
        )
