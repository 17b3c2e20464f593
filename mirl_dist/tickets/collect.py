"""Collects tickets for a comparison from runs in stores, from MLflow and from ticket files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirl_dist.config.config import Config, from_dump
from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import reader
from mirl_dist.pruning import masks as masking
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.tickets.open import FileTicket, build_on_meta, open_ticket
from mirl_dist.tickets.runs import is_file, open_rounds, run_of
from mirl_dist.training import ticket as tickets
from mirl_dist.training.ticket import Ticket

MLFLOW = "mlflow:"
Packed = Mapping[str, NDArray[np.uint8]]
_Shapes = Mapping[str, tuple[int, ...]]


class _CollectedRun(NamedTuple):
    """The tickets of one run. key: identifies the run, however it was named. label: name for display."""

    key: str
    label: str
    entries: list[Entry]


def gather(references: Sequence[str], uri: str | None = None) -> list[Entry]:
    """Return the tickets of all references, grouped by run, in the order of the references.

    A reference is `RUN` (all rounds), `RUN/rounds/NN`, a ticket file, `mlflow:RUN_ID` (a parent run) or
    `mlflow:experiment:NAME`. uri: MLflow's address; None for MLFLOW_TRACKING_URI. Raises UserError for a reference
    without a ticket, for a mask that does not match its ticket, and for a ticket named twice.
    """
    runs: dict[str, _CollectedRun] = {}
    for collected in chain.from_iterable(_collect(reference, uri) for reference in references):
        run = runs.setdefault(collected.key, collected._replace(entries=[]))
        twice = {s.ticket.round for s in run.entries} & {s.ticket.round for s in collected.entries}
        if twice:
            raise UserError(f"found round {min(twice)} of {run.label} twice. Name each ticket once.")
        run.entries.extend(collected.entries)
    names = _unique_labels(list(runs.values()))
    return [s._replace(run=name) for name, run in zip(names, runs.values(), strict=True) for s in run.entries]


def _collect(reference: str, uri: str | None) -> Iterable[_CollectedRun]:
    if reference.startswith(MLFLOW):
        return _collect_mlflow(reference.removeprefix(MLFLOW), uri)
    return [_collect_file(reference) if is_file(reference) else _collect_run(reference)]


def _collect_file(reference: str) -> _CollectedRun:
    opened = open_ticket(reference)
    assert isinstance(opened, FileTicket)
    shapes = _tensor_shapes(opened.config, opened.ticket(), reference)
    mask = _check_mask(masking.pack(opened.body.masks), opened.ticket(), shapes, reference)
    return _CollectedRun(
        f"file:{Path(reference).resolve()}", reference, [_make_entry(opened.config, opened.ticket(), shapes, mask=mask)]
    )


def _collect_run(reference: str) -> _CollectedRun:
    checkpoints, config, rounds, asked = open_rounds(reference)
    label, location = run_of(reference), checkpoints.store.where()
    shapes, entries = _tensor_shapes(config, rounds[0], location), []
    for ticket in [t for t in rounds if asked in (None, t.round)]:
        source = f"{label}, round {ticket.round}"
        mask = _load_mask(checkpoints.round_masks(ticket.round), ticket, shapes, source)
        entries.append(_make_entry(config, ticket, shapes, mask=mask, strip=checkpoints.pictures(ticket.round)))
    key = location if "://" in location else f"folder:{Path(location).resolve()}"
    return _CollectedRun(key, label, entries)


def _collect_mlflow(reference: str, uri: str | None) -> Iterator[_CollectedRun]:
    for run in reader.read(reference, uri):
        source = f"MLflow run {run.run_id}"
        if run.config is None:
            raise UserError(
                f"{source} holds no run.json, so its method and seed are unknown. Compare it from its run folder."
            )
        config, shapes, entries = from_dump(run.config, f"{source}, run.json"), dict[str, tuple[int, ...]](), []
        for round_, data, bits, strip in run.tickets:
            place = f"{source}, round {round_}"
            ticket = tickets.parse(data, place)
            if ticket.round != round_:
                raise UserError(f"{place}: its ticket is of round {ticket.round}. Compare it from its run folder.")
            shapes = shapes or _tensor_shapes(config, ticket, source)
            mask = None if bits is None else _load_mask(bits, ticket, shapes, place)
            entries.append(_make_entry(config, ticket, shapes, mask=mask, strip=strip))
        yield _CollectedRun(f"{MLFLOW}{run.run_id}", run.run_name, entries)


def _make_entry(
    config: Config, ticket: Ticket, shapes: _Shapes, *, mask: Packed | None, strip: bytes | None = None
) -> Entry:
    """Return an entry without a name. shapes: of the network's tensors, in its order."""
    first = ticket.round == 0 and config.start.ticket is None
    method = ticket.method or (DENSE if first else config.method())
    seed = config.run.seed if ticket.seed is None else ticket.seed
    parts = {name: math.prod(shape) for name, shape in shapes.items() if name in ticket.layer_density}
    return Entry("", method, seed, config.training_digest(), config.experiment_digest(), ticket, parts, mask, strip)


def _load_mask(data: bytes, ticket: Ticket, shapes: _Shapes, source: str) -> Packed:
    try:
        packed = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise UserError(f"{source}: its mask is damaged ({error}). Compare it from its run folder.") from None
    return _check_mask(packed, ticket, shapes, source)


def _check_mask(packed: Mapping[str, Tensor], ticket: Ticket, shapes: _Shapes, source: str) -> Packed:
    """Return the mask as NumPy arrays. Raise UserError unless it fits the network and matches the ticket's digest."""
    sizes = {n: (math.prod(shapes[n]) + 7) // 8 for n in ticket.layer_density if n in shapes}
    lengths = {n: bits.numel() for n, bits in packed.items() if bits.dtype == torch.uint8 and bits.ndim == 1}
    names = ticket.layer_density.keys() | packed.keys()
    mismatched = sorted(n for n in names if n not in lengths or lengths[n] != sizes.get(n))
    if mismatched:
        raise UserError(
            f"{source}: its mask does not fit its network, first in '{mismatched[0]}'. Take it from the run again."
        )
    if masking.digest_tensors(packed, {name: shapes[name] for name in sizes}) != ticket.mask_digest:
        raise UserError(f"{source}: its mask is not the one that its ticket names. Take it from the run again.")
    return {name: bits.numpy() for name, bits in packed.items()}


def _tensor_shapes(config: Config, ticket: Ticket, source: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's tensors by name, in its order. Raise UserError if their sizes contradict the
    ticket's count of weights."""
    model = build_on_meta(config, ticket.total, source)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    total = sum(map(math.prod, shapes.values()))
    if total != ticket.total:
        raise UserError(
            f"{source}: its model section makes {total:,} weights, its ticket counts {ticket.total:,}. Get it again."
        )
    return shapes


def _unique_labels(runs: Sequence[_CollectedRun]) -> list[str]:
    """Return a short unique name for each run: the shortest path suffixes that distinguish the runs.

    Runs with equal labels get the first six characters of MLflow's run id, or a number, appended.
    """
    names = _short_names([run.label for run in runs])
    often = Counter(names)
    for at, (run, name) in enumerate(zip(runs, names, strict=True)):
        if often[name] > 1 and run.key.startswith(MLFLOW):
            names[at] = f"{name}-{run.key.removeprefix(MLFLOW)[:6]}"
    for at, name in enumerate(names):
        numbered = chain([name], (f"{name} ({number})" for number in count(2)))
        names[at] = next(text for text in numbered if text not in names[:at])
    return names


def _short_names(labels: Sequence[str]) -> list[str]:
    """Return path suffixes of the smallest length that keeps different labels different; else the labels."""
    parts = [[p for p in text.rstrip("/").split("/") if p not in ("", ".")] or [text] for text in labels]
    lengths = range(1, max(map(len, parts), default=1) + 1)
    suffixes = (["/".join(p[-length:]) for p in parts] for length in lengths)
    return next((names for names in suffixes if len(set(names)) == len(set(labels))), list(labels))
