"""Prepares a config for publication: resets paths and other settings of the machine that it ran on."""

from __future__ import annotations

from typing import TypeVar

from mirl_dist.config.config import Config
from mirl_dist.config.schema import Local
from mirl_dist.config.yaml_loader import Node

_Node = TypeVar("_Node", bound=Node)

_LOCAL_BUT_KEPT = ("prune.rounds", "prune.target_sparsity")
"""Keys marked Local that are kept, because they tell how far the experiment pruned."""


def portable(config: Config) -> Config:
    """Return the same experiment with all other Local keys (folders, addresses, devices, workers) at their defaults.

    Fingerprint and method are unchanged. Keys that affect results are kept, including the paths model.weights and
    start.ticket.
    """
    return _reset_local_keys(config, Config(), "")


def _reset_local_keys(node: _Node, usual: Node, path: str) -> _Node:
    changed = {}
    for name, field in type(node).model_fields.items():
        value, default = getattr(node, name), getattr(usual, name)
        key = f"{path}{field.alias or name}"
        if isinstance(value, Node):
            changed[name] = _reset_local_keys(value, default, f"{key}.")
        elif Local in field.metadata and key not in _LOCAL_BUT_KEPT:
            changed[name] = default
    return node.model_copy(update=changed)
