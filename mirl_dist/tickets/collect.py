"""Collects tickets for a comparison from runs in stores, from MLflow and from ticket files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from mirl_dist.tickets.open import FileTicket, build_on_meta, is_file, open_run, open_run_ticket, open_ticket, run_of
from mirl_dist.training import ticket as tickets
from mirl_dist.training.ticket import Ticket

MLFLOW = "mlflow:"
Packed = Mapping[str, NDArray[np.uint8]]
_Shapes = Mapping[str, tuple[int, ...]]


class _CollectedTicket(NamedTuple):
    """The ticket of a round, its packed mask (None if unknown), and its image strip as PNG bytes (None if missing)."""

    ticket: Ticket
    mask: Packed | None
    strip: bytes | None


class _CollectedRun(NamedTuple):
    """The collected tickets of one run.

    key: identifies the run, however it was named. label: name for display. shapes: shapes of the network's tensors by
    name, in the network's order.
    """

    key: str
    label: str
    config: Config
    shapes: _Shapes
    tickets: list[_CollectedTicket]


def gather(references: Sequence[str], uri: str | None = None) -> list[Entry]:
    """Return the tickets of all references, grouped by run, in the order of the references.

    A reference is `RUN` (all rounds), `RUN/rounds/NN`, a ticket file, `mlflow:RUN_ID` (a parent run) or
    `mlflow:experiment:NAME`. uri: MLflow's address; None for MLFLOW_TRACKING_URI. Raises UserError for a reference
    without a ticket, for a mask that does not match its ticket, and for a ticket named twice.
    """
    runs: dict[str, _CollectedRun] = {}
    for collected in (run for reference in references for run in _collect(reference, uri)):
        before = runs.get(collected.key, collected._replace(tickets=[]))
        twice = {kept.ticket.round for kept in before.tickets} & {kept.ticket.round for kept in collected.tickets}
        if twice:
            raise UserError(f"found round {min(twice)} of {before.label} twice. Name each ticket once.")
        runs[collected.key] = collected._replace(label=before.label, tickets=before.tickets + collected.tickets)
    entries = []
    for run, name in zip(runs.values(), _unique_labels(list(runs.values())), strict=True):
        for ticket, mask, strip in run.tickets:
            first = ticket.round == 0 and run.config.start.ticket is None
            method = ticket.method or (DENSE if first else run.config.method())
            seed = run.config.run.seed if ticket.seed is None else ticket.seed
            parts = {part: math.prod(shape) for part, shape in run.shapes.items() if part in ticket.layer_density}
            likeness = run.config.training_digest(), run.config.experiment_digest()
            entries.append(Entry(name, method, seed, *likeness, ticket, parts, mask, strip))
    return entries


def _collect(reference: str, uri: str | None) -> list[_CollectedRun]:
    if reference.startswith(MLFLOW):
        return _collect_mlflow(reference.removeprefix(MLFLOW), uri)
    return [_collect_file(reference) if is_file(reference) else _collect_run(reference)]


def _collect_file(reference: str) -> _CollectedRun:
    opened = open_ticket(reference)
    assert isinstance(opened, FileTicket)
    packed = masking.pack(opened.body.masks)
    shapes = _tensor_shapes(opened.config, opened.ticket(), reference)
    kept = _CollectedTicket(opened.ticket(), _check_mask(packed, opened.ticket(), shapes, reference), None)
    return _CollectedRun(f"file:{Path(reference).resolve()}", reference, opened.config, shapes, [kept])


def _collect_run(reference: str) -> _CollectedRun:
    run = run_of(reference)
    if run != (reference.rstrip("/") or reference):
        run_ticket = open_run_ticket(reference)
        checkpoints, config, rounds = run_ticket.checkpoints, run_ticket.config, [run_ticket.ticket()]
    else:
        checkpoints, config = open_run(reference)
        rounds = checkpoints.tickets()
    if not rounds:
        raise UserError(f"{reference} has no finished round yet. `mirl-dist status` shows where it stands.")
    location = checkpoints.store.where()
    key = location if "://" in location else f"folder:{Path(location).resolve()}"
    shapes, collected = _tensor_shapes(config, rounds[0], location), []
    for ticket in rounds:
        source = f"{run}, round {ticket.round}"
        mask = _load_mask(checkpoints.round_masks(ticket.round), ticket, shapes, source)
        collected.append(_CollectedTicket(ticket, mask, checkpoints.pictures(ticket.round)))
    return _CollectedRun(key, run, config, shapes, collected)


def _collect_mlflow(reference: str, uri: str | None) -> list[_CollectedRun]:
    runs = []
    for run in reader.read(reference, uri):
        run_source = f"MLflow run {run.run_id}"
        if run.config is None:
            raise UserError(
                f"{run_source} holds no run.json, so it says neither method nor seed. Compare it from its run folder."
            )
        config, shapes = from_dump(run.config, f"{run_source}, run.json"), dict[str, tuple[int, ...]]()
        collected = []
        for round_, data, mask, strip in run.tickets:
            source = f"{run_source}, round {round_}"
            ticket = tickets.parse(data, source)
            if ticket.round != round_:
                raise UserError(f"{source}: its ticket is of round {ticket.round}. Compare it from its run folder.")
            shapes = shapes or _tensor_shapes(config, ticket, run_source)
            packed = None if mask is None else _load_mask(mask, ticket, shapes, source)
            collected.append(_CollectedTicket(ticket, packed, strip))
        runs.append(_CollectedRun(f"{MLFLOW}{run.run_id}", run.run_name, config, shapes, collected))
    return runs


def _load_mask(data: bytes, ticket: Ticket, shapes: _Shapes, source: str) -> Packed:
    try:
        packed = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise UserError(f"{source}: its mask is damaged ({error}). Compare it from its run folder.") from None
    return _check_mask(packed, ticket, shapes, source)


def _check_mask(packed: Mapping[str, Tensor], ticket: Ticket, shapes: _Shapes, source: str) -> Packed:
    """Return the mask as NumPy arrays. Raise UserError unless it fits the network and matches the ticket's digest."""
    wanted = {name: shapes[name] for name in ticket.layer_density if name in shapes}
    mismatched = sorted((wanted.keys() ^ packed.keys()) | (ticket.layer_density.keys() - wanted.keys()))
    for name in [] if mismatched else sorted(packed):
        if packed[name].dtype != torch.uint8 or tuple(packed[name].shape) != ((math.prod(wanted[name]) + 7) // 8,):
            mismatched.append(name)
    if mismatched:
        raise UserError(
            f"{source}: its mask does not fit its network, first in '{mismatched[0]}'. Take it from the run again."
        )
    if masking.digest_tensors(packed, wanted) != ticket.mask_digest:
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
    for at, run in enumerate(runs):
        if names.count(names[at]) > 1 and run.key.startswith(MLFLOW):
            names[at] = f"{names[at]}-{run.key.removeprefix(MLFLOW)[:6]}"
    for at, name in enumerate(names):
        number = 2
        while names[at] in names[:at]:
            names[at], number = f"{name} ({number})", number + 1
    return names


def _short_names(labels: Sequence[str]) -> list[str]:
    """Return path suffixes of the smallest length that keeps different labels different; else the labels."""
    parts = [[p for p in text.rstrip("/").split("/") if p not in ("", ".")] or [text] for text in labels]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(set(labels)):
            return names
    return list(labels)
