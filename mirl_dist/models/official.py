"""Converts weights from and to official checkpoints; checks names and shapes, and drops or zeros unused tensors."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirl_dist.errors import UserError

_NAMES_LISTED = 8  # names listed per kind of problem; the message always states the full count


class Converted(NamedTuple):
    """A converted checkpoint.

    weights: our names to tensors, detached, otherwise unchanged. dropped: 'name (shape)' of each dropped tensor.
    """

    weights: dict[str, Tensor]
    dropped: tuple[str, ...]


def convert(
    network: str, checkpoint: Mapping[str, object], expected: Mapping[str, Sequence[int]], unused: Iterable[str]
) -> Converted:
    """Convert an official checkpoint to our names, and check that no tensor is missing, unknown or misshapen.

    checkpoint: names to tensors, with the prefix `net.` on all or none, or a Lightning checkpoint with such a mapping
    under `state_dict`. expected: our names and shapes, in our order. unused: names, without prefix, of tensors that the
    official class owns but never uses; those present are dropped and reported, whatever their shape.
    Raises a UserError that lists all problems.
    """
    named = _without_prefix(network, _tensors_of(network, checkpoint))
    dropped = tuple(f"{name} {tuple(named.pop(name).shape)}" for name in sorted(unused) if name in named)
    mismatches = _mismatches(named, expected)
    if mismatches:
        raise UserError(
            f"found {'; '.join(mismatches)}, where an official checkpoint of {network!r} was read. "
            "Use a checkpoint of this very network, and give the sizes that it was trained with."
        )
    return Converted({name: named[name] for name in expected}, dropped)


def revert(
    network: str,
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Sequence[int]],
    unused: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Invert `convert`: return all tensors of the official class, with zeros for those that it never uses.

    weights: our names to tensors; expected: our names and shapes; unused: names and shapes to add. Nothing is copied
    or cast. Raises a UserError that lists all problems.
    """
    mismatches = _mismatches(weights, expected)
    if mismatches:
        raise UserError(
            f"found {'; '.join(mismatches)}, where weights of {network!r} were exported. Give the weights of this very "
            "network, and its sizes."
        )
    ours = {name: weights[name].detach() for name in expected}
    return ours | {name: torch.zeros(tuple(shape)) for name, shape in unused.items()}


def write(weights: Mapping[str, Tensor], *, compact: bool, lightning: bool = True) -> bytes:
    """Serialise a checkpoint for `torch.load(..., weights_only=True)`; the same weights give the same bytes.

    lightning: put names with the prefix `net.` under 'state_dict', and add what Lightning's `load_from_checkpoint`
    requires; else write a bare state dict. compact: compress the records with deflate, so that zeros take little space;
    such a file cannot be loaded with `mmap=True`.
    """
    # clone(): torch.save would write the whole storage of a view.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    tree: dict[str, object] = dict(tensors)
    if lightning:
        tree = {"state_dict": {f"net.{name}": tensor for name, tensor in tensors.items()}} | _LIGHTNING
    stored = io.BytesIO()
    torch.save(tree, stored)
    return _deflate(stored) if compact else stored.getvalue()


# Lightning migrates checkpoints of versions before 2.0 and loads later ones unchanged.
_LIGHTNING = {"pytorch-lightning_version": "2.0.1", "epoch": 0, "global_step": 0}


def _deflate(stored: io.BytesIO) -> bytes:
    """Return the same zip archive with compressed records."""
    compressed = io.BytesIO()
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(compressed, "w") as target:
        for entry in source.infolist():
            record = zipfile.ZipInfo(entry.filename)
            target.writestr(record, source.read(entry), zipfile.ZIP_DEFLATED, compresslevel=6)
    return compressed.getvalue()


def _mismatches(named: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """Describe all mismatches between tensors and the names and shapes of a network."""
    missing = [repr(name) for name in expected if name not in named]
    unknown = [f"{name!r} {tuple(tensor.shape)}" for name, tensor in named.items() if name not in expected]
    misshapen = [
        f"{name!r} is {tuple(named[name].shape)}, the network has {tuple(shape)}"
        for name, shape in expected.items()
        if name in named and tuple(named[name].shape) != tuple(shape)
    ]
    not_floating = [
        f"{name!r} is {tensor.dtype}" for name, tensor in named.items() if not tensor.dtype.is_floating_point
    ]
    return [
        _list_names(kind, names)
        for kind, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("misshapen", misshapen),
            ("not floating-point", not_floating),
        )
        if names
    ]


def _tensors_of(network: str, checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the flat mapping of names to tensors in `checkpoint`. Raises UserError if it has other entries."""
    inner = checkpoint.get("state_dict", checkpoint)
    if not isinstance(inner, Mapping):
        raise UserError(
            f"found {type(inner).__name__} under 'state_dict', where an official checkpoint of {network!r} "
            "was read. Give names with their tensors, or a Lightning checkpoint that holds them there."
        )
    tensors = {str(name): value.detach() for name, value in inner.items() if isinstance(value, torch.Tensor)}
    others = [
        f"{str(name)!r} is {type(value).__name__}"
        for name, value in inner.items()
        if not isinstance(value, torch.Tensor)
    ]
    if others:
        raise UserError(
            f"found {_list_names('entries that are no tensors', others)}, where an official checkpoint of "
            f"{network!r} was read. Give names with their tensors, or a Lightning checkpoint that holds them "
            "under 'state_dict'."
        )
    return tensors


def _without_prefix(network: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without Lightning's prefix `net.`. Raises UserError if only some names have it."""
    prefixed = [name for name in tensors if name.startswith("net.")]
    if not prefixed:
        return tensors
    bare = [repr(name) for name in tensors if not name.startswith("net.")]
    if bare:
        raise UserError(
            f"found {len(prefixed)} names with the prefix 'net.' and {_list_names('without it', bare)}, where an "
            f"official checkpoint of {network!r} was read. Keep the tensors of one network only."
        )
    return {name.removeprefix("net."): tensor for name, tensor in tensors.items()}


def _list_names(kind: str, names: Sequence[str]) -> str:
    """Return e.g. '3 missing (a, b, c)', with at most _NAMES_LISTED names."""
    more = f", and {len(names) - _NAMES_LISTED} more" if len(names) > _NAMES_LISTED else ""
    return f"{len(names)} {kind} ({', '.join(names[:_NAMES_LISTED])}{more})"
