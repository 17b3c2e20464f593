"""The status of a sweep's runs, read from their stores: a live table on a terminal, lines of text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mirl_dist.cli.sweep.spec import SweepPlan, SweepRun
from mirl_dist.cli.sweep.states import RunStatus, State, state_of
from mirl_dist.errors import UserError
from mirl_dist.observability.progress import say
from mirl_dist.storage import lease, open_store
from mirl_dist.storage.configured import options_of
from mirl_dist.training.checkpoint import Checkpoints
from mirl_dist.training.ticket import metrics

_READ_SECONDS = 2.0
_PATIENCE_SECONDS = 5.0  # short, because it blocks the scheduler


def read_status(run: SweepRun) -> RunStatus:
    """Read the status of a run from its store. Raises UserError if it cannot be read."""
    options = options_of(run.config.store)
    patience_seconds = min(options.patience_seconds, _PATIENCE_SECONDS)
    store = open_store(run.folder, replace(options, patience_seconds=patience_seconds))
    checkpoints, holder = Checkpoints(store), lease.read_holder(store)
    rounds = [commit.round_ for commit in checkpoints.commits() if commit.step is None]
    ticket = checkpoints.ticket(max(rounds)) if rounds else None
    last_status: dict[str, Any] = (
        {} if holder is None else {k: v for k, v in holder.status.items() if isinstance(v, int)}
    )
    state = state_of(
        launched=holder is not None,
        ended=None if holder is None else holder.ended,
        exited=holder is not None and holder.has_exited(),
        complete=ticket is not None and run.config.prune.ends_after(ticket.round, ticket.total_sparsity),
    )
    return RunStatus(
        state,
        run.config.prune.rounds,
        max([last_status.get("round", 0), *rounds]) if rounds or "round" in last_status else None,
        last_status.get("step") if state == "running" else None,
        last_status.get("steps") if state == "running" else None,
        None if ticket is None else ticket.total_sparsity,
        None if ticket is None else metrics(ticket).get("psnr/mean"),
        str(holder) if holder is not None and state == "running" else "",
        b"" if holder is None else holder.beat,
    )


def make_table(plan: SweepPlan, statuses: dict[str, RunStatus]) -> Table:
    """Return a table with a row per run: state, round, step, and sparsity and PSNR (mean over tasks, in dB)."""
    table = Table(title=Text(f"sweep {plan.name}", style="table.title"))  # Text: do not parse names as markup
    for column in ("method", "seed", "state", "round", "step", "sparsity", "PSNR"):
        table.add_column(column, justify="left" if column in ("method", "state") else "right")
    for run in plan.runs:
        table.add_row(Text(run.method), str(run.seed), *statuses[run.name].cells())
    return table


class StatusTable:
    """Displays the progress of a sweep. statuses: run name -> status."""

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self.statuses = {run.name: read_status(run) for run in plan.runs}
        self._runs = {run.name: run for run in plan.runs}
        self._read_at = time.monotonic()
        console = Console(stderr=True)
        self._live = (
            Live(console=console, get_renderable=lambda: make_table(plan, self.statuses), refresh_per_second=2)
            if console.is_terminal
            else None
        )

    def set_state(self, run: SweepRun, state: State, why: str = "") -> None:
        """Record the new state of a run, and print it. why: a reason, printed with it."""
        self.statuses[run.name] = self.statuses[run.name]._replace(state=state, step=None, steps=None)
        if self._live is None or state == "failed":
            say(f"{run.name}: {state}{f' ({why})' if why else ''}")

    def refresh(self, own_runs: Collection[str]) -> None:
        """Update the status of running runs, at most every few seconds. own_runs: runs whose processes are alive."""
        if time.monotonic() - self._read_at < _READ_SECONDS:
            return
        for name, status in self.statuses.items():
            if status.state == "running":
                current = self.read(self._runs[name])
                self.statuses[name] = current._replace(state="running") if name in own_runs else current
        self._read_at = time.monotonic()

    def read(self, run: SweepRun) -> RunStatus:
        """Return the status of a run, or the last known one if it cannot be read."""
        try:
            return read_status(run)
        except UserError:  # the store is unavailable, or a commit was removed while being read
            return self.statuses[run.name]

    def __enter__(self) -> StatusTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
