"""Defines the ticket, the record of one round: surviving weights, scores, and the parent ticket."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mirl_dist.config import strict_json
from mirl_dist.config.canonical_json import digest_of_json, to_json
from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score

DENSE = "dense"
"""Method name of a round 0 that trains all weights."""
MOST_WEIGHTS = 1 << 40
"""Upper bound on the weights of a network that `parse` accepts."""


class Curve(BaseModel):
    """Validation scores during a round, on the first images of each task and set.

    steps: optimiser steps done; psnr: 'task/set' -> PSNR in dB at each of these steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[int, ...] = ()
    psnr: dict[str, tuple[float, ...]] = {}


class Ticket(BaseModel):
    """The ticket of round r: its mask, initial and trained weights (by digest), scores, and parent ticket.

    alive: surviving prunable weights; prunable, total: all prunable weights, all weights; counted by masks.
    density = alive / prunable and total density = (alive + total - prunable) / total, in (0, 1]; a sparsity is 1 minus
    a density. threshold: the largest score removed to make this mask (0 in round 0), a magnitude by default. skipped:
    reads of the round in which a damaged sample was replaced by another; damaged: 'shard' or 'shard key' -> the
    problem; bad: global batches skipped because their loss or gradient was not finite. scores: 'task/set' -> Score by
    the headline protocol, described by `protocol`; also: protocol -> 'task/set' -> Score for the other protocols;
    protocols: name -> description of all. measured: how images were restored for scoring ('precision', 'compile',
    'tile'). arithmetic: how training differs from eager execution in float32 ('precision', 'compile'). method: the
    papers' term (config.method). began: the optimiser step at which the round's training began (above 0 with rewinding
    to a step). collapsed: prunable tensors without a surviving weight. parent: digest of the parent ticket. engine:
    'ddp', 'zero1', 'zero2', 'zero3' or 'fsdp'. seconds: spent training in all rounds so far. world: number of ranks.
    Digests are hex SHA-256.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = "mirl-dist-ticket-1"
    round: int
    alive: int
    prunable: int
    total: int
    threshold: float
    layer_density: dict[str, float]
    mask_digest: str
    initial_digest: str
    weights_digest: str
    parent: str | None
    fingerprint: str
    manifest_digest: str
    protocol: str
    scores: dict[str, Score]
    updates: int
    samples: int
    skipped: int = 0
    bad: int = 0
    damaged: dict[str, str] = {}
    method: str = ""
    seed: int | None = None
    began: int = 0
    collapsed: tuple[str, ...] = ()
    protocols: dict[str, str] = {}
    also: dict[str, dict[str, Score]] = {}
    measured: dict[str, str] = {}
    arithmetic: dict[str, str] = {}
    curve: Curve | None = None
    seconds: float
    world: int
    engine: str = ""
    versions: dict[str, str]

    @property
    def density(self) -> float:
        """Surviving share of the prunable weights."""
        return self.alive / self.prunable

    @property
    def sparsity(self) -> float:
        """Pruned share of the prunable weights."""
        return 1 - self.density

    @property
    def alive_total(self) -> int:
        """Surviving weights of the network, unprunable ones included: the parameter column of the papers."""
        return self.total - self.prunable + self.alive

    @property
    def total_sparsity(self) -> float:
        """Pruned share of all parameters."""
        return 1 - self.alive_total / self.total

    def digest(self) -> str:
        """Return the hex SHA-256 over all that the experiment determines: no time, world size, engine or versions."""
        absent = {name for name in _LATER if getattr(self, name) == type(self).model_fields[name].default}
        tree = self.model_dump(mode="json", exclude={"seconds", "world", "engine", "versions"} | absent)
        return digest_of_json(tree)

    def dump(self) -> bytes:
        """Serialise to canonical JSON, with the digest."""
        usual = {"arithmetic"} if not self.arithmetic else set[str]()  # the files of such runs stay as they were
        return to_json(self.model_dump(mode="json", exclude=usual) | {"digest": self.digest()})

    def row(self) -> dict[str, Any]:
        """Return the fields that `tickets list --json` prints."""
        computed = {
            "alive_total": self.alive_total,
            "sparsity": self.sparsity,
            "total_sparsity": self.total_sparsity,
            "digest": self.digest(),
            "best_step": self.best_steps(),
        }
        values = self.model_dump(mode="json") | computed
        return {name: values[name] for name in _ROW}

    def best_steps(self) -> dict[str, int]:
        """Return 'task/set' -> optimiser steps of this round up to the best (first, if tied) score of the curve."""
        if self.curve is None:
            return {}
        at = self.curve.steps
        return {
            name: at[max(range(len(at)), key=lambda i: (v[i], -i))] - self.began for name, v in self.curve.psnr.items()
        }


# Fields that older tickets lack: at their default value they are excluded from the digest, so that old digests hold.
_LATER = ("bad", "method", "seed", "began", "collapsed", "protocols", "also", "measured", "arithmetic", "curve")


_ROW = (
    *("round", "alive", "prunable", "total", "alive_total", "sparsity", "total_sparsity", "threshold"),
    *("mask_digest", "initial_digest", "weights_digest", "parent", "digest", "method", "seed", "collapsed", "protocol"),
    *("measured", "skipped", "bad", "damaged", "scores", "also", "best_step"),
)


def parse(data: bytes, source: str) -> Ticket:
    """Parse and validate a ticket that `dump` wrote. source: where it comes from, for messages.

    Raises UserError for data that is not a ticket, for impossible values (numbers out of range, text that could corrupt
    a terminal), and for a digest that does not match.
    """
    try:
        raw = json.loads(data, parse_constant=_reject_constant)
        claimed = raw.pop("digest", None) if isinstance(raw, dict) else None
        ticket = Ticket.model_validate(raw)
        strict_json.parse(json.dumps(_texts(ticket)).encode())
    except (ValueError, RecursionError) as error:
        record = (str(error).splitlines() or [""])[0]
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            record = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".encode("unicode_escape").decode()[:160]
        raise UserError(f"{source} is not a ticket ({record}). Take it from a run folder.") from None
    unprintable = _impossible_values(ticket)
    if unprintable:
        raise UserError(
            f"{source}: its record counts what cannot be: {unprintable}. Take it from the run folder again."
        )
    if claimed != ticket.digest():
        raise UserError(f"{source}: its content does not have the digest it states. Take it from the run folder again.")
    return ticket


def _reject_constant(word: str) -> float:
    """Reject NaN and infinity, which `json` accepts by default."""
    raise ValueError(f"{word}, a number that is not finite")


def _texts(ticket: Ticket) -> list[str]:
    """Return the texts of a ticket that tables, charts and messages display."""
    texts = [ticket.format, ticket.method, ticket.engine, ticket.protocol, ticket.parent or "", ticket.fingerprint]
    texts += [ticket.mask_digest, ticket.initial_digest, ticket.weights_digest, ticket.manifest_digest]
    texts += [*ticket.layer_density, *ticket.collapsed, *ticket.scores]
    texts += [name for scores in ticket.also.values() for name in scores]
    texts += [] if ticket.curve is None else ticket.curve.psnr
    trees: tuple[Mapping[str, str], ...] = (ticket.protocols, ticket.measured, ticket.arithmetic, ticket.versions)
    return texts + [*ticket.also] + [text for tree in trees for pair in tree.items() for text in pair]


def _impossible_values(ticket: Ticket) -> str:
    """Return the name of a field whose value no run could have produced, or ''."""
    if not (0 <= ticket.alive <= ticket.prunable <= ticket.total <= MOST_WEIGHTS and ticket.prunable):
        return "alive, prunable or total"
    for name in ("round", "updates", "samples", "skipped", "bad", "began", "world"):
        if not 0 <= getattr(ticket, name) < 2**63:
            return name
    if not (math.isfinite(ticket.threshold) and math.isfinite(ticket.seconds) and ticket.seconds >= 0):
        return "threshold or seconds"
    dense = [name for name, share in ticket.layer_density.items() if not 0 <= share <= 1]
    if dense:
        return f"the density of '{dense[0]}'"
    curve = ticket.curve
    if curve is not None and curve.psnr:
        ragged = {len(curve.steps), *map(len, curve.psnr.values())}
        if len(ragged) > 1 or 0 in ragged or any(not abs(v) <= 100 for vs in curve.psnr.values() for v in vs):
            return "the curve"
    return ""


def metrics(ticket: Ticket) -> dict[str, float]:
    """Return the numbers of a ticket as flat MLflow metrics.

    psnr/<task>/<set> by the headline protocol, psnr.<protocol>/<task>/<set> by the others, the same for ssim, the
    counts of surviving weights, sparsities and densities.
    """
    values: dict[str, float] = {
        "alive_weights": ticket.alive_total,
        "alive_prunable": ticket.alive,
        "sparsity": ticket.sparsity,
        "total_sparsity": ticket.total_sparsity,
        "threshold": ticket.threshold,
        "skipped_reads": ticket.skipped,
        "bad_batches": ticket.bad,
    }
    for protocol, scores in [("", ticket.scores), *((f".{name}", scores) for name, scores in ticket.also.items())]:
        for name, score in scores.items():
            values[f"psnr{protocol}/{name}"], values[f"ssim{protocol}/{name}"] = score.psnr, score.ssim
    values |= {f"best_step/{name}": step for name, step in ticket.best_steps().items()}
    if ticket.scores:
        values["psnr/mean"] = fmean(s.psnr for s in ticket.scores.values())
    return values | {f"weights/density/{name}": value for name, value in ticket.layer_density.items()}


def validation_score(ticket: Ticket, globs: tuple[str, ...]) -> float:
    """Return the mean of the scores that match any of the globs. Raises UserError if none does."""
    scores = metrics(ticket)
    scores.pop("psnr/mean", None)
    named: Mapping[str, float] = {n: v for n, v in scores.items() if n.startswith(("psnr/", "ssim/"))}
    chosen = [v for n, v in named.items() if any(fnmatchcase(n, g) for g in globs)]
    if not chosen:
        raise UserError(
            f"keep.by: {', '.join(globs)} names no score; there are {', '.join(sorted(named))}. Correct keep.by.",
            everywhere=True,
        )
    return fmean(chosen)
