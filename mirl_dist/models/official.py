"""Converts weights from and to official checkpoints; checks names and shapes, and drops or zeros unused tensors."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.models.promptir import PromptIR

# Where programs keep the weights in a checkpoint; of several the first is taken (an average of weights is tested with).
_PARTS = ("params_ema", "params", "state_dict", "model_state_dict")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "net.", "model.")
_NAMES_LISTED = 8  # names listed per kind of problem; the message always states the full count


class Converted(NamedTuple):
    """A converted checkpoint.

    weights: our names to tensors, float32. dropped: 'name (shape)' of each dropped tensor. notes: what was taken from
    the checkpoint and converted, a line each.
    """

    weights: dict[str, Tensor]
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()


def convert(name: str, network: PromptIR, checkpoint: Mapping[str, object]) -> Converted:
    """Convert an official checkpoint to the names of a network; see `models.from_official`."""
    tensors, part = _tensors_of(name, checkpoint)
    tensors, prefixes = _without_prefix(name, tensors)
    unused = sorted(network.official_only_shapes().keys() & tensors.keys())
    dropped = tuple(f"{key} {tuple(tensors.pop(key).shape)}" for key in unused)
    mismatches = _mismatches(tensors, network)
    if mismatches:
        raise UserError(
            f"found {'; '.join(mismatches)}, where an official checkpoint of {name!r} was read. "
            "Use a checkpoint of this very network, and give the sizes that it was trained with."
        )
    tensors, kinds = _as_float32(name, tensors)
    return Converted({key: tensors[key] for key in network.state_dict()}, dropped, (*part, *prefixes, *kinds))


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


def _tensors_of(network: str, checkpoint: Mapping[str, object]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the flat mapping of names to tensors in a checkpoint, and which of its parts it is.

    Raises UserError if the part has other entries.
    """
    notes: list[str] = []
    while (key := next((k for k in _PARTS if isinstance(checkpoint.get(k), Mapping)), None)) is not None:
        others = [repr(k) for k in _PARTS if k != key and isinstance(checkpoint.get(k), Mapping)]
        notes.append(f"taken: the weights under {key!r}" + (f", not those under {', '.join(others)}" if others else ""))
        checkpoint = cast("Mapping[str, object]", checkpoint[key])
    others = [f"{str(n)!r} is {type(v).__name__}" for n, v in checkpoint.items() if not isinstance(v, Tensor)]
    if others:
        raise UserError(
            f"found {_list_names('entries that are no tensors', others)}, where an official checkpoint of "
            f"{network!r} was read. Give names with their tensors, or a checkpoint that holds them under one of "
            f"{', '.join(_PARTS)}."
        )
    return {str(name): value.detach() for name, value in checkpoint.items() if isinstance(value, Tensor)}, notes


def _without_prefix(network: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors without wrappers' prefixes, and which these were. Raises UserError if some names lack one.

    DDP adds `module.`, torch.compile `_orig_mod.`, Lightning modules `net.` or `model.`.
    """
    removed = ""
    while prefix := next((p for p in WRAPPER_PREFIXES if any(name.startswith(p) for name in tensors)), ""):
        bare = [repr(name) for name in tensors if not name.startswith(prefix)]
        if bare:
            raise UserError(
                f"found {len(tensors) - len(bare)} names with the prefix {prefix!r} and "
                f"{_list_names('without it', bare)}, where an official checkpoint of {network!r} was read. Keep the "
                "tensors of one network only."
            )
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        removed += prefix
    return tensors, [f"removed from all names: the prefix {removed!r}"] if removed else []


def _as_float32(network: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors in float32, and which were of another precision. Raises UserError for NaN and infinity."""
    wide = {name: t.float() if t.dtype.is_floating_point else t for name, t in tensors.items()}
    bad = [repr(name) for name, t in wide.items() if t.dtype.is_floating_point and not bool(t.isfinite().all())]
    if bad:
        names = _list_names("tensors with NaN or infinite values in float32", bad)
        raise UserError(
            f"found {names}, where an official checkpoint of {network!r} was read. Its training diverged, or the file "
            "is damaged: use another checkpoint."
        )
    kinds = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype.is_floating_point)
    notes = [f"converted to float32: {n} tensors of {kind}" for kind, n in sorted(kinds.items()) if kind != "float32"]
    return wide, notes


def _list_names(kind: str, names: Sequence[str]) -> str:
    """Return e.g. '3 missing (a, b, c)', with at most _NAMES_LISTED names."""
    more = f", and {len(names) - _NAMES_LISTED} more" if len(names) > _NAMES_LISTED else ""
    return f"{len(names)} {kind} ({', '.join(names[:_NAMES_LISTED])}{more})"
