"""The record of one round: what was alive, what it scored, and whose child it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mirl_dist.faults import Fault

DENSE = "dense"
"""The method of a round 0 of all weights."""


class Score(BaseModel):
    """Mean quality of one task on one set. psnr in dB, ssim in [-1, 1]; degraded_*: of the input itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    psnr: float
    ssim: float
    degraded_psnr: float
    degraded_ssim: float
    images: int


class Curve(BaseModel):
    """Scores within a round, on the first images of each task and set: steps, and PSNR in dB at each by 'task/set'."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[int, ...] = ()
    psnr: dict[str, tuple[float, ...]] = {}


class Ticket(BaseModel):
    """Ticket r: initial weights, mask of round r, the weights that round r trained (by digest), scores, parent.

    alive, prunable, total: weights, counted by masks. density = alive / prunable and total_density = (alive +
    total - prunable) / total, in (0, 1]; sparsities are 1 minus these. threshold: the largest magnitude removed to
    make this mask (0 in round 0). skipped: reads of the round in which another sample stood in for a damaged one;
    damaged: 'shard' or 'shard key' -> what was wrong; bad: global batches that were left out since their loss or
    gradient was not finite. scores: 'task/set' -> Score by the headline protocol, whose text `protocol` is; also:
    protocol -> 'task/set' -> Score for every other one; protocols: name -> text of all. measured: how
    images were restored for scoring ('precision', 'compile', 'tile'). method: the papers' word (config.method);
    began: the optimiser step that the round's training began at (more than 0 where it was rewound to that step).
    collapsed: prunable tensors without any alive weight. Digests are hex SHA-256.
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
    curve: Curve | None = None
    seconds: float
    world: int
    versions: dict[str, str]

    @property
    def density(self) -> float:
        return self.alive / self.prunable

    @property
    def sparsity(self) -> float:
        """Over the prunable weights."""
        return 1 - self.density

    @property
    def alive_total(self) -> int:
        """Weights of the network that are not pruned, unprunable ones included: the papers' parameter column."""
        return self.total - self.prunable + self.alive

    @property
    def total_sparsity(self) -> float:
        """Over all parameters."""
        return 1 - self.alive_total / self.total

    def digest(self) -> str:
        """Hex SHA-256 over all that the experiment determines: not time, ranks or versions."""
        absent = {name for name in _LATER if getattr(self, name) == type(self).model_fields[name].default}
        told = self.model_dump(mode="json", exclude={"seconds", "world", "versions"} | absent)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def dump(self) -> bytes:
        return (
            json.dumps(self.model_dump(mode="json") | {"digest": self.digest()}, indent=1, sort_keys=True) + "\n"
        ).encode()

    def row(self) -> dict[str, Any]:
        """What `tickets list --json` prints of it."""
        return {
            "round": self.round,
            "alive": self.alive,
            "prunable": self.prunable,
            "total": self.total,
            "alive_total": self.alive_total,
            "sparsity": self.sparsity,
            "total_sparsity": self.total_sparsity,
            "threshold": self.threshold,
            "mask_digest": self.mask_digest,
            "initial_digest": self.initial_digest,
            "weights_digest": self.weights_digest,
            "parent": self.parent,
            "digest": self.digest(),
            "method": self.method,
            "seed": self.seed,
            "collapsed": list(self.collapsed),
            "protocol": self.protocol,
            "measured": self.measured,
            "skipped": self.skipped,
            "bad": self.bad,
            "damaged": self.damaged,
            "scores": {name: score.model_dump() for name, score in self.scores.items()},
            "also": {p: {name: score.model_dump() for name, score in s.items()} for p, s in self.also.items()},
            "best_step": self.best_steps(),
        }

    def best_steps(self) -> dict[str, int]:
        """'task/set' -> the optimiser steps of this round's training up to the best score on its curve."""
        if self.curve is None:
            return {}
        at = self.curve.steps
        return {
            name: at[max(range(len(at)), key=lambda i: (v[i], -i))] - self.began for name, v in self.curve.psnr.items()
        }


# Fields that older tickets lack: at their default they are no part of the digest.
_LATER = ("bad", "method", "seed", "began", "collapsed", "protocols", "also", "measured", "curve")


def parse(data: bytes, where: str) -> Ticket:
    """The ticket that `dump` wrote. Raises Fault for a file that is none, or whose digest does not fit its content."""
    try:
        raw = json.loads(data)
        claimed = raw.pop("digest", None) if isinstance(raw, dict) else None
        ticket = Ticket.model_validate(raw)
    except (ValueError, RecursionError, ValidationError) as error:
        raise Fault(f"{where} is not a ticket ({str(error).splitlines()[0]}). Take it from a run folder.") from None
    if claimed != ticket.digest():
        raise Fault(f"{where}: its content does not have the digest it states. Take it from the run folder again.")
    return ticket


def metrics(ticket: Ticket) -> dict[str, float]:
    """Flat named numbers for comparison: psnr/<task>/<set> by the headline protocol, psnr.<protocol>/<task>/<set> by
    others, the same for ssim, alive weights, densities."""
    found: dict[str, float] = {
        "alive_weights": ticket.alive_total,
        "alive_prunable": ticket.alive,
        "sparsity": ticket.sparsity,
        "total_sparsity": ticket.total_sparsity,
        "threshold": ticket.threshold,
        "skipped_reads": ticket.skipped,
        "bad_batches": ticket.bad,
    }
    for name, score in ticket.scores.items():
        found[f"psnr/{name}"], found[f"ssim/{name}"] = score.psnr, score.ssim
    for protocol, scores in ticket.also.items():
        for name, score in scores.items():
            found[f"psnr.{protocol}/{name}"], found[f"ssim.{protocol}/{name}"] = score.psnr, score.ssim
    found |= {f"best_step/{name}": step for name, step in ticket.best_steps().items()}
    if ticket.scores:
        found["psnr/mean"] = fmean(s.psnr for s in ticket.scores.values())
    return found | {f"weights/density/{name}": value for name, value in ticket.layer_density.items()}


def validation_score(ticket: Ticket, globs: tuple[str, ...]) -> float:
    """The mean of the scores that the globs name. Raises Fault when they name none."""
    from fnmatch import fnmatchcase

    found = metrics(ticket)
    found.pop("psnr/mean", None)
    named: Mapping[str, float] = {n: v for n, v in found.items() if n.startswith(("psnr/", "ssim/"))}
    chosen = [v for n, v in named.items() if any(fnmatchcase(n, g) for g in globs)]
    if not chosen:
        raise Fault(
            f"keep.by: {', '.join(globs)} names no score; there are {', '.join(sorted(named))}. Correct keep.by.",
            everywhere=True,
        )
    return fmean(chosen)
