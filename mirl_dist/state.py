"""All that a restart needs, as one object: weights, moments, masks, and a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from mirl_dist.faults import Fault
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks
from mirl_dist.ticket import Curve

MakeOptimiser = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Progress(BaseModel):
    """Where a run stands. epoch, step: the next optimiser step of the round; updates: optimiser steps done in it.

    bad: global batches of this round that were left out, their loss or gradient not being finite; unreported: losses
    and samples per task since the last report, summed over ranks; samples: read by all ranks in all rounds; skipped:
    reads of this round in which a sample stood in for a damaged one; damaged: what this round met that was damaged,
    'shard' or 'shard key' -> why; seconds: spent training in all rounds; threshold, parent: of the round's mask and of
    the ticket it was made from (None in a dense round 0). began: the optimiser step that the round began at; curve:
    scores within it; rewind_digest: of the weights that later rounds return to, where those are of a step of round 0.
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


class Snapshot(NamedTuple):
    """A run at one moment, on the CPU and out of training's way."""

    progress: Progress
    masks: Masks
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


@dataclass
class State:
    """The live run of one rank. `weights` are the network's parameters by name, changed in place; parent: the digest of
    the ticket that the run began from, if any."""

    weights: dict[str, nn.Parameter]
    masks: Masks
    make_optimiser: MakeOptimiser
    parent: str | None = None
    progress: Progress = field(default_factory=Progress)
    optimiser: torch.optim.Optimizer = field(init=False)
    _copies: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin_round(0, self.masks, threshold=0.0, parent=self.parent)

    def begin_round(
        self,
        round_: int,
        masks: Masks,
        *,
        threshold: float,
        parent: str | None,
        began: int = 0,
        steps_per_epoch: int = 1,
    ) -> None:
        """A fresh optimiser and the position of optimiser step `began` of a round. Weights are the caller's."""
        device = next(iter(self.weights.values())).device
        self.masks = {name: mask.to(device) for name, mask in masks.items()}
        self.optimiser = self.make_optimiser(self.weights)
        self.progress = Progress(
            round=round_,
            epoch=began // steps_per_epoch,
            step=began % steps_per_epoch,
            updates=began,
            began=began,
            rewind_digest=self.progress.rewind_digest,
            samples=self.progress.samples,
            seconds=self.progress.seconds,
            threshold=threshold,
            parent=parent,
            mask_digest=masking.digest(masks),
        )

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy named tensors into the network. Raises Fault for names or shapes that are not the network's."""
        mine = {name: tuple(p.shape) for name, p in self.weights.items()}
        theirs = {name: tuple(t.shape) for name, t in weights.items()}
        if mine != theirs:
            odd = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            raise Fault(
                f"saved weights and the network differ in {len(odd)} tensors, first '{odd[0]}': saved "
                f"{theirs.get(odd[0], 'absent')}, network {mine.get(odd[0], 'absent')}. The model section differs.",
                everywhere=True,
            )
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(weights[name])

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's first and second moments as '<weight>.exp_avg' and '<weight>.exp_avg_sq', float32."""
        found = {}
        for name, parameter in self.weights.items():
            for kind in _MOMENTS:
                if kind in self.optimiser.state[parameter]:
                    found[f"{name}.{kind}"] = self.optimiser.state[parameter][kind]
        return found

    def snapshot(self) -> Snapshot:
        """Copies of weights and moments as they are now. The next snapshot is written into the same memory."""
        weights = self._copied({name: parameter.detach() for name, parameter in self.weights.items()})
        moments = self._copied(self.moments())
        if any(parameter.is_cuda for parameter in self.weights.values()):
            torch.cuda.synchronize()  # the copies are on their way only
        return Snapshot(self.progress.model_copy(deep=True), dict(self.masks), weights, moments)

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            if name not in self._copies:
                pinned = tensor.device.type == "cuda"  # page-locked memory: the copy runs at the bus's speed
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            copies[name] = self._copies[name].copy_(tensor, non_blocking=True)
        return copies

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """The inverse of `moments`, with the count of its updates that were not left out."""
        for name, parameter in self.weights.items():
            if f"{name}.{_MOMENTS[0]}" in moments:
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(self.progress.updates - self.progress.began - self.progress.bad)),
                    **{kind: moments[f"{name}.{kind}"].clone().to(parameter.device) for kind in _MOMENTS},
                }
