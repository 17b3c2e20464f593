"""Packs and verifies tickets; converts weights to and from checkpoints of the official code."""

from __future__ import annotations

import json
from pathlib import Path

from mirl_dist import models
from mirl_dist.config.config import portable
from mirl_dist.errors import UserError
from mirl_dist.observability import progress
from mirl_dist.storage import Folder, output_paths
from mirl_dist.tickets import file as ticket_file
from mirl_dist.tickets import open as opening
from mirl_dist.tickets import verify as verifying
from mirl_dist.tickets.file import TicketContent
from mirl_dist.tickets.open import FileTicket, RunTicket
from mirl_dist.tickets.runs import open_run
from mirl_dist.tickets.verify import MASK_FOLLOWS, Check, check_size
from mirl_dist.training.checkpointing import checkpoint_file
from mirl_dist.training.selection import prune_config_of
from mirl_dist.training.state import pack_tensors


def pack(reference: str, out: Path, *, overwrite: bool = False) -> None:
    """Write one round of a run to a ticket file, without the paths in its config. Raise UserError if the packed ticket
    fails its own verification."""
    output_paths.check_file(out, overwrite=overwrite, reads=[reference])
    opened = opening.open_ticket(reference)
    if isinstance(opened, FileTicket):
        raise UserError(f"found {reference}, which is a ticket file already. Copy it, or name a round of a run.")
    content = opened.content()
    data = ticket_file.pack(content._replace(config=portable(opened.config).dump()))
    broken = [check for check in verifying.verify(ticket_file.read(data, str(out))) if check.holds is False]
    if broken:
        raise UserError(
            f"{reference} fails its own verification: {broken[0].what} ({broken[0].detail}). Restore the run."
        )
    Folder(out.parent).put(out.name, data)
    ticket = content.ticket
    progress.say(
        f"{out}: round {ticket.round}, {ticket.alive_total:,} of {ticket.total:,} weights, {len(data):,} bytes "
        f"({len(data) / (4 * ticket.total):.1%} of the dense network's)"
    )


_STATUS_WORDS = {True: "holds  ", False: "BROKEN ", None: "unknown"}


def verify(reference: str, run: str | None, as_json: bool) -> None:
    """Verify a ticket by itself and, with its run, that the mask follows from the parent's weights; print all checks.

    run: location of the run that a ticket file belongs to. Raises UserError for a different run, and, after printing,
    if a check fails.
    """
    opened = opening.open_ticket(reference)
    content = opened.content()
    checks = list(verifying.verify(content))
    run_ticket = opened if isinstance(opened, RunTicket) else None
    if run is not None:
        run_ticket = _open_named_run(content, reference, run)
    if run_ticket is not None:
        checks += _verify_with_run(content, run_ticket)
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=1))
    else:
        for check in checks:
            detail = f": {check.detail}" if check.detail else ""
            progress.say(f"{_STATUS_WORDS[check.holds]}  {check.what}{detail}")
        if run_ticket is None:
            progress.say("not checked: whether the mask follows from the parent's weights; name the run with --run RUN")
    broken = [check.what for check in checks if check.holds is False]
    if broken:
        raise UserError(f"{reference} does not hold: {'; '.join(broken)}. Do not use it; get it from its run again.")


def _open_named_run(content: TicketContent, reference: str, run: str) -> RunTicket:
    """Open the run of --run at the ticket's round. Raise UserError if the ticket belongs to a different run."""
    checkpoints, config = open_run(run)
    identity = checkpoints.identity() or {}
    for what in ("fingerprint", "manifest_digest", "initial_digest"):
        stated = getattr(content.ticket, what)
        if identity.get(what) != stated:
            raise UserError(
                f"--run: {run} is another run than the ticket's: its {what.replace('_', ' ')} is "
                f"{str(identity.get(what))[:16]}, that of {reference} {stated[:16]}. "
                "Name the run that the ticket is of."
            )
    return RunTicket(checkpoints, config, content.ticket.round)


def _verify_with_run(content: TicketContent, run_ticket: RunTicket) -> list[Check]:
    """Return the checks that need the run: it holds this ticket, and the ticket follows from its parent."""
    location, ticket = run_ticket.checkpoints.store.where(), content.ticket
    kept = {t.round: t.digest() for t in run_ticket.checkpoints.tickets()}
    same = kept[ticket.round] == ticket.digest() if ticket.round in kept else None
    detail = f"not provable: {location} does not have its round" if same is None else location
    checks = [Check("the run has this exact ticket", same, detail)]
    if ticket.round == 0:
        return checks
    if ticket.round - 1 not in kept:
        return [*checks, Check(MASK_FOLLOWS, None, f"not provable: {location} lacks round {ticket.round - 1}")]
    before = RunTicket(run_ticket.checkpoints, run_ticket.config, ticket.round - 1)
    trained = before.trained_weights() if run_ticket.checkpoints.has_weights(before.round_) else {}
    start = before.starting_point()
    parent = TicketContent(start.ticket, run_ticket.config.dump(), start.masks, start.initial, trained)
    rule = prune_config_of(run_ticket.config.prune, run_ticket.config.run.seed)
    return [*checks, *verifying.verify_descent(content, parent, rule)]


def export(reference: str, out: Path, *, compact: bool, overwrite: bool = False) -> None:
    """Write a ticket's trained weights in the official code's layout (.ckpt, .pth, .pt), or as safetensors."""
    output_paths.check_file(out, overwrite=overwrite, reads=[reference])
    if out.suffix not in (".ckpt", ".pth", ".pt", ".safetensors"):
        raise UserError(f"--out: found {out}, whose extension names no format. Use .ckpt, .pth, .pt or .safetensors.")
    if compact and out.suffix == ".safetensors":
        raise UserError("--compact: found with a .safetensors file, which is never compressed. Name a .ckpt file.")
    opened = opening.open_ticket(reference)
    weights, sizes = opened.trained_weights(), opened.config.model.sizes()
    if out.suffix == ".safetensors":
        Folder(out.parent).put(out.name, pack_tensors(weights))
        progress.say(f"{out}: {len(weights)} tensors under this project's names")
        return
    check_size(opened.config, sum(t.numel() for t in weights.values()), reference)
    official = models.to_official(opened.config.model.name, weights, **sizes)
    data = models.write_official(official, compact=compact)
    Folder(out.parent).put(out.name, data)
    progress.say(
        f"{out}: {len(official)} tensors in the official layout, {len(data):,} bytes"
        + (" (compressed; load it as usual)" if compact else "")
    )


def import_official(file: Path, model: str, out: Path, *, overwrite: bool = False) -> None:
    """Convert an official checkpoint to safetensors under this project's names; print which tensors were dropped."""
    output_paths.check_file(out, overwrite=overwrite, reads=[file])
    try:
        converted = models.from_official(model, checkpoint_file.read(file))
    except UserError as fault:
        raise UserError(str(fault) if str(file) in str(fault) else f"{file}: {fault}") from None
    Folder(out.parent).put(out.name, pack_tensors(converted.weights))
    count = sum(t.numel() for t in converted.weights.values())
    progress.say(f"{out}: {len(converted.weights)} tensors, {count:,} weights")
    for note in converted.notes:
        progress.say(note)
    for text in converted.dropped:
        progress.say(f"dropped (never used by the network): {text}")
