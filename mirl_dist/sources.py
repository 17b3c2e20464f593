"""Tickets gathered for a comparison: from runs in stores, from MLflow, from ticket files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray

from mirl_dist import mlflow_reader, models, opening
from mirl_dist import ticket as tickets
from mirl_dist.compare.shown import DENSE, Shown
from mirl_dist.config import Config, of_dump
from mirl_dist.faults import Fault
from mirl_dist.opening import Filed
from mirl_dist.pruning import masks as masking
from mirl_dist.ticket import Ticket

MLFLOW = "mlflow:"
Packed = Mapping[str, NDArray[np.uint8]]


class _Gathered(NamedTuple):
    """The tickets of one run as they were found. said: what the user called it; each: ticket, packed mask, strip."""

    said: str
    config: Config
    each: list[tuple[Ticket, Packed | None, bytes | None]]


def gather(references: Sequence[str], uri: str | None = None) -> list[Shown]:
    """All tickets that references name, run after run, in their order.

    A reference: `RUN` (all rounds), `RUN/rounds/NN`, a ticket file, `mlflow:RUN_ID` (a parent run) or
    `mlflow:experiment:NAME`. uri: MLflow's address, where it is not MLFLOW_TRACKING_URI. Raises Fault for what holds no
    ticket, and for one ticket named twice.
    """
    found: dict[str, _Gathered] = {}
    for one in (run for reference in references for run in _gather(reference, uri)):
        before = found.get(one.said, one._replace(each=[]))
        twice = {t.round for t, _, _ in before.each} & {t.round for t, _, _ in one.each}
        if twice:
            raise Fault(f"found round {min(twice)} of {one.said} twice. Name each ticket once.")
        found[one.said] = one._replace(each=before.each + one.each)
    shown = []
    for run, name in zip(found.values(), _short_names(list(found)), strict=True):
        order = _order(run.config)
        for ticket, mask, strip in run.each:
            first = ticket.round == 0 and run.config.start.ticket is None
            method = ticket.method or (DENSE if first else run.config.method())
            seed = run.config.run.seed if ticket.seed is None else ticket.seed
            parts = {part: size for part, size in order.items() if part in ticket.layer_density}
            likeness = run.config.training(), run.config.experiment()
            shown.append(Shown(name, method, seed, *likeness, ticket, parts, mask, strip))
    if not shown:
        raise Fault(f"found no finished round in {', '.join(references)}. `mirl-dist status` shows where a run stands.")
    return shown


def _gather(reference: str, uri: str | None) -> list[_Gathered]:
    if reference.startswith(MLFLOW):
        return _of_mlflow(reference.removeprefix(MLFLOW), uri)
    opened = opening.open_ticket(reference) if _names_one(reference) else None
    if isinstance(opened, Filed):
        packed = {name: bits.numpy() for name, bits in masking.pack(opened.content.masks).items()}
        return [_Gathered(reference, opened.config, [(opened.ticket(), packed, None)])]
    if opened is not None:
        checkpoints, config, rounds = opened.checkpoints, opened.config, [opened.ticket()]
    else:
        checkpoints, config = opening.open_run(reference)
        rounds = checkpoints.tickets()
    each: list[tuple[Ticket, Packed | None, bytes | None]] = []
    for ticket in rounds:
        bits = _unpacked(checkpoints.round_masks(ticket.round), f"{reference}, round {ticket.round}")
        each.append((ticket, bits, checkpoints.pictures(ticket.round)))
    return [_Gathered(reference.partition("/rounds/")[0].rstrip("/"), config, each)]


def _names_one(reference: str) -> bool:
    """Whether a reference is of one ticket: a file, or a round."""
    return "/rounds/" in reference or ("://" not in reference and PurePath(reference).suffix == ".ticket")


def _of_mlflow(reference: str, uri: str | None) -> list[_Gathered]:
    found, names = [], set[str]()
    for run in mlflow_reader.read(reference, uri):
        where = f"MLflow run {run.run_id}"
        if run.config is None:
            raise Fault(
                f"{where} holds no run.json, so it says neither method nor seed. Compare it from its run folder."
            )
        config, each = of_dump(run.config, f"{where}, run.json"), []
        for round_, ticket, mask, strip in run.tickets:
            place = f"{where}, round {round_}"
            each.append((tickets.parse(ticket, place), None if mask is None else _unpacked(mask, place), strip))
        name = f"{run.run_name}-{run.run_id[:6]}" if run.run_name in names else run.run_name
        found.append(_Gathered(name, config, each))
        names.add(run.run_name)
    return found


def _unpacked(data: bytes, where: str) -> Packed:
    try:
        return {name: bits.numpy() for name, bits in safetensors.torch.load(data).items()}
    except safetensors.SafetensorError as error:
        raise Fault(f"{where}: its mask is damaged ({error}). Compare it from its run folder.") from None


def _order(config: Config) -> dict[str, int]:
    """The weights of a network by name, in its own order."""
    with torch.device("meta"):
        model = models.create(config.model.name, **config.model.sizes())
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def _short_names(said: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell runs apart."""
    parts = [[p for p in text.rstrip("/").split("/") if p not in ("", ".")] or [text] for text in said]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(said)
