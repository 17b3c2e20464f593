"""One training step, or one restored image, of the published formulation, as a user of that code runs it.

PyTorch's defaults (allocator, threads, AdamW), no masks, no determinism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.published.promptir import PublishedPromptIR


def prepare(
    *,
    batch: int = 8,
    patch: int = 64,
    precision: str = "fp32",
    image: Sequence[int] | None = None,
    **sizes: Any,
) -> Callable[[], None]:
    """Build everything, and return a function that makes one training step, or restores one image (height, width).

    precision: 'fp32' or 'bf16' (autocast). sizes: of the network, instead of the published ones.
    """
    torch.manual_seed(0)
    network = PublishedPromptIR(**sizes)

    def run(degraded: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            restored: Tensor = network(degraded)
        return restored

    if image is not None:
        height, width = image
        degraded = torch.rand(1, 3, height, width)
        padding = (0, -width % 8, 0, -height % 8)

        def restore_image() -> None:
            with torch.no_grad():
                run(F.pad(degraded, padding, mode="reflect"))[..., :height, :width].clamp(0, 1).numpy()

        return restore_image

    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-4)
    degraded, clean = torch.rand(2, batch, 3, patch, patch)

    def train_step() -> None:
        optimiser.zero_grad()
        loss = F.l1_loss(run(degraded), clean)
        loss.backward()
        optimiser.step()

    return train_step
