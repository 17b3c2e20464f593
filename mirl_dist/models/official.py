"""The tensors of official checkpoints and ours, both ways: names and shapes checked, unused tensors dropped or zero."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirl_dist.errors import UserError

_NAMES_LISTED = 8  # names listed per kind of complaint; the count is always given in full


class Converted(NamedTuple):
    """What `convert` returns.

    weights: our names to tensors, detached, as they were.  dropped: 'name (shape)' of each left out.
    """

    weights: dict[str, Tensor]
    dropped: tuple[str, ...]


def convert(
    network: str, checkpoint: Mapping[str, object], expected: Mapping[str, Sequence[int]], unused: Iterable[str]
) -> Converted:
    """The tensors of an official checkpoint under our names, with nothing missing, unknown or misshapen.

    checkpoint: names to tensors, all or none of them prefixed `net.`, or a Lightning checkpoint, which holds
    such a mapping under `state_dict`.  expected: our names and shapes, in our order.  unused: names, without
    prefix, that the official class owns and never uses; each one present is left out and reported, whatever
    its shape.
    Raises UserError that lists all complaints at once.
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
    """The inverse of `convert`: all tensors of the official class, those that it never uses as zeros.

    weights: our names to tensors; expected: our names and shapes; unused: names and shapes to add. Nothing is copied
    or cast. Raises UserError that lists all complaints at once.
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
    """A checkpoint file that `torch.load(..., weights_only=True)` reads; the same weights give the same bytes.

    lightning: names prefixed `net.` under 'state_dict', beside what Lightning's `load_from_checkpoint` asks for; else a
    bare state dict. compact: the file's records are deflated, so that zeros cost little; such a file cannot be read
    with `mmap=True`.
    """
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}  # of no larger storage
    tree: dict[str, object] = dict(tensors)
    if lightning:
        tree = {"state_dict": {f"net.{name}": tensor for name, tensor in tensors.items()}} | _LIGHTNING
    stored = io.BytesIO()
    torch.save(tree, stored)
    return _deflate(stored) if compact else stored.getvalue()


# Lightning upgrades checkpoints of versions before 2.0; later ones it takes as they are.
_LIGHTNING = {"pytorch-lightning_version": "2.0.1", "epoch": 0, "global_step": 0}


def _deflate(stored: io.BytesIO) -> bytes:
    """The same zip archive with its records compressed."""
    compressed = io.BytesIO()
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(compressed, "w") as target:
        for entry in source.infolist():
            record = zipfile.ZipInfo(entry.filename)
            target.writestr(record, source.read(entry), zipfile.ZIP_DEFLATED, compresslevel=6)
    return compressed.getvalue()


def _mismatches(named: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """What keeps tensors from being those of a network."""
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
    """The flat mapping of names to tensors inside `checkpoint`."""
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
    """The same tensors without Lightning's `net.` in front, which all names carry or none."""
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
    """'3 missing (a, b, c)', cut after the first few names."""
    more = f", and {len(names) - _NAMES_LISTED} more" if len(names) > _NAMES_LISTED else ""
    return f"{len(names)} {kind} ({', '.join(names[:_NAMES_LISTED])}{more})"
