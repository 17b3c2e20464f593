"""Random masks as controls: does this very mask matter, or only how many weights it keeps, and where?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mirl_dist.config.seeding import generator
from mirl_dist.pruning.masks import Masks


def random_masks(masks: Mapping[str, Tensor], seed: int, per: str) -> Masks:
    """Masks of the same shapes whose alive weights are drawn at random, the same for the same seed everywhere.

    per: 'layer' keeps each tensor's number of alive weights, 'global' their number over all tensors.
    """
    names = sorted(masks)
    chance = {n: generator("random mask", seed, n).random(masks[n].numel(), dtype=np.float32) for n in names}
    groups = [[name] for name in names] if per == "layer" else [names]
    drawn: Masks = {}
    for group in groups:
        scores = np.concatenate([chance[name] for name in group])
        alive = sum(int(masks[name].sum()) for name in group)
        keep = np.zeros(scores.size, dtype=bool)
        keep[np.argsort(scores, kind="stable")[scores.size - alive :]] = True
        ends = np.cumsum([masks[name].numel() for name in group])[:-1]
        for name, part in zip(group, np.split(keep, ends), strict=True):
            drawn[name] = torch.from_numpy(part.reshape(masks[name].shape))
    return drawn
