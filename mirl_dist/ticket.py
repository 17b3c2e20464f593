"""The record of one round: what was alive, what it scored, and whose child it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mirl_dist.faults import Fault


class Score(BaseModel):
    """Mean quality of one task on one set. psnr in dB, ssim in [-1, 1]; degraded_*: of the input itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    psnr: float
    ssim: float
    degraded_psnr: float
    degraded_ssim: float
    images: int


class Ticket(BaseModel):
    """Ticket r: initial weights, mask of round r, the weights that round r trained (by digest), scores, parent.

    alive, prunable, total: weights, counted by masks. density = alive / prunable and total_density = (alive +
    total - prunable) / total, in (0, 1]; sparsities are 1 minus these. threshold: the largest magnitude removed to
    make this mask (0 in round 0). skipped: reads of the round in which another sample stood in for a damaged one;
    damaged: 'shard' or 'shard key' -> what was wrong; bad: global batches that were left out since their loss or
    gradient was not finite. scores: 'task/set' -> Score. Digests are hex SHA-256.
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
        told = self.model_dump(exclude={"seconds", "world", "versions"} | (set() if self.bad else {"bad"}))
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def dump(self) -> bytes:
        return (json.dumps(self.model_dump() | {"digest": self.digest()}, indent=1, sort_keys=True) + "\n").encode()

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
            "protocol": self.protocol,
            "skipped": self.skipped,
            "bad": self.bad,
            "damaged": self.damaged,
            "scores": {name: score.model_dump() for name, score in self.scores.items()},
        }


def parse(data: bytes, where: str) -> Ticket:
    """The ticket that `dump` wrote. Raises Fault for a file that is none, or whose digest does not fit its content."""
    try:
        raw = json.loads(data)
        claimed = raw.pop("digest", None) if isinstance(raw, dict) else None
        ticket = Ticket.model_validate(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise Fault(f"{where} is not a ticket ({str(error).splitlines()[0]}). Take it from a run folder.") from None
    if claimed != ticket.digest():
        raise Fault(f"{where}: its content does not have the digest it states. Take it from the run folder again.")
    return ticket


def metrics(ticket: Ticket) -> dict[str, float]:
    """Flat named numbers for comparison: psnr/<task>/<set>, ssim/..., alive weights, densities."""
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
