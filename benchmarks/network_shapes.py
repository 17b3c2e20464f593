"""Draws weights with the shapes of the full-size network, for measurements without a network."""

from __future__ import annotations

import torch
from torch import Tensor

from mirl_dist import models


def drawn_weights(number: int, seed: int) -> dict[str, Tensor]:
    """Return `number` float32 weights around 0 by name: the network's tensors in order, again if they do not suffice,
    the last one cut short."""
    with torch.device("meta"):
        shapes = [(name, tuple(p.shape)) for name, p in models.create("promptir").named_parameters()]
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    while number:
        name, shape = shapes[len(weights) % len(shapes)]
        size = torch.Size(shape).numel()
        tensor = torch.randn(shape if size <= number else (number,), generator=generator).mul_(0.02)
        weights[f"{len(weights) // len(shapes)}.{name}"] = tensor
        number -= tensor.numel()
    return weights
