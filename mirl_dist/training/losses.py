"""Computes the loss per sample, whose mean is minimised, and sums per task for reports."""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """Return the mean absolute error of each sample, float32 (B,); inputs are (B, 3, H, W).

    All patches have one size, so its mean over samples is the published L1 loss. MIR-L section IV-A.
    """
    return (restored.float() - clean.float()).abs().mean(dim=(1, 2, 3))


def by_task(losses: Tensor, task: Tensor, tasks: int) -> Tensor:
    """Return the sum of losses and the number of samples of each task, float64 (2, tasks), for a sum over ranks.

    losses: (B,); task: int64 (B,), the task of each sample; tasks: number of tasks.
    """
    sums = torch.zeros(2, tasks, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, task, losses.detach().double())
    sums[1].index_add_(0, task, torch.ones_like(losses, dtype=torch.float64))
    return sums
