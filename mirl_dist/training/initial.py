"""Creates the initial weights of a run: drawn from its seed, imported, or taken from another run's ticket."""

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
from mirl_dist.storage import Options
from mirl_dist.storage.configured import options_of
from mirl_dist.training.ticket import Ticket


class InitialState(NamedTuple):
    """Initial weights, the masks of round 0 (None if dense), and the digest of the parent ticket (None without one)."""

    weights: dict[str, Tensor]
    masks: Masks | None
    parent: str | None


class StartingPoint(NamedTuple):
    """A ticket with the masks and the initial weights of its round; pruned weights are zero."""

    ticket: Ticket
    masks: Masks
    initial: dict[str, Tensor]


class OpenedTicket(Protocol):
    """The ticket that a run starts from.

    initial_weights: the initial values of all weights, pruned ones included; None if they were not kept.
    """

    @property
    def config(self) -> Config: ...
    def starting_point(self) -> StartingPoint: ...
    def initial_weights(self) -> dict[str, Tensor] | None: ...


OpenTicket = Callable[[str, Options], OpenedTicket]

_REINIT_SEED_OFFSET = 1_000_003
"""Added to run.seed when the initial weights of a `reinit` control are drawn; the order of the data, which also depends
on run.seed, does not change."""


def create_network(config: Config, more: int = 0) -> nn.Module:
    """Return the network of a config with weights drawn from run.seed + more; the global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed + more)
        model = models.create(config.model.name, **config.model.sizes())
    if next(model.buffers(), None) is not None:
        raise UserError(f"model.name: '{config.model.name}' has buffers, which masks and rewinding do not cover yet.")
    return model


def create_initial(config: Config, open_ticket: OpenTicket) -> InitialState:
    """Return the initial weights and masks of a run. open_ticket: opens `start.ticket`.

    Raises UserError for a weights file or a ticket that does not match the config.
    """
    drawn = {name: parameter.detach() for name, parameter in create_network(config).named_parameters()}
    if config.model.weights is not None:
        return InitialState(load_weights(Path(config.model.weights), drawn), None, None)
    if config.start.ticket is None:
        return InitialState(drawn, None, None)
    return _from_ticket(config, open_ticket, drawn)


def load_weights(file: Path, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read imported weights from a safetensors file, in the order of `drawn`, whose names and shapes they must have.

    Raises UserError for an unreadable file, another network, a dtype other than float32, or NaN or inf.
    """
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
    """Raise UserError if the weights file or the ticket that the config names does not exist. Writes nothing."""
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
        masks = masking.random_masks(masks, config.run.seed, kind.removeprefix("random_"))
        weights = _all_initial_weights(opened, config, ticket.initial_digest, source, drawn)
    return InitialState(weights, masks, ticket.digest())


def _all_initial_weights(
    opened: OpenedTicket, config: Config, digest: str, source: str, drawn: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the initial values of all weights, pruned ones included.

    They come from the ticket's run, or are drawn again from the seed in a ticket file. Raises UserError if the drawn
    weights do not have the digest that the ticket records.
    """
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
    """Raise UserError if names or shapes differ from those of the config's network. source: for the message."""
    expected = {name: t.shape for name, t in drawn.items()}
    mismatched = sorted(n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n))
    if mismatched:
        there, here = shapes.get(mismatched[0]), expected.get(mismatched[0])
        raise UserError(
            f"{source} is of another network: {len(mismatched)} tensors differ, first '{mismatched[0]}' (there "
            f"{'absent' if there is None else tuple(there)}, here {'absent' if here is None else tuple(here)}). "
            "Make the model section that of the file."
        )
