"""Prepares a config for other people: without the places and habits of the machine that it ran on."""

from __future__ import annotations

from typing import TypeVar

from mirl_dist.config.config import Config
from mirl_dist.config.schema import Local
from mirl_dist.config.yaml_loader import Node

_Node = TypeVar("_Node", bound=Node)

_LOCAL_BUT_KEPT = ("prune.rounds", "prune.target_sparsity")
"""Marked Local, but part of the experiment: how far it pruned."""


def portable(config: Config) -> Config:
    """The same experiment, with every other key marked Local (folders, addresses, devices, workers) as this user has
    it by default. Fingerprint and method stay. What changes the numbers stays too: model.weights and start.ticket."""
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
