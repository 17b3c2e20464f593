"""Counts the floating-point operations of a training step, and measures how many a second this device makes at best."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

from mirl_dist import models
from mirl_dist.models.channel_ops import meta_stands_for
from mirl_dist.training import losses

_SIDES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied to measure the peak."""
_PEAK_SECONDS = 0.4


def step_flops(name: str, sizes: Mapping[str, Any], side: int, samples: int) -> int:
    """Count multiplications and additions of forward and backward passes over patches of side x side pixels.

    name, sizes: as for `models.create`. Counts convolutions and matrix products with torch's FlopCounterMode on the
    `meta` device, in the order in which a CPU computes, which discards no product; norms, activations and the optimiser
    are left out.
    """
    with torch.device("meta"):
        model, images = models.create(name, **sizes), torch.rand(1, 3, side, side)
    with meta_stands_for("cpu"), counter() as counted:
        losses.per_sample_l1(model(images), images).mean().backward()  # type: ignore[no-untyped-call]
    return samples * int(counted.get_total_flops())


def counter() -> FlopCounterMode:
    """Return a counter of operations, as a context."""
    own = {torch.ops.aten.convolution_backward: _convolution_backward_flops, torch.ops.aten.baddbmm_: baddbmm_flop}
    return FlopCounterMode(display=False, custom_mapping=own)


def _convolution_backward_flops(
    gradient: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *options: Any, **_: Any
) -> int:
    """Count the operations of a convolution's backward pass. Arguments are the shapes of those of the operator.

    torch 2.13 counts a grouped convolution as one with all its channels: 96 times too many for 96 depthwise filters.
    """
    needed = sum(options[-1][:2])  # of the gradients of input and weight
    return 2 * int(needed) * math.prod(gradient) * math.prod(weight[1:])


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply large square matrices for a moment; return the operations per second of the fastest product."""
    side, best, began = _SIDES[device.type], math.inf, time.perf_counter()
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    torch.mm(left, right, out=product)
    while time.perf_counter() - began < _PEAK_SECONDS:
        wait_for_device(device)
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        wait_for_device(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def wait_for_device(device: torch.device) -> None:
    """Wait until the work queued on a GPU is done; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
