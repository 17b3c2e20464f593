"""Tickets on their way: into one file, proved, and to and from the official code's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mirl_dist import assemble, models, opening, report, ticket_file
from mirl_dist.checkpoint import pack_tensors
from mirl_dist.faults import Fault
from mirl_dist.opening import Found
from mirl_dist.storage import Folder
from mirl_dist.ticket_file import Check


def pack(reference: str, out: Path) -> None:
    """One round of a run into one file. Raises Fault where its own proof fails."""
    content = opening.content(opening.find(reference))
    data = ticket_file.pack(*content)
    broken = [check for check in ticket_file.verify(ticket_file.read(data, str(out))) if not check.holds]
    if broken:
        raise Fault(f"{reference} does not prove itself: {broken[0].what} ({broken[0].detail}). Restore the run.")
    Folder(out.parent).put(out.name, data)
    ticket = content.ticket
    report.say(
        f"{out}: round {ticket.round}, {ticket.alive_total:,} of {ticket.total:,} weights, {len(data):,} bytes "
        f"({len(data) / (4 * ticket.total):.1%} of the dense network's)"
    )


def verify(reference: str, run: str | None, as_json: bool) -> None:
    """Prove a ticket from itself, and with its run that the mask follows from the parent's weights.

    run: where the run of a ticket file is. Raises Fault, after printing all checks, when one does not hold.
    """
    opened = opening.open_ticket(reference)
    content = opening.content(opened)
    checks = ticket_file.verify(content)
    home = opened if isinstance(opened, Found) else None
    if run is not None:
        checkpoints, config = opening.open_run(run)
        home = Found(checkpoints, config, content.ticket.round)
    if home is not None:
        checks += _with_run(content, home)
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=1))
    else:
        for check in checks:
            detail = f": {check.detail}" if check.detail else ""
            report.say(f"{'holds ' if check.holds else 'BROKEN'}  {check.what}{detail}")
        if home is None:
            report.say("not asked: whether the mask follows from the parent's weights; name the run with --run RUN")
    broken = [check.what for check in checks if not check.holds]
    if broken:
        raise Fault(f"{reference} does not hold: {'; '.join(broken)}. Do not use it; get it from its run again.")


def _with_run(content: ticket_file.Content, home: Found) -> list[Check]:
    """What only the run can prove."""
    where, ticket = home.checkpoints.store.where(), content.ticket
    kept = {t.round: t for t in home.checkpoints.tickets()}
    same = ticket.round in kept and kept[ticket.round].digest() == ticket.digest()
    found = [Check("the run holds this very ticket", same, where)]
    if ticket.round == 0:
        return found
    if ticket.round - 1 not in kept or not home.checkpoints.has_weights(ticket.round - 1):
        return [*found, Check("the mask follows from the parent's weights", False, "the run did not keep them")]
    parent = opening.content(Found(home.checkpoints, home.config, ticket.round - 1))
    rule = assemble.rule_of(home.config)
    return found + ticket_file.verify_descent(content, parent, rule)


def export(reference: str, out: Path, compact: bool) -> None:
    """A ticket's trained weights as the official code loads them (.ckpt, .pth, .pt), or as safetensors."""
    opened = opening.open_ticket(reference)
    weights, sizes = opening.trained(opened), opened.config.model.sizes()
    if out.suffix == ".safetensors":
        if compact:
            raise Fault("--compact: found with a .safetensors file, which is never compressed. Name a .ckpt file.")
        Folder(out.parent).put(out.name, pack_tensors(weights))
        report.say(f"{out}: {len(weights)} tensors under this project's names")
        return
    if out.suffix not in (".ckpt", ".pth", ".pt"):
        raise Fault(f"--out: found {out}, whose ending says no format. Use .ckpt, .pth, .pt or .safetensors.")
    official = models.to_official(opened.config.model.name, weights, **sizes)
    data = models.write_official(official, compact=compact, lightning=True)
    Folder(out.parent).put(out.name, data)
    report.say(
        f"{out}: {len(official)} tensors in the official layout, {len(data):,} bytes"
        + (" (compressed; load it as usual)" if compact else "")
    )


def import_official(file: Path, model: str, out: Path) -> None:
    """An official checkpoint to safetensors under our names; says what was dropped."""
    converted = models.from_official(model, _load_tensors(file))
    Folder(out.parent).put(out.name, pack_tensors(converted.weights))
    count = sum(t.numel() for t in converted.weights.values())
    report.say(f"{out}: {len(converted.weights)} tensors, {count:,} weights")
    for text in converted.dropped:
        report.say(f"dropped (never used by the network): {text}")


# What torch's restricted unpickler raises for bytes that are no checkpoint: it trips over whatever comes first.
_NO_CHECKPOINT = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError)


def _load_tensors(file: Path) -> dict[str, Any]:
    """What a checkpoint file holds, read without running code from it. Raises Fault for any other file."""
    import pickle

    import safetensors.torch

    try:
        if file.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(file))
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return found
    except FileNotFoundError:
        raise Fault(f"no file at {file}. Give the path of an official checkpoint.") from None
    except pickle.UnpicklingError:  # torch's own text would advise to run the code
        raise Fault(
            f"{file} holds more than tensors and plain values, which only code from the file could read; none was run. "
            "Save its state dict alone, where you trust the file."
        ) from None
    except (*_NO_CHECKPOINT, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise Fault(
            f"{file} is not a checkpoint that can be read ({type(error).__name__}: {reason}). Get the file again."
        ) from None
