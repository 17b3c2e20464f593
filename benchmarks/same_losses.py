"""Trains the published formulation and ours from the same weights on the same batches, and compares their losses.

    python -m benchmarks.same_losses [--steps 200] [--batch 8] [--patch 64] [--sizes '{"dim": 8}']

float32, AdamW with the published settings. Prints the relative difference of the losses at every tenth step, and the
largest one; exit code 1 if it is above 1e-4. The images are smooth random fields with noise, so that losses fall.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.published.promptir import PublishedPromptIR
from mirl_dist import models
from mirl_dist.distributed.hardware import keep_freed_memory

TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--sizes", type=json.loads, default={}, help="sizes of the network, JSON")
    args = parser.parse_args()
    keep_freed_memory()
    largest = 0.0
    for step, published, ours in losses(args.steps, args.batch, args.patch, args.sizes):
        difference = abs(ours - published) / published
        largest = max(largest, difference)
        if step % 10 == 0 or step == args.steps:
            print(f"step {step:4}  published {published:.6f}  ours {ours:.6f}  difference {difference:.1e}", flush=True)
    print(f"largest relative difference in {args.steps} steps: {largest:.1e}")
    sys.exit(largest > TOLERANCE)


def losses(steps: int, batch: int, patch: int, sizes: dict[str, Any]) -> Iterator[tuple[int, float, float]]:
    """Yield the step, counted from 1, and the losses of the published formulation and of ours."""
    torch.manual_seed(0)
    published = PublishedPromptIR(**sizes)
    ours = models.create("promptir", **sizes)
    ours.load_state_dict(models.from_official("promptir", published.state_dict(), **sizes).weights)
    sides = [(network, torch.optim.AdamW(network.parameters(), lr=2e-4)) for network in (published, ours)]
    draw = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        degraded, clean = batch_of(batch, patch, draw)
        first, second = (train_step(network, optimiser, degraded, clean) for network, optimiser in sides)
        yield step, first, second


def train_step(network: nn.Module, optimiser: torch.optim.Optimizer, degraded: Tensor, clean: Tensor) -> float:
    """Return the L1 loss, and update the network once."""
    optimiser.zero_grad()
    loss = F.l1_loss(network(degraded), clean)
    loss.backward()
    optimiser.step()
    return loss.item()


def batch_of(batch: int, patch: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy and clean images (B, 3, patch, patch) in [0, 1], with noise of standard deviation 25 / 255."""
    coarse = torch.rand(batch, 3, patch // 8 + 1, patch // 8 + 1, generator=draw)
    clean = F.interpolate(coarse, (patch, patch), mode="bicubic").clamp(0, 1)
    noise = torch.randn(clean.shape, generator=draw) * 25 / 255
    return (clean + noise).clamp(0, 1), clean


if __name__ == "__main__":
    main()
