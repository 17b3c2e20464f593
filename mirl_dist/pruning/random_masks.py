"""Random masks as controls: they show whether a ticket's exact mask matters, or only its density."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mirl_dist.config.seeding import rng
from mirl_dist.pruning.masks import Masks


def random_masks(masks: Mapping[str, Tensor], seed: int, per: str) -> Masks:
    """Return masks of the same shapes with random surviving weights, which depend only on `masks` and the seed.

    per: 'layer' keeps the number of surviving weights of each tensor, 'global' only their number over all tensors.
    """
    names = sorted(masks)
    draws = {n: rng("random mask", seed, n).random(masks[n].numel(), dtype=np.float32) for n in names}
    groups = [[name] for name in names] if per == "layer" else [names]
    random: Masks = {}
    for group in groups:
        scores = np.concatenate([draws[name] for name in group])
        surviving = sum(int(masks[name].sum()) for name in group)
        keep = np.zeros(scores.size, dtype=bool)
        keep[np.argsort(scores, kind="stable")[scores.size - surviving :]] = True
        ends = np.cumsum([masks[name].numel() for name in group])[:-1]
        for name, part in zip(group, np.split(keep, ends), strict=True):
            random[name] = torch.from_numpy(part.reshape(masks[name].shape))
    return random
