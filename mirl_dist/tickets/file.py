"""A ticket as one file: the record, the config, the packed mask, and the survivors' initial and trained values.

docs/ticket_format.md specifies the format byte by byte. The file is a safetensors file of four flat tensors, so that a
network of many small tensors needs no header entry for each. This module checks the file's form; verify.py checks its
claims.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks
from mirl_dist.tickets import container
from mirl_dist.tickets.container import GET_AGAIN
from mirl_dist.training import ticket as tickets
from mirl_dist.training.ticket import Ticket

MEMORY_FACTOR, MEMORY_EXTRA = 80, 128 << 20
"""`read` allocates at most MEMORY_FACTOR * file size + MEMORY_EXTRA bytes. A byte of packed mask stands for 8 weights,
which unpack to 8 bytes of mask and 2 * 32 bytes of values: 72 in total, plus a margin. MEMORY_EXTRA covers the text,
whose size has its own bound."""

_MAX_NAME = 200
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class TicketContent(NamedTuple):
    """The content of a ticket file. Values are float32 tensors by name, +0.0 where pruned; masks are bool.

    config: as in run.json. initial: mask * the run's initial values.
    """

    ticket: Ticket
    config: dict[str, Any]
    masks: Masks
    initial: dict[str, Tensor]
    trained: dict[str, Tensor]


class _TensorEntry(NamedTuple):
    """A tensor in the file's index. size: number of weights; mask_bytes: 0 if it has no mask."""

    name: str
    shape: tuple[int, ...]
    prunable: bool
    size: int

    @property
    def mask_bytes(self) -> int:
        return (self.size + 7) // 8 if self.prunable else 0


class _OpenedFile(NamedTuple):
    """A file whose structure and checksums are verified, before any values are unpacked."""

    ticket: Ticket
    config: dict[str, Any]
    initial_digest: str
    entries: list[_TensorEntry]
    parts: dict[str, memoryview]


# -- writing ----------------------------------------------------------------------------------------------------


def pack(content: TicketContent) -> bytes:
    """Return a ticket as one file. Deterministic.

    content.initial may include initial values of pruned weights; they are dropped. Raises UserError for content that a
    file cannot hold: dtypes other than float32, values that are not finite, pruned trained weights other than +0.0, and
    names or texts that `read` rejects.
    """
    source = f"the ticket of round {content.ticket.round}"
    of_cpu = ({n: t.detach().cpu().contiguous() for n, t in tensors.items()} for tensors in content[2:])
    content = TicketContent(content.ticket, content.config, *of_cpu)
    masks, initial, trained = content[2:]
    _check_consistent(masks, initial, trained, source)
    names = sorted(trained)
    packed = masking.pack(masks)
    parts = {
        "initial": _pack_survivors(names, masks, initial, source),
        "trained": _pack_survivors(names, masks, trained, source),
        "mask": b"".join(packed[n].numpy().tobytes() for n in names if n in masks),
    }
    parts["about"] = _pack_about(content, source)
    data = container.pack(parts)
    _open_file(data, source)  # raises UserError for a file that `read` would reject
    return data


def _pack_about(content: TicketContent, source: str) -> bytes:
    """Return the file's text: the tensor index, the record, the config, and the digest of mask * initial values."""
    masks, record = content.masks, json.loads(content.ticket.dump())
    if record["layer_density"] == masking.densities(masks):
        del record["layer_density"]  # derivable from the masks; a third of the text
    initial_survivors = {n: t.masked_fill(~masks[n], 0.0) if n in masks else t for n, t in content.initial.items()}
    about = {
        "tensors": [[n, list(t.shape), n in masks] for n, t in sorted(content.initial.items())],
        "ticket": record,
        "config": content.config,
        "begins": masking.digest_tensors(initial_survivors),
    }
    try:
        text = json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError(
            f"found a number that is not finite in the record of {source}. A ticket file holds none."
        ) from None
    return zlib.compress(text.encode(), 9)  # the bytes depend on the zlib build; every build can read them


def _check_consistent(
    masks: Mapping[str, Tensor], initial: Mapping[str, Tensor], trained: Mapping[str, Tensor], source: str
) -> None:
    mismatched = sorted((initial.keys() ^ trained.keys()) | (masks.keys() - trained.keys()))
    for name in [] if mismatched else sorted(trained):
        shapes = [initial[name].shape, trained[name].shape] + ([masks[name].shape] if name in masks else [])
        if len(set(shapes)) > 1 or {initial[name].dtype, trained[name].dtype} != {torch.float32}:
            mismatched.append(name)
    if mismatched:
        raise UserError(
            f"found masks, first and trained values of {source} that do not fit each other in names, shapes or "
            f"float32: {', '.join(mismatched[:5])}. Pack the parts of one round of one run."
        )
    for name, mask in masks.items():
        dead = trained[name].view(torch.int32).masked_fill(mask, 0)  # compares bits: -0.0 would change the digest
        if bool(dead.any()):
            raise UserError(f"found dead weights of '{name}' that are not +0.0 in {source}. Its run broke its mask.")


def _pack_survivors(names: list[str], masks: Mapping[str, Tensor], of: Mapping[str, Tensor], source: str) -> bytes:
    """Concatenate the surviving values of all tensors as little-endian float32, ordered by name and flat index."""
    parts = []
    for name in names:
        alive = of[name][masks[name]] if name in masks else of[name].reshape(-1)
        if not bool(torch.isfinite(alive).all()):
            raise UserError(f"found values of '{name}' in {source} that are not finite. A ticket file holds none.")
        parts.append(alive.numpy().astype("<f4").tobytes())
    return b"".join(parts)


# -- reading ----------------------------------------------------------------------------------------------------


def read(data: bytes, source: str) -> TicketContent:
    """Return the content of a ticket file, with every byte checked. source: the file's name for messages.

    Raises only UserError, for anything but a complete ticket file. Allocates at most
    MEMORY_FACTOR * len(data) + MEMORY_EXTRA bytes.
    """
    opened = _open_file(data, source)
    masks: Masks = {}
    values = {kind: np.frombuffer(opened.parts[kind], "<f4") for kind in ("initial", "trained")}
    for kind, flat in values.items():
        if not np.isfinite(flat).all():
            raise UserError(f"{source}: found {kind} values that are not finite. {GET_AGAIN}")
    dense: dict[str, dict[str, Tensor]] = {kind: {} for kind in values}
    at = 0
    for entry, packed in _iterate_masks(opened.entries, opened.parts["mask"]):
        if packed is None:
            keep, alive = None, entry.size
        else:
            keep = np.unpackbits(packed, count=entry.size).view(bool)
            masks[entry.name], alive = torch.from_numpy(keep).reshape(entry.shape), int(np.count_nonzero(keep))
        for kind, flat in values.items():
            whole = np.zeros(entry.size, dtype=np.float32)
            whole[... if keep is None else keep] = flat[at : at + alive]
            dense[kind][entry.name] = torch.from_numpy(whole).reshape(entry.shape)
        at += alive
    if masking.digest_tensors(dense["initial"]) != opened.initial_digest:
        raise UserError(f"{source}: its first values do not have the digest that it states. {GET_AGAIN}")
    return TicketContent(opened.ticket, opened.config, masks, dense["initial"], dense["trained"])


def _open_file(data: bytes, source: str) -> _OpenedFile:
    """Run all checks that need no unpacked weights. Raise UserError if one fails."""
    parts = container.unpack(data, source)
    about = container.decompress(parts["about"], source)
    if not isinstance(about, dict) or about.keys() != {"tensors", "ticket", "config", "begins"}:
        raise UserError(f"{source}: its text is not that of a ticket file. {GET_AGAIN}")
    if not isinstance(about["config"], dict) or not isinstance(about["begins"], str):
        raise UserError(f"{source}: its config or the digest of its first values is none. {GET_AGAIN}")
    entries = _parse_index(about["tensors"], source)
    wanted = sum(entry.mask_bytes for entry in entries)
    if wanted != len(parts["mask"]):
        raise UserError(f"{source}: its mask has {len(parts['mask']):,} bytes, its index wants {wanted:,}. {GET_AGAIN}")
    survivors, densities = 0, {}
    for entry, packed in _iterate_masks(entries, parts["mask"]):
        alive = entry.size if packed is None else int(np.bitwise_count(packed).sum(dtype=np.int64))
        survivors += alive
        if packed is not None:
            densities[entry.name] = alive / entry.size
            if entry.size % 8 and packed[-1] & (0xFF >> entry.size % 8):
                raise UserError(f"{source}: the mask of '{entry.name}' has bits behind its last weight. {GET_AGAIN}")
    if survivors * 4 != len(parts["trained"]) or survivors * 4 != len(parts["initial"]):
        raise UserError(
            f"{source}: its masks leave {survivors:,} survivors, but it holds {len(parts['initial']) // 4:,} first and "
            f"{len(parts['trained']) // 4:,} trained values. {GET_AGAIN}"
        )
    return _OpenedFile(
        _parse_ticket(about["ticket"], densities, source), about["config"], about["begins"], entries, parts
    )


def _iterate_masks(
    entries: list[_TensorEntry], mask: memoryview
) -> Iterator[tuple[_TensorEntry, NDArray[np.uint8] | None]]:
    """Yield each tensor with its packed mask (uint8), or None if it has no mask."""
    at, bits = 0, np.frombuffer(mask, np.uint8)
    for entry in entries:
        yield entry, bits[at : at + entry.mask_bytes] if entry.prunable else None
        at += entry.mask_bytes


def _parse_index(index: Any, source: str) -> list[_TensorEntry]:
    """Parse the tensor index. Raise UserError for names, shapes or sizes that no network has."""
    entries: list[_TensorEntry] = []
    for item in index if isinstance(index, list) else []:
        if not (isinstance(item, list) and [type(v) for v in item] == [str, list, bool]):
            raise UserError(f"{source}: its index of tensors is damaged. {GET_AGAIN}")
        name, shape, prunable = item
        if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            raise UserError(
                f"{source}: found the tensor name {name[:80]!a}: letters, digits and '_' with dots. {GET_AGAIN}"
            )
        if len(shape) > 8 or any(type(side) is not int or side < 1 for side in shape):
            raise UserError(f"{source}: found a shape of '{name}' that is no shape. {GET_AGAIN}")
        size = math.prod(shape)
        if size > tickets.MOST_WEIGHTS:
            raise UserError(f"{source}: found {size:,} weights in '{name}'. {GET_AGAIN}")
        entries.append(_TensorEntry(name, tuple(shape), prunable, size))
    names = [entry.name for entry in entries]
    if not any(entry.prunable for entry in entries) or names != sorted(set(names)):
        raise UserError(f"{source}: its tensors are not named once each, in order, some of them prunable. {GET_AGAIN}")
    return entries


def _parse_ticket(record: Any, densities: dict[str, float], source: str) -> Ticket:
    """Parse the ticket's record. Raise UserError for a record that this program could not have written."""
    if not isinstance(record, dict):
        raise UserError(f"{source}: its record is none. {GET_AGAIN}")
    record = {"layer_density": densities} | record
    for scores in [record.get("scores"), *_dict_values(record.get("also"))]:
        if any(not isinstance(s, dict) or s.keys() != Score.model_fields.keys() for s in _dict_values(scores)):
            raise UserError(f"{source}: its scores are none. {GET_AGAIN}")
    ticket = tickets.parse(json.dumps(record).encode(), source)
    whole = json.loads(ticket.dump())
    if any(record[key] != whole[key] for key in record):
        raise UserError(f"{source}: its record has values of other kinds than a ticket's. {GET_AGAIN}")
    return ticket


def _dict_values(tree: Any) -> list[Any]:
    return list(tree.values()) if isinstance(tree, dict) else []
