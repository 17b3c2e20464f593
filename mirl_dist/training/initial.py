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
from mirl_dist.config.local_paths import local_folder
from mirl_dist.errors import UserError
from mirl_dist.models.official import WRAPPER_PREFIXES
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks
from mirl_dist.pruning.prune import in_scope
from mirl_dist.storage import Options
from mirl_dist.storage.configured import options_of
from mirl_dist.training.checkpointing import checkpoint_file
from mirl_dist.training.state import check_same_network
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


def draw_weights(config: Config, more: int = 0) -> dict[str, Tensor]:
    """Return the weights of `create_network`."""
    return {name: parameter.detach() for name, parameter in create_network(config, more).named_parameters()}


def create_initial(config: Config, open_ticket: OpenTicket) -> InitialState:
    """Return the initial weights and masks of a run. open_ticket: opens `start.ticket`.

    Raises UserError for a weights file or a ticket that does not match the config.
    """
    drawn = draw_weights(config)
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
    except (OSError, safetensors.SafetensorError):
        raise UserError(f"model.weights: {_explain_unreadable(file)}") from None
    prefix = next((p for p in WRAPPER_PREFIXES if all(name.startswith(p) for name in weights)), None)
    if prefix is not None:
        raise UserError(
            f"model.weights: {file}: its names have the prefix '{prefix}'. Remove that with `mirl-dist import`, which "
            "takes checkpoints of the published size."
        )
    check_same_network(f"model.weights: {file}", weights, {n: t.shape for n, t in drawn.items()})
    for text, unusable in (
        (
            "has NaN or infinite values. Its training diverged, or the file is damaged: use another checkpoint.",
            [n for n, t in weights.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())],
        ),
        (
            "is not float32. Save it as float32, as `mirl-dist import` does with checkpoints of the published size.",
            [n for n, t in weights.items() if t.dtype != torch.float32],
        ),
    ):
        if unusable:
            raise UserError(f"model.weights: {file}: '{min(unusable)}' ({len(unusable)} such) {text}")
    return {name: weights[name] for name in drawn}


def _explain_unreadable(file: Path) -> str:
    """Return what a file that is not safetensors is, and what to do."""
    try:
        checkpoint_file.read(file)
    except UserError as fault:
        return str(fault)
    return f"found {file}, a checkpoint of torch. Convert it with `mirl-dist import`."


def check_start(config: Config, open_ticket: OpenTicket) -> None:
    """Raise UserError if a run cannot start from the weights file or the ticket that its config names.

    Writes nothing, so that a refused start leaves nothing in the run folder.
    """
    if config.model.weights is not None and not Path(config.model.weights).is_file():
        raise UserError(
            f"model.weights: found {config.model.weights}, which is no file. Write it with `mirl-dist import`."
        )
    folder, weights = local_folder(config.run.folder), config.model.weights
    if weights is not None and folder is not None and folder.resolve() in Path(weights).resolve().parents:
        raise UserError(
            f"model.weights: found {weights}, which is in run.folder, where this run would replace files. Move it, or "
            "choose another run.folder."
        )
    if config.model.weights is not None or config.start.ticket is not None:
        create_initial(config, open_ticket)


def _from_ticket(config: Config, open_ticket: OpenTicket, drawn: dict[str, Tensor]) -> InitialState:
    reference, kind = str(config.start.ticket), config.start.kind
    opened = open_ticket(reference, options_of(config.store))
    ticket, masks, weights = opened.starting_point()
    source = f"start.ticket: {reference}"
    check_same_network(source, weights, {n: t.shape for n, t in drawn.items()})
    mismatched = sorted(masks.keys() ^ set(in_scope(drawn, config.prune.scope)))
    if mismatched:
        raise UserError(
            f"{source} was pruned in another scope: {len(mismatched)} tensors are in one of the two only, first "
            f"'{mismatched[0]}'. Set prune.scope to the ticket's."
        )
    if kind == "reinit":
        weights = draw_weights(config, _REINIT_SEED_OFFSET)
    elif kind != "ticket":
        masks = masking.random_masks(masks, config.run.seed, kind.removeprefix("random_"))
        seed = opened.config.run.seed
        weights = opened.initial_weights() or draw_weights(config, seed - config.run.seed)
        if masking.digest_tensors(weights) != ticket.initial_digest:
            raise UserError(
                f"{source} has only the initial values of its survivors, and seed {seed} gives others here. Name "
                "a round of the run in which all weights had their initial values, as RUN/rounds/NN."
            )
    return InitialState({name: weights[name] for name in drawn}, masks, ticket.digest())
