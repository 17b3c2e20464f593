"""What a run begins with: values drawn from its seed, an imported network, or another run's ticket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mirl_dist import models
from mirl_dist.config.config import Config
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks
from mirl_dist.pruning.prune import in_scope
from mirl_dist.pruning.random_masks import random_masks
from mirl_dist.storage import Options
from mirl_dist.storage.configured import options_of
from mirl_dist.training.ticket import Ticket


class InitialState(NamedTuple):
    """First values; the masks of round 0 (None: all alive), and the digest of the ticket that they are of."""

    weights: dict[str, Tensor]
    masks: Masks | None
    parent: str | None


class StartingPoint(NamedTuple):
    """What a ticket's round began with: its record, its masks, and its initial values, zero where pruned."""

    ticket: Ticket
    masks: Masks
    initial: dict[str, Tensor]


class OpenedTicket(Protocol):
    """The ticket that a run starts from. initial_weights: of pruned weights too, None where they are not kept."""

    @property
    def config(self) -> Config: ...
    def starting_point(self) -> StartingPoint: ...
    def initial_weights(self) -> dict[str, Tensor] | None: ...


OpenTicket = Callable[[str, Options], OpenedTicket]

_REINIT_SEED_OFFSET = 1_000_003
"""Added to run.seed for first values that are drawn anew: the data's order, which the seed also gives, stays."""


def create_network(config: Config, more: int = 0) -> nn.Module:
    """The network of a config with fresh weights, the same for the same seed. more: added to the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed + more)
        model = models.create(config.model.name, **config.model.sizes())
    if next(model.buffers(), None) is not None:
        raise UserError(f"model.name: '{config.model.name}' has buffers, which masks and rewinding do not cover yet.")
    return model


def create_initial(config: Config, open_ticket: OpenTicket) -> InitialState:
    """What a run begins with; open_ticket opens `start.ticket`.

    Raises UserError for a file or a ticket that does not fit the config.
    """
    drawn = {name: parameter.detach() for name, parameter in create_network(config).named_parameters()}
    if config.model.weights is not None:
        return InitialState(load_weights(Path(config.model.weights), drawn), None, None)
    if config.start.ticket is None:
        return InitialState(drawn, None, None)
    return _from_ticket(config, open_ticket, drawn)


def load_weights(file: Path, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        weights = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"model.weights: found {file}, which cannot be read as safetensors ({str(error)[:100]}). "
            "Write it with `mirl-dist import`."
        ) from None
    _check_same_network(f"model.weights: {file}", {n: t.shape for n, t in weights.items()}, drawn)
    unusable = sorted(n for n, t in weights.items() if t.dtype != torch.float32 or not bool(torch.isfinite(t).all()))
    if unusable:
        raise UserError(
            f"model.weights: {file}: '{unusable[0]}' ({len(unusable)} such) is not float32, or not finite. "
            "Import again."
        )
    return {name: weights[name] for name in drawn}


def check_start_exists(config: Config, open_ticket: OpenTicket) -> None:
    """Raise UserError, before anything is begun, where what a run is to begin with is not there."""
    if config.model.weights is not None and not Path(config.model.weights).is_file():
        raise UserError(
            f"model.weights: found {config.model.weights}, which is no file. Write it with `mirl-dist import`."
        )
    if config.start.ticket is not None:
        open_ticket(config.start.ticket, options_of(config.store))


def _from_ticket(config: Config, open_ticket: OpenTicket, drawn: dict[str, Tensor]) -> InitialState:
    reference, kind = str(config.start.ticket), config.start.kind
    opened = open_ticket(reference, options_of(config.store))
    ticket, masks, weights = opened.starting_point()
    source = f"start.ticket: {reference}"
    _check_same_network(source, {n: t.shape for n, t in weights.items()}, drawn)
    mismatched = sorted(masks.keys() ^ set(in_scope(drawn, config.prune.scope)))
    if mismatched:
        raise UserError(
            f"{source} was pruned in another scope: {len(mismatched)} tensors are in one of the two only, first "
            f"'{mismatched[0]}'. Set prune.scope to the ticket's."
        )
    weights = {name: weights[name] for name in drawn}
    if kind == "reinit":
        weights = {name: p.detach() for name, p in create_network(config, _REINIT_SEED_OFFSET).named_parameters()}
    elif kind != "ticket":
        masks = random_masks(masks, config.run.seed, kind.removeprefix("random_"))
        weights = _all_initial_weights(opened, config, ticket.initial_digest, source, drawn)
    return InitialState(weights, masks, ticket.digest())


def _all_initial_weights(
    opened: OpenedTicket, config: Config, digest: str, source: str, drawn: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Those of the dead weights too: of the run, or drawn again from the seed of a ticket file."""
    weights = opened.initial_weights()
    if weights is None:
        seed = opened.config.run.seed
        run = config.run.model_copy(update={"seed": seed})
        again = create_network(config.model_copy(update={"run": run}))
        weights = {name: parameter.detach() for name, parameter in again.named_parameters()}
        if masking.digest_tensors(weights) != digest:
            raise UserError(
                f"{source} tells the first values of its survivors only, and seed {seed} gives others here. Name a "
                "round of the run whose tickets began from all weights, as RUN/rounds/NN."
            )
    return {name: weights[name] for name in drawn}


def _check_same_network(source: str, shapes: dict[str, torch.Size], drawn: dict[str, Tensor]) -> None:
    expected = {name: t.shape for name, t in drawn.items()}
    mismatched = sorted(n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n))
    if mismatched:
        there, here = shapes.get(mismatched[0]), expected.get(mismatched[0])
        raise UserError(
            f"{source} is of another network: {len(mismatched)} tensors differ, first '{mismatched[0]}' (there "
            f"{'absent' if there is None else tuple(there)}, here {'absent' if here is None else tuple(here)}). "
            "Make the model section that of the file."
        )
