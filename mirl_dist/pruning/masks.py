"""Named boolean masks: count, draw, apply, rewind, pack to bits, digest. True: the weight survives, even if it is zero.

Rewinding follows MIR-L, Algorithm 1: theta <- m * theta_0. The released code resets tensors named 'weight' in every
round, those named 'bias' only before round 1 (training then overwrites the stored copy), and prompts and temperatures
never; with several processes it may reset to the initialisation of another process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mirl_dist.config.seeding import rng

Masks: TypeAlias = dict[str, Tensor]
"""Name of a prunable tensor -> bool tensor of its shape; tensors without a mask are never pruned."""


def dense_masks(weights: Mapping[str, Tensor], prunable: Iterable[str]) -> Masks:
    """Return the dense masks of round 0, with which every weight of every prunable tensor survives."""
    return {name: torch.ones_like(weights[name], dtype=torch.bool) for name in sorted(prunable)}


def count_surviving(masks: Mapping[str, Tensor]) -> int:
    """Return the number of surviving weights over all prunable tensors."""
    return sum(int(mask.sum()) for mask in masks.values())


def size(masks: Mapping[str, Tensor]) -> int:
    """Return the number of prunable weights, surviving or pruned."""
    return sum(mask.numel() for mask in masks.values())


def densities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the surviving share of each prunable tensor, in [0, 1]."""
    return {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}


def random_masks(masks: Mapping[str, Tensor], seed: int, per: str) -> Masks:
    """Return masks of the same shapes with random surviving weights, which depend only on `masks` and the seed.

    As controls, they show whether a ticket's exact mask matters, or only its density.
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


@torch.no_grad()
def apply_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set pruned weights to +0.0, in place."""
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask, 0.0)


def gradient_factors(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of tensors with a pruned weight as float32 factors, for `mask_gradients`.

    One kernel multiplies many float32 gradients by float32 factors; with bool masks it would take one for each.
    """
    return {name: mask.float() for name, mask in with_pruned_weights(masks).items()}


def with_pruned_weights(masks: Mapping[str, Tensor]) -> Masks:
    """Return the masks of the tensors with at least one pruned weight."""
    dense = torch.stack([mask.all() for mask in masks.values()]).tolist() if masks else []
    return {name: mask for (name, mask), is_dense in zip(masks.items(), dense, strict=True) if not is_dense}


@torch.no_grad()
def mask_gradients(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the gradients of pruned weights to zero, in place. masks: bool, or their `gradient_factors`.

    With zero weights, zero gradients and a fresh optimiser, weights and moments stay exactly zero under any optimiser
    whose update is zero for a zero weight with zero moments; decoupled weight decay is such an update.
    """
    pairs = [(parameters[name].grad, mask) for name, mask in masks.items()]
    present = [(gradient, mask) for gradient, mask in pairs if gradient is not None]
    if present:
        torch._foreach_mul_([gradient for gradient, _ in present], [mask for _, mask in present])


def find_nonzero_pruned(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> str | None:
    """Return the first tensor, by name, with a pruned weight that is not zero, or None."""
    for name in sorted(masks):
        if bool(weights[name].detach().masked_fill(masks[name], 0.0).any()):
            return name
    return None


def rewound_names(names: Iterable[str], what: str, round_: int) -> frozenset[str]:
    """Return the tensors that are rewound at the start of round `round_` (1, 2, ...). what: 'all' or 'published'."""
    if what == "all":
        return frozenset(names)
    endings = ("weight", "bias") if round_ == 1 else ("weight",)
    return frozenset(n for n in names if any(word in n for word in endings))


@torch.no_grad()
def rewind(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    names: frozenset[str],
) -> None:
    """Set weights <- mask * initial for `names`, in place; set pruned weights of all other tensors to zero."""
    for name in names:
        weights[name].copy_(initial[name])
    apply_masks(weights, masks)


def find_unrewound(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    names: frozenset[str],
) -> str | None:
    """Return the first tensor of `names`, by name, that does not equal mask * initial exactly, or None."""
    for name in sorted(names):
        expected = initial[name].to(weights[name].device)
        if name in masks:
            expected = expected.masked_fill(~masks[name], 0.0)
        if not torch.equal(weights[name].detach(), expected):
            return name
    return None


def pack(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pack each mask to uint8, eight weights per byte in flat order, the first weight in the highest bit."""
    return {n: torch.from_numpy(np.packbits(m.cpu().numpy().reshape(-1))) for n, m in masks.items()}


def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Masks:
    """Invert `pack`. Raises ValueError if names or lengths do not match the shapes."""
    if packed.keys() != shapes.keys():
        mismatched = sorted(packed.keys() ^ shapes.keys())
        raise ValueError(f"masks and prunable tensors differ: {', '.join(mismatched[:5])}")
    masks: Masks = {}
    for name in sorted(packed):
        count = int(np.prod(shapes[name], dtype=np.int64))
        if packed[name].numel() != (count + 7) // 8:
            raise ValueError(f"the mask of '{name}' has {packed[name].numel()} bytes for {count} weights")
        bits = np.unpackbits(packed[name].cpu().numpy(), count=count).astype(bool)
        masks[name] = torch.from_numpy(bits).reshape(shapes[name])
    return masks


def digest(masks: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 over names, shapes and bits, in the order of names."""
    return digest_of_masks((name, masks[name]) for name in sorted(masks))


def digest_of_masks(named: Iterable[tuple[str, Tensor]]) -> str:
    """Compute `digest` from an iterable of masks, which must be in the order of names."""
    return _sha256((name, pack({name: mask})[name], tuple(mask.shape)) for name, mask in named)


def digest_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None) -> str:
    """Return the hex SHA-256 over names, dtypes, shapes and bytes of named tensors, in the order of names.

    shapes: hashed in place of a tensor's own shape, for those named.
    """
    return _sha256((n, tensors[n], (shapes or {}).get(n, tuple(tensors[n].shape))) for n in sorted(tensors))


def digest_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Compute `digest_tensors` from an iterable, which must be in the order of names."""
    return _sha256((name, tensor, tuple(tensor.shape)) for name, tensor in named)


def _sha256(named: Iterable[tuple[str, Tensor, tuple[int, ...]]]) -> str:
    total = hashlib.sha256()
    for name, tensor, shape in named:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(f"{name}|{flat.dtype}|{shape}|".encode())
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()
