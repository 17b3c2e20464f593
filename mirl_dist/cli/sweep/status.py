"""The status of a sweep's runs, read from their stores."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

from rich.table import Table
from rich.text import Text

from mirl_dist.cli.sweep.spec import SweepPlan, SweepRun
from mirl_dist.storage import lease, open_store
from mirl_dist.storage.configured import options_of
from mirl_dist.storage.lease_files import Holder
from mirl_dist.training.checkpointing.checkpoint import Checkpoints
from mirl_dist.training.ticket import metrics

State: TypeAlias = Literal["waiting", "running", "stopped", "failed", "finished"]
_PATIENCE_SECONDS = 5.0  # short, because it blocks the scheduler


class RunStatus(NamedTuple):
    """The progress of a run.

    round (of rounds): current, or that of the last ticket. step (of steps): in a round being trained. sparsity: over
    all parameters, of the last ticket. psnr: in dB, mean over tasks, of the last ticket. who: the launch that holds the
    run. sign: its heartbeat, which changes while it is alive.
    """

    state: State = "waiting"
    rounds: int = 0
    round: int | None = None
    step: int | None = None
    steps: int | None = None
    sparsity: float | None = None
    psnr: float | None = None
    who: str = ""
    sign: bytes = b""

    def cells(self) -> list[str]:
        """Return state, round, step, sparsity and PSNR as table cells."""
        return [
            self.state,
            "" if self.round is None else f"{self.round}/{self.rounds}",
            "" if self.step is None else f"{self.step}/{self.steps or '?'}",
            "" if self.sparsity is None else f"{self.sparsity:.1%}",
            "" if self.psnr is None else f"{self.psnr:.2f}",
        ]

    def row(self, run: SweepRun) -> dict[str, object]:
        """Return the run and its progress for JSON output."""
        fields = self._asdict()
        del fields["sign"]
        return {"run": run.folder, "method": run.method, "seed": run.seed, **fields, "who": self.who or None}


def state_of(holder: Holder | None, complete: bool) -> State:
    """Derive the state of a run. holder: the last launch. complete: the last round of the config has a ticket."""
    if holder is None:
        return "finished" if complete else "waiting"
    if holder.ended is None:
        return "failed" if holder.has_exited() else "running"
    if holder.ended == "finished":
        return "finished" if complete else "stopped"  # the config now has more rounds
    return "failed" if holder.ended in ("failed", "dead") else "stopped"


def read_status(run: SweepRun) -> RunStatus:
    """Read the status of a run from its store. Raises UserError if it cannot be read."""
    options = options_of(run.config.store)
    patience_seconds = min(options.patience_seconds, _PATIENCE_SECONDS)
    store = open_store(run.folder, replace(options, patience_seconds=patience_seconds))
    checkpoints, holder = Checkpoints(store), lease.read_holder(store)
    rounds = [commit.round_ for commit in checkpoints.commits() if commit.step is None]
    ticket = checkpoints.ticket(max(rounds)) if rounds else None
    reported = {} if holder is None else {k: v for k, v in holder.status.items() if isinstance(v, int)}
    status = RunStatus(
        state_of(holder, ticket is not None and run.config.prune.ends_after(ticket.round, ticket.total_sparsity)),
        run.config.prune.rounds,
        max([reported.get("round", 0), *rounds]) if rounds or "round" in reported else None,
        sparsity=None if ticket is None else ticket.total_sparsity,
        psnr=None if ticket is None else metrics(ticket).get("psnr/mean"),
        sign=b"" if holder is None else holder.beat,
    )
    if status.state != "running":
        return status
    return status._replace(step=reported.get("step"), steps=reported.get("steps"), who=str(holder))


def make_table(plan: SweepPlan, statuses: dict[str, RunStatus]) -> Table:
    """Return a table with a row per run: state, round, step, and sparsity and PSNR (mean over tasks, in dB)."""
    table = Table(title=Text(f"sweep {plan.name}", style="table.title"))  # Text: do not parse names as markup
    for column in ("method", "seed", "state", "round", "step", "sparsity", "PSNR"):
        table.add_column(column, justify="left" if column in ("method", "state") else "right")
    for run in plan.runs:
        table.add_row(Text(run.method), str(run.seed), *statuses[run.name].cells())
    return table
