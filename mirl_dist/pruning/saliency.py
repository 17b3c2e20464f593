"""Computes |w dL/dw|, the first-order change of the loss when a weight is removed.

At the initial weights this is the connection sensitivity of SNIP (Lee et al. 2019, arXiv 1810.02340), without its
normalisation by the sum over all weights, which does not change the order. After training it is the gradient-magnitude
product of Blalock et al. 2020, arXiv 2003.03033.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


def gradients(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    at: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss by parameter name, summed over batches in their order: float64.

    batches: (degraded, clean), float (B, 3, H, W) each, on the network's device; loss: (restored, clean) -> any shape,
    averaged here; at: values of all parameters to use instead of the network's own, zero where pruned. The gradient is
    zero for a parameter that the loss does not depend on. Runs the network in evaluation mode; restores its mode, and
    does not change its weights or their `.grad`.
    """
    values = {n: w.detach().requires_grad_() for n, w in (at or dict(network.named_parameters())).items()}
    sums = {n: torch.zeros_like(value, dtype=torch.float64) for n, value in values.items()}
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        for degraded, clean in batches:
            with torch.enable_grad():
                mean = loss(torch.func.functional_call(network, values, (degraded,)), clean).mean()
            gradients = torch.autograd.grad(mean, list(values.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient
    finally:
        for module, training in modes.items():
            module.training = training
    return sums


def scores(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return |w g| of every tensor with a gradient: computed in float64, float32 of its shape."""
    return {n: (weights[n].detach().double() * g).abs().float() for n, g in gradients.items()}
