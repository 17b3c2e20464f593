"""Converts weights from and to official checkpoints; checks names and shapes, and drops or zeros unused tensors."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.models.promptir import PromptIR

_NAMES_LISTED = 8  # names listed per kind of problem; the message always states the full count


class Converted(NamedTuple):
    """A converted checkpoint.

    weights: our names to tensors, detached, otherwise unchanged. dropped: 'name (shape)' of each dropped tensor.
    """

    weights: dict[str, Tensor]
    dropped: tuple[str, ...]


def convert(name: str, network: PromptIR, checkpoint: Mapping[str, object]) -> Converted:
    """Convert an official checkpoint to the names of a network; see `models.from_official`."""
    tensors = _without_prefix(name, _tensors_of(name, checkpoint))
    unused = sorted(network.official_only_shapes().keys() & tensors.keys())
    dropped = tuple(f"{key} {tuple(tensors.pop(key).shape)}" for key in unused)
    mismatches = _mismatches(tensors, network)
    if mismatches:
        raise UserError(
            f"found {'; '.join(mismatches)}, where an official checkpoint of {name!r} was read. "
            "Use a checkpoint of this very network, and give the sizes that it was trained with."
        )
    return Converted({key: tensors[key] for key in network.state_dict()}, dropped)


def revert(name: str, network: PromptIR, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert `convert`: return all tensors of the official class, with zeros for those that it never uses."""
    mismatches = _mismatches(weights, network)
    if mismatches:
        raise UserError(
            f"found {'; '.join(mismatches)}, where weights of {name!r} were exported. Give the weights of this very "
            "network, and its sizes."
        )
    ours = {key: weights[key].detach() for key in network.state_dict()}
    return ours | {key: torch.zeros(shape) for key, shape in network.official_only_shapes().items()}


def write(weights: Mapping[str, Tensor], *, compact: bool) -> bytes:
    """Serialise a checkpoint for `torch.load(..., weights_only=True)`; the same weights give the same bytes.

    Names have the prefix `net.` under 'state_dict', beside what Lightning's `load_from_checkpoint` requires. compact:
    compress the records with deflate, so that zeros take little space; such a file cannot be loaded with `mmap=True`.
    """
    # clone(): torch.save would write the whole storage of a view.
    tensors = {f"net.{name}": tensor.detach().cpu().clone() for name, tensor in weights.items()}
    stored = io.BytesIO()
    # Lightning migrates checkpoints of versions before 2.0 and loads later ones unchanged.
    torch.save({"state_dict": tensors, "pytorch-lightning_version": "2.0.1", "epoch": 0, "global_step": 0}, stored)
    return _deflate(stored) if compact else stored.getvalue()


def _deflate(stored: io.BytesIO) -> bytes:
    """Return the same zip archive with compressed records."""
    compressed = io.BytesIO()
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(compressed, "w") as target:
        for entry in source.infolist():
            record = zipfile.ZipInfo(entry.filename)
            target.writestr(record, source.read(entry), zipfile.ZIP_DEFLATED, compresslevel=6)
    return compressed.getvalue()


def _mismatches(tensors: Mapping[str, Tensor], network: PromptIR) -> list[str]:
    """Describe all mismatches between tensors and the names and shapes of a network."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kinds = {
        "missing": [repr(name) for name in expected if name not in shapes],
        "unknown": [f"{name!r} {shape}" for name, shape in shapes.items() if name not in expected],
        "misshapen": [
            f"{name!r} is {shapes[name]}, the network has {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
        "not floating-point": [f"{n!r} is {t.dtype}" for n, t in tensors.items() if not t.dtype.is_floating_point],
    }
    return [_list_names(kind, names) for kind, names in kinds.items() if names]


def _tensors_of(network: str, checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the flat mapping of names to tensors in `checkpoint`. Raises UserError if it has other entries."""
    inner = checkpoint.get("state_dict", checkpoint)
    if not isinstance(inner, Mapping):
        raise UserError(
            f"found {type(inner).__name__} under 'state_dict', where an official checkpoint of {network!r} "
            "was read. Give names with their tensors, or a Lightning checkpoint that holds them there."
        )
    others = [f"{str(n)!r} is {type(value).__name__}" for n, value in inner.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"found {_list_names('entries that are no tensors', others)}, where an official checkpoint of "
            f"{network!r} was read. Give names with their tensors, or a Lightning checkpoint that holds them "
            "under 'state_dict'."
        )
    return {str(name): value.detach() for name, value in inner.items()}


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
