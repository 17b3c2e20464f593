"""How much the loss changes, to first order, when a weight goes: |w dL/dw|.

At first values: SNIP's connection sensitivity (Lee et al. 2019, arXiv 1810.02340), but for its division by the sum over
all weights, which changes no order. After training: the gradient-magnitude product of Blalock et al. 2020, arXiv
2003.03033.
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
    """The sum over batches of the gradient of the mean loss, by parameter: float64, added in the order of batches.

    batches: (degraded, clean), float (B, 3, H, W) each, on the network's device; loss: (restored, clean) to any shape,
    of which the mean counts; at: values in place of the network's own, all of them, pruned ones zero. Zeros for a
    parameter that the loss does not depend on. The network is in evaluation mode meanwhile; its weights, their `.grad`
    and its mode stay as they are.
    """
    values = {n: w.detach().requires_grad_() for n, w in (at or dict(network.named_parameters())).items()}
    names = sorted(values)
    sums = {n: torch.zeros_like(values[n], dtype=torch.float64) for n in names}
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        for degraded, clean in batches:
            with torch.enable_grad():
                mean = loss(torch.func.functional_call(network, values, (degraded,)), clean).mean()
            for name, gradient in zip(
                names, torch.autograd.grad(mean, [values[n] for n in names], allow_unused=True), strict=True
            ):
                if gradient is not None:
                    sums[name] += gradient
    finally:
        for module, training in modes.items():
            module.training = training
    return sums


def scores(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w g| of every tensor with a gradient: float32 of its shape, rounded once."""
    return {n: (weights[n].detach().double() * g).abs().float() for n, g in gradients.items()}
