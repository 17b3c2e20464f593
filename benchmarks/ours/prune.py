"""Prunes and rewinds as the package does between two rounds, without the digests and proofs around it."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.network_shapes import drawn_weights
from mirl_dist.pruning.masks import dense_masks, rewind
from mirl_dist.pruning.prune import PruneConfig, in_scope, prune


def prepare(weights: int, fraction: float = 0.2) -> Callable[[], None]:
    """Return one cut of `fraction` of so many weights, with the rewind of the rest.

    The first round's weights are read and never written, so that every call does the same work.
    """
    trained, initial, network = drawn_weights(weights, 1), drawn_weights(weights, 2), drawn_weights(weights, 3)
    masks, everything = dense_masks(trained, in_scope(trained, "published")), frozenset(trained)

    def cut() -> None:
        rewind(network, initial, prune(trained, masks, PruneConfig(fraction)).masks, everything)

    return cut
