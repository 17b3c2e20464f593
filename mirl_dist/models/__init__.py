"""Creates networks by name, and converts their weights from and to official checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.models.official import Converted, convert, revert
from mirl_dist.models.official import write as write_official
from mirl_dist.models.promptir import PromptIR

__all__ = ["FORMULATION", "PromptIR", "create", "from_official", "to_official", "write_official"]

FORMULATION = "2"
"""Version of the order of computing in the networks: another one rounds differently. Recorded in tickets.

1: channels first. 2: channels last, scores before norms, attention and projection multiplied first.
"""
_NETWORKS = {"promptir": PromptIR}


def create(name: str, **sizes: Any) -> PromptIR:
    """Create a network with random weights: float (B, 3, H, W) in [0, 1] in and out, any H, W >= 1.

    sizes: keywords of the constructor; defaults are the published values. Weights are drawn from torch's global
    generator: seed it first. Raises UserError for an unknown name or keyword (listing the known ones) and for
    inconsistent sizes.
    """
    if name not in _NETWORKS:
        raise UserError(
            f"found the network name {name!r}, where a network is built. Use one of: {', '.join(_NETWORKS)}."
        )
    known = tuple(inspect.signature(_NETWORKS[name]).parameters)
    unknown = [key for key in sizes if key not in known]
    if unknown:
        raise UserError(
            f"found unknown sizes {', '.join(map(repr, unknown))}, where the network {name!r} is built. "
            f"Its sizes are: {', '.join(known)}."
        )
    return _NETWORKS[name](**sizes)


def from_official(name: str, state_dict: Mapping[str, Any], **sizes: Any) -> Converted:
    """Convert an official checkpoint for `create(name, **sizes).load_state_dict(weights)`.

    state_dict: names to tensors, with the prefix of a wrapper (`net.`, `module.`) on all or none, or a checkpoint with
    such a mapping under `state_dict`, `params` or the like. Tensors that the official class owns but never uses are
    dropped and reported, whatever their shape; other precisions are cast to float32. Raises UserError like `create`,
    one that lists all missing, unknown and misshapen tensors, and one for values that are not finite.
    """
    with torch.device("meta"):
        network = create(name, **sizes)
    return convert(name, network, state_dict)


def to_official(name: str, weights: Mapping[str, Tensor], **sizes: Any) -> dict[str, Tensor]:
    """Invert `from_official`: return the complete state dict of the official class, without prefix.

    Tensors that the class owns but never uses are zeros; nothing else is copied or cast. The official class exists only
    at the published sizes; at others, the shapes of the unused tensors follow the same rule. Raises UserError like
    `create`, and one that lists all missing, unknown and misshapen weights.
    """
    with torch.device("meta"):
        network = create(name, **sizes)
    return revert(name, network, weights)
