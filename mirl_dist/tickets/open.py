"""A ticket opened for reading, wherever it lies: a round of a run in a folder or under s3://, or one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirl_dist import models
from mirl_dist.config.config import Config, from_dump
from mirl_dist.config.portable import portable
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.storage import Options, open_store
from mirl_dist.tickets import file, verify
from mirl_dist.tickets.file import TicketContent
from mirl_dist.training.checkpoint import INITIAL, Checkpoints
from mirl_dist.training.initial import StartingPoint
from mirl_dist.training.state import unpack_masks
from mirl_dist.training.ticket import Ticket


class RunTicket(NamedTuple):
    """A run and one of its rounds."""

    checkpoints: Checkpoints
    config: Config
    round_: int

    def ticket(self) -> Ticket:
        """The round's record."""
        return self.checkpoints.ticket(self.round_)

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights that the round trained. Raises UserError where the run did not keep them."""
        return self.checkpoints.round_weights(self.round_)

    def initial_weights(self) -> dict[str, Tensor] | None:
        """The initial values of all weights, pruned ones too; None for a run that began from a ticket's survivors."""
        start = self.config.start
        if start.ticket is not None and start.kind == "ticket":
            return None
        return _verified_initial(self.checkpoints)

    def starting_point(self) -> StartingPoint:
        """What the round began with; its trained weights are not read. Raises UserError where a part is damaged."""
        initial, packed = _verified_initial(self.checkpoints), self.checkpoints.round_masks(self.round_)
        ticket, folder = self.ticket(), self.checkpoints.store.where(f"rounds/{self.round_:02d}")
        shapes = {name: tuple(w.shape) for name, w in initial.items() if name in ticket.layer_density}
        masks = unpack_masks(packed, shapes, folder)
        masking.apply_masks(initial, masks)
        return StartingPoint(ticket, masks, initial)

    def content(self) -> TicketContent:
        """Everything that the ticket is. Raises UserError where a part is damaged, or the run did not keep it."""
        ticket, masks, initial = self.starting_point()
        return TicketContent(ticket, self.config.dump(), masks, initial, self.trained_weights())


class FileTicket(NamedTuple):
    """A ticket in a file of its own; the same methods as a run's ticket."""

    config: Config
    body: TicketContent

    def ticket(self) -> Ticket:
        return self.body.ticket

    def trained_weights(self) -> dict[str, Tensor]:
        return self.body.trained

    def initial_weights(self) -> dict[str, Tensor] | None:
        """None: a file holds the initial values of survivors only."""
        return None

    def starting_point(self) -> StartingPoint:
        return StartingPoint(self.body.ticket, self.body.masks, self.body.initial)

    def content(self) -> TicketContent:
        return self.body


_DEFAULT_OPTIONS = Options()


def open_run(folder: str, options: Options = _DEFAULT_OPTIONS) -> tuple[Checkpoints, Config]:
    """Open a run for reading; options: where its store is not as the environment says. Raises UserError without one."""
    _check_is_run(folder)
    checkpoints = Checkpoints(open_store(folder, options))
    identity = checkpoints.identity()
    if identity is None:
        raise UserError(f"{folder} holds no run (no run.json). Give the run.folder of a config that was trained.")
    return checkpoints, from_dump(identity["config"], f"{folder}/run.json")


def _check_is_run(folder: str) -> None:
    """Raise UserError for what names something else than a run."""
    if folder.startswith("mlflow:"):
        raise UserError(
            f"found {folder}, but only `tickets compare` reads MLflow. Name the run's folder, or a ticket file."
        )
    if is_file(folder):
        raise UserError(f"found {folder}, which is a file, where a run is needed. Name the folder of a run.")
    if folder.endswith(".ticket") and not Path(folder).exists():
        raise UserError(f"no file at {folder}. Give the path of a ticket file, or a run.")


def is_file(reference: str) -> bool:
    """Whether a reference is a ticket file alone, or what else is a file."""
    return "://" not in reference and Path(reference).is_file()


def run_of(reference: str) -> str:
    """The run that `RUN` or `RUN/rounds/NN` names."""
    return re.sub(r"/rounds/\d+/?$", "", reference).rstrip("/") or reference


def open_run_ticket(reference: str, options: Options = _DEFAULT_OPTIONS) -> RunTicket:
    """`RUN` (its best round where the run chose one, else its last) or `RUN/rounds/NN`."""
    match = re.fullmatch(r"(.*?)/rounds/(\d+)/?", reference)
    checkpoints, config = open_run(match.group(1) if match else reference, options)
    rounds = [t.round for t in checkpoints.tickets()]
    if not rounds:
        raise UserError(f"{reference} has no finished round yet. `mirl-dist status` shows where it stands.")
    chosen = checkpoints.best()
    round_ = int(match.group(2)) if match else (rounds[-1] if chosen is None else chosen)
    if round_ not in rounds:
        raise UserError(f"{reference} is not there; finished rounds are {', '.join(map(str, rounds))}.")
    return RunTicket(checkpoints, config, round_)


def open_ticket(reference: str, options: Options = _DEFAULT_OPTIONS) -> RunTicket | FileTicket:
    """The round that `open_run_ticket` opens, or the ticket in a file. Raises UserError for a file that is none."""
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
    """The network of a config without values. Raises UserError, before it is built, for more than so many weights."""
    verify.check_size(config, weights, source)
    with torch.device("meta"):
        return models.create(config.model.name, **config.model.sizes())


def network(config: Config, weights: dict[str, Tensor]) -> nn.Module:
    """The network of a config with these weights, for restoring. Raises UserError where they are not its weights."""
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
    initial, identity = checkpoints.initial(), checkpoints.identity() or {}
    if initial is None or masking.digest_tensors(initial) != identity.get("initial_digest"):
        raise UserError(
            f"{checkpoints.store.where(INITIAL)} is damaged or missing. Start the run again once: it makes the file "
            "anew where its seed still gives the same values."
        )
    return initial
