"""Learning rates as a pure function of the position: nothing to carry, nothing to restore."""

from __future__ import annotations

import math


def rate(
    peak: float,
    *,
    by: str,
    epoch: int,
    step: int,
    steps_per_epoch: int,
    warmup_epochs: float,
    horizon_epochs: float,
) -> float:
    """The learning rate of one optimiser step.

    peak: rate after the warm-up. epoch, step: from 0. by='epoch', as published (MIR-L eq. 6 and the released code):
    e peak / (warmup - 1) for e < warmup, so epoch 0 runs at rate 0, then peak (1 + cos(pi (e - warmup) /
    (horizon - warmup))) / 2. by='step': the same shape over fractions of epochs, starting at peak / warm-up steps.
    """
    if by == "epoch":
        now, ramp = float(epoch), max(warmup_epochs - 1, 1)
    else:
        warmup_steps = warmup_epochs * steps_per_epoch
        done = epoch * steps_per_epoch + step
        if done < warmup_steps:
            return peak * min(1.0, (done + 1) / warmup_steps)
        now, ramp = done / steps_per_epoch, 1.0
    if now < warmup_epochs:
        return peak * now / ramp
    return 0.5 * peak * (1 + math.cos(math.pi * (now - warmup_epochs) / (horizon_epochs - warmup_epochs)))
