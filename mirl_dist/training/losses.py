"""Losses per sample and per task, and how they become the one number that is minimised."""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean absolute error of each sample: (B, 3, H, W) twice to float32 (B,). MIR-L section IV-A."""
    return (restored.float() - clean.float()).abs().mean(dim=(1, 2, 3))


def combine(losses: Tensor) -> Tensor:
    """The mean over samples: L1 as published, since all patches have one size. (B,) to a scalar."""
    return losses.mean()


def by_task(losses: Tensor, task: Tensor, tasks: int) -> Tensor:
    """float64 (2, tasks): sum of losses and number of samples per task, ready to be summed over ranks."""
    sums = torch.zeros(2, tasks, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, task, losses.detach().double())
    sums[1].index_add_(0, task, torch.ones_like(losses, dtype=torch.float64))
    return sums
