"""Creates networks by name, and converts their weights from and to official checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mirl_dist.errors import UserError
from mirl_dist.models.official import Converted, convert, revert
from mirl_dist.models.official import write as write_official
from mirl_dist.models.promptir import PromptIR

__all__ = ["Converted", "PromptIR", "create", "from_official", "names", "to_official", "write_official"]

_NETWORKS = {"promptir": PromptIR}


def names() -> tuple[str, ...]:
    """Return the names that `create` accepts."""
    return tuple(_NETWORKS)


def create(name: str, **sizes: Any) -> nn.Module:
    """Create a network with random weights: float (B, 3, H, W) in [0, 1] in and out, any H, W >= 1.

    sizes: keywords of the constructor; defaults are the published values. Weights are drawn from torch's global
    generator: seed it first. Raises UserError for an unknown name or keyword (listing the known ones) and for
    inconsistent sizes.
    """
    _check_name_and_sizes(name, sizes)
    return _NETWORKS[name](**sizes)


def from_official(name: str, state_dict: Mapping[str, Any], **sizes: Any) -> Converted:
    """Convert an official checkpoint for `create(name, **sizes).load_state_dict(weights)`.

    state_dict: names to tensors, with or without Lightning's prefix `net.`, or a whole Lightning checkpoint. Tensors
    that the official class owns but never uses are dropped and reported; nothing is copied or cast. Raises UserError
    like `create`, and one that lists all missing, unknown and misshapen tensors.
    """
    _check_name_and_sizes(name, sizes)
    network, expected = _network_and_shapes(name, sizes)
    return convert(name, state_dict, expected, network.official_only)


def to_official(name: str, weights: Mapping[str, Tensor], **sizes: Any) -> dict[str, Tensor]:
    """Invert `from_official`: return the complete state dict of the official class, without prefix.

    Tensors that the class owns but never uses are zeros; nothing else is copied or cast. The official class exists only
    at the published sizes; at others, the shapes of the unused tensors follow the same rule. Raises UserError like
    `create`, and one that lists all missing, unknown and misshapen weights.
    """
    _check_name_and_sizes(name, sizes)
    network, expected = _network_and_shapes(name, sizes)
    return revert(name, weights, expected, network.official_only_shapes())


def _network_and_shapes(name: str, sizes: Mapping[str, Any]) -> tuple[PromptIR, dict[str, tuple[int, ...]]]:
    """Return the network on the meta device, and the names and shapes of its tensors."""
    with torch.device("meta"):
        network = _NETWORKS[name](**sizes)
    return network, {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def _check_name_and_sizes(name: str, sizes: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown network name or keyword."""
    if name not in _NETWORKS:
        raise UserError(
            f"found the network name {name!r}, where a network is built. Use one of: {', '.join(_NETWORKS)}."
        )
    known = tuple(inspect.signature(_NETWORKS[name]).parameters)
    unknown = [key for key in sizes if key not in known]
    if unknown:
        raise UserError(
            f"found unknown sizes {', '.join(map(repr, unknown))}, where the network {name!r} is built. "
            f"It knows: {', '.join(known)}."
        )
