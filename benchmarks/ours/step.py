"""One training step, or one restored image, as `mirl-dist train` and `mirl-dist evaluate` run them.

With the process's allocator settings, determinism, masks (a fifth of the weights pruned), the check that the loss is
finite, and the optimiser of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mirl_dist import models
from mirl_dist.config.config import Config
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.evaluation import evaluate
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import PruneConfig, in_scope, prune
from mirl_dist.training import losses
from mirl_dist.training.run import optimiser_of
from mirl_dist.training.step_status import UpdateGate, sum_status


def prepare(
    *,
    batch: int = 8,
    patch: int = 64,
    precision: str = "fp32",
    image: Sequence[int] | None = None,
    **sizes: Any,
) -> Callable[[], None]:
    """Build everything, and return a function that makes one training step, or restores one image (height, width).

    batch: samples of this rank. precision: 'fp32' or 'bf16'. sizes: of the network, instead of the published ones.
    """
    ranks = Ranks(device="cpu", precision=precision)
    network = models.create("promptir", **sizes)
    if image is not None:
        pixels = np.random.default_rng(0).integers(0, 256, (*image, 3), dtype=np.uint8)
        network.eval()

        def restore_image() -> None:
            evaluate.restore(network, pixels, ranks.device, precision=precision)

        return restore_image

    config = Config()
    engine, wrapped = ranks.network.engine(network, optimiser_of(config.optimiser), torch.zeros(1, 3, patch, patch))
    dense = masking.dense_masks(engine.weights, in_scope(engine.weights, config.prune.scope))
    masks = prune(engine.weights, dense, PruneConfig(0.2)).masks
    masking.apply_masks(engine.weights, masks)
    engine.set_masks(masks)
    gate = UpdateGate(0, ranks.device)
    degraded, clean = torch.rand(2, batch, 3, patch, patch)

    def train_step() -> None:
        sample_losses = losses.per_sample_l1(ranks.network.forward(wrapped, degraded), clean)
        ranks.network.backward(sample_losses.mean())
        engine.mask_gradients()
        norm = engine.clip(config.optimiser.clip_norm)
        total = sum_status((False, False, False, False), 0, sample_losses.detach().sum(), norm, ranks)
        engine.step(config.optimiser.lr, gate.refuses(total))

    return train_step
