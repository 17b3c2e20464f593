"""Opens a ticket for reading: a round of a run in any store (folder, s3://), or a ticket file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirl_dist import models
from mirl_dist.config.config import Config, from_dump, portable
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.storage import Options
from mirl_dist.tickets import file, verify
from mirl_dist.tickets.file import TicketContent
from mirl_dist.tickets.runs import is_file, open_rounds
from mirl_dist.training.checkpointing.checkpoint import INITIAL, Checkpoints
from mirl_dist.training.initial import StartingPoint
from mirl_dist.training.state import unpack_masks
from mirl_dist.training.ticket import Ticket


class RunTicket(NamedTuple):
    """A ticket in a run: one round of the run."""

    checkpoints: Checkpoints
    config: Config
    round_: int

    def ticket(self) -> Ticket:
        """Return the round's record."""
        return self.checkpoints.ticket(self.round_)

    def trained_weights(self) -> dict[str, Tensor]:
        """Return the round's trained weights. Raise UserError if the run did not keep them."""
        return self.checkpoints.round_weights(self.round_)

    def initial_weights(self) -> dict[str, Tensor] | None:
        """Return all initial values, also of pruned weights; None if the run started from a ticket's survivors."""
        start = self.config.start
        if start.ticket is not None and start.kind == "ticket":
            return None
        return _verified_initial(self.checkpoints)

    def starting_point(self) -> StartingPoint:
        """Return the round's starting point, without reading trained weights. Raise UserError for a damaged part."""
        initial, packed = _verified_initial(self.checkpoints), self.checkpoints.round_masks(self.round_)
        ticket, folder = self.ticket(), self.checkpoints.store.where(f"rounds/{self.round_:02d}")
        shapes = {name: tuple(w.shape) for name, w in initial.items() if name in ticket.layer_density}
        masks = unpack_masks(packed, shapes, folder)
        masking.apply_masks(initial, masks)
        return StartingPoint(ticket, masks, initial)

    def content(self) -> TicketContent:
        """Return the ticket's whole content. Raise UserError for a damaged part, or one that the run did not keep."""
        ticket, masks, initial = self.starting_point()
        return TicketContent(ticket, self.config.dump(), masks, initial, self.trained_weights())


class FileTicket(NamedTuple):
    """A ticket in a ticket file, with the same methods as RunTicket."""

    config: Config
    body: TicketContent

    def ticket(self) -> Ticket:
        return self.body.ticket

    def trained_weights(self) -> dict[str, Tensor]:
        return self.body.trained

    def initial_weights(self) -> dict[str, Tensor] | None:
        """Return None: a file holds initial values of surviving weights only."""
        return None

    def starting_point(self) -> StartingPoint:
        return StartingPoint(self.body.ticket, self.body.masks, self.body.initial)

    def content(self) -> TicketContent:
        return self.body


_DEFAULT_OPTIONS = Options()


def open_run_ticket(reference: str, options: Options = _DEFAULT_OPTIONS) -> RunTicket:
    """Open `RUN/rounds/NN`, or the best round of `RUN` (its last if the run chose none). Raise UserError if missing."""
    checkpoints, config, tickets, asked = open_rounds(reference, options)
    best = checkpoints.best() if asked is None else asked
    return RunTicket(checkpoints, config, tickets[-1].round if best is None else best)


def open_ticket(reference: str, options: Options = _DEFAULT_OPTIONS) -> RunTicket | FileTicket:
    """Open a ticket file, or a round as `open_run_ticket`. Raise UserError for an invalid or unreadable file."""
    if not is_file(reference):
        return open_run_ticket(reference, options)
    try:
        data = Path(reference).read_bytes()
    except OSError as error:
        raise UserError(
            f"found {reference}, which cannot be read: {error.strerror or error}. Correct the rights."
        ) from None
    content = file.read(data, reference)
    return FileTicket(portable(from_dump(content.config, reference)), content)


def build_on_meta(config: Config, weights: int, source: str) -> nn.Module:
    """Build a config's network on the meta device. Raise UserError beforehand if it is larger than `weights` allows."""
    verify.check_size(config, weights, source)
    with torch.device("meta"):
        return models.create(config.model.name, **config.model.sizes())


def network(config: Config, weights: dict[str, Tensor]) -> nn.Module:
    """Return a config's network with these weights, in eval mode. Raise UserError if names or shapes do not match."""
    model = build_on_meta(config, sum(t.numel() for t in weights.values()), "the ticket")
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in weights.items()}
    if expected != shapes:
        names = sorted(n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n))
        raise UserError(
            f"the ticket's weights and its model section differ in {len(names)} tensors, first '{names[0]}': found "
            f"{shapes.get(names[0], 'nothing')}, the network has {expected.get(names[0], 'nothing')}. Get the ticket "
            "again."
        )
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _verified_initial(checkpoints: Checkpoints) -> dict[str, Tensor]:
    initial, identity = checkpoints.tensors(INITIAL), checkpoints.identity() or {}
    if initial is None or masking.digest_tensors(initial) != identity.get("initial_digest"):
        raise UserError(
            f"{checkpoints.store.where(INITIAL)} is damaged or missing. Start the run again once: it makes the file "
            "anew where its seed still gives the same values."
        )
    return initial
