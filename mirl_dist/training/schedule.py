"""Computes the learning rate as a pure function of the position, so that no scheduler state needs to be saved."""

from __future__ import annotations

import math

from mirl_dist.config.config import Config
from mirl_dist.training.progress import Progress


def learning_rate(config: Config, progress: Progress, steps_per_epoch: int) -> float:
    """Return the learning rate at a position; one-shot fine-tuning has its own cosine schedule, without warm-up."""
    epochs, finetuning = config.round_epochs(progress.round), config.is_finetuning(progress.round)
    return rate(
        (config.prune.finetune_lr if finetuning else None) or config.optimiser.lr,
        by="step" if finetuning else config.schedule.by,
        epoch=progress.epoch,
        step=progress.step,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=0 if finetuning else config.schedule.warmup_epochs,
        horizon_epochs=epochs if finetuning else config.schedule.horizon_epochs or epochs,
    )


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
    """Return the learning rate of one optimiser step: linear warm-up, then cosine decay.

    peak: rate after the warm-up. epoch, step: from 0; step within the epoch.
    by='epoch', as published (MIR-L eq. 6 and the released code): for e < warmup, e * peak / (warmup - 1), so the rate
    is 0 in epoch 0; then peak * (1 + cos(pi * (e - warmup) / (horizon - warmup))) / 2.
    by='step': the same curve over fractional epochs, starting at peak / (warm-up steps).
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
