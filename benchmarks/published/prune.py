"""Prunes and rewinds as MIR-L publishes it: the percentile of all surviving magnitudes, with numpy, then a product.

The product of the old weights with the new masks is left out, because the rewind overwrites it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.network_shapes import drawn_weights
from mirl_dist.pruning.prune import in_scope


def prepare(weights: int, fraction: float = 0.2) -> Callable[[], None]:
    """Return one cut of `fraction` of so many weights, with the rewind of the rest.

    The first round's weights are read and never written, so that every call does the same work.
    """
    trained, initial, network = drawn_weights(weights, 1), drawn_weights(weights, 2), drawn_weights(weights, 3)
    masks = {name: np.ones(tuple(trained[name].shape), dtype=bool) for name in in_scope(trained, "published")}

    def cut() -> None:
        magnitudes = []
        for name in masks:
            tensor = trained[name].numpy()
            magnitudes.append(np.abs(tensor[tensor != 0]))
        threshold = np.percentile(np.concatenate(magnitudes), 100 * fraction)
        pruned = {n: np.where(np.abs(trained[n].numpy()) < threshold, False, mask) for n, mask in masks.items()}
        for name, weight in network.items():
            point = initial[name].numpy()
            weight.copy_(torch.from_numpy(point * pruned[name] if name in pruned else point))

    return cut
