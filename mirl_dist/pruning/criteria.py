"""Defines the pruning criteria, and computes the scores of those that need only the weights."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirl_dist.config.seeding import rng_from_digest


class Criterion(NamedTuple):
    """A pruning criterion.

    weights_from: which weights are scored; needs: what the scores need besides them; description: for the user.
    """

    weights_from: Literal["trained", "initial"]
    needs: Literal["nothing", "network", "gradients"]
    description: str


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion("trained", "nothing", "|w| after training (MIR-L, eq. 3 to 5; Han et al. 2015)"),
    "random": Criterion("trained", "nothing", "chance: run.seed and the tensor's name (MIR-L's PIR-OSR)"),
    "synflow": Criterion("initial", "network", "flow through w, without data (SynFlow, Tanaka et al. 2020)"),
    "snip": Criterion("initial", "gradients", "|w dL/dw| at first values (SNIP, Lee et al. 2019)"),
    "gradient": Criterion("trained", "gradients", "|w dL/dw| after training (Blalock et al. 2020)"),
}
"""prune.criterion -> its definition. The weights with the smallest |score| are pruned first."""


def scores_of_weights(criterion: str, name: str, weights: Tensor, seed: int) -> Tensor:
    """Return the flat float32 scores of a tensor by a criterion that needs only the weights.

    Random scores are uniform in [0, 1) and depend only on the seed, the name and the number of weights.
    Raises ValueError for any other criterion: the caller must compute its scores.
    """
    if criterion == "magnitude":
        return weights.detach().float().reshape(-1)
    if criterion == "random":
        generator = rng_from_digest(hashlib.sha256(f"random-mask|{seed}|{name}".encode()).digest())
        return torch.from_numpy(generator.random(weights.numel(), dtype=np.float32)).to(weights.device)
    raise ValueError(f"the criterion '{criterion}' needs {CRITERIA[criterion].needs}: pass its scores")
