"""Overlap of tickets' masks: intersection over union (IoU), and its expectation for random masks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from mirl_dist.tickets.compare.entry import Entry

Square = NDArray[np.float64]
_BYTES_AT_A_TIME = 1 << 15  # of each mask; bounds the temporary arrays


def iou(entries: Sequence[Entry]) -> Square:
    """Return the pairwise IoU |A and B| / |A or B| of the surviving prunable weights, float64 (n, n), in [0, 1].

    NaN if a mask is unknown, if the prunable tensors differ, or if both masks are empty.
    """
    result = np.full((len(entries), len(entries)), np.nan)
    for positions in _positions_of_equal([_mask_layout(s) for s in entries]):
        both = _intersections([entries[i] for i in positions])
        alive = np.diag(both)
        result[np.ix_(positions, positions)] = _ratio(both, alive[:, None] + alive[None, :] - both)
    return result


def expected_iou(entries: Sequence[Entry]) -> Square:
    """Return the pairwise IoU of independent random masks with the tickets' densities per tensor, float64 (n, n).

    Approximated by the ratio of expectations, E|A and B| / E|A or B|. The diagonal is for two independent masks of one
    ticket's densities. Needs no masks. NaN if the prunable tensors differ or a density is unknown.
    """
    result = np.full((len(entries), len(entries)), np.nan)
    known = [tuple(s.parts.items()) if _has_densities(s) else None for s in entries]
    for positions in _positions_of_equal(known):
        parts = entries[positions[0]].parts
        sizes = np.array(list(parts.values()), dtype=np.float64)
        density = np.array([[entries[i].ticket.layer_density[name] for name in parts] for i in positions])
        both = (density * sizes) @ density.T
        alive = density @ sizes
        result[np.ix_(positions, positions)] = _ratio(both, alive[:, None] + alive[None, :] - both)
    return result


def _has_densities(s: Entry) -> bool:
    """Whether every prunable tensor has a density in [0, 1]."""
    return all(0 <= s.ticket.layer_density.get(name, -1) <= 1 for name in s.parts)


def _ratio(above: Square, below: Square) -> Square:
    result: Square = np.full(above.shape, np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result


def _mask_layout(s: Entry) -> Hashable:
    """Return a key that is equal for tickets with comparable masks; None without a valid mask."""
    if s.mask is None or s.mask.keys() != s.parts.keys():
        return None
    if any(s.mask[name].size != (count + 7) // 8 for name, count in s.parts.items()):
        return None
    return tuple(sorted(s.parts.items()))


def _positions_of_equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the positions of each distinct key; None keys are left out."""
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(position)
    return list(groups.values())


def _intersections(entries: Sequence[Entry]) -> Square:
    """Return pairwise counts of weights that survive in both masks, float64 (n, n). All masks must have one layout."""
    counts = np.zeros((len(entries), len(entries)))
    masks = [s.mask for s in entries if s.mask is not None]
    for name, first in masks[0].items():
        for start in range(0, first.size, _BYTES_AT_A_TIME):
            pieces = np.stack([mask[name].reshape(-1)[start : start + _BYTES_AT_A_TIME] for mask in masks])
            bits = np.unpackbits(pieces, axis=1).astype(np.float32)  # so few that their products sum up exactly
            counts += bits @ bits.T
    return counts
