"""Where the runs of a sweep stand: asked of their stores, in a table that lives on a terminal, in lines without one."""

from __future__ import annotations

import time
from collections.abc import Collection
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mirl_dist.cli.sweep.spec import RunStatus, State, SweepPlan, SweepRun, state_of
from mirl_dist.errors import UserError
from mirl_dist.observability.progress import say
from mirl_dist.storage import lease, open_store
from mirl_dist.storage.configured import options_of
from mirl_dist.training.checkpoint import Checkpoints
from mirl_dist.training.ticket import Ticket, metrics

_LOOK_SECONDS = 2.0
_PATIENCE_SECONDS = 5.0  # the queue waits meanwhile


def look(run: SweepRun) -> RunStatus:
    """Where a run stands, as its store says. Raises UserError where that cannot be told."""
    options = options_of(run.config.store)
    patience = min(options.patience_seconds, _PATIENCE_SECONDS)
    store = open_store(run.folder, type(options)(options.endpoint, options.encryption, options.kms_key, patience))
    checkpoints, found = Checkpoints(store), lease.read_holder(store)
    rounds = [commit.round_ for commit in checkpoints.commits() if commit.step is None]
    ticket = checkpoints.ticket(max(rounds)) if rounds else None
    news: dict[str, Any] = {} if found is None else {k: v for k, v in found.status.items() if isinstance(v, int)}
    state = state_of(
        held=found is not None,
        ended=None if found is None else found.ended,
        gone=found is not None and found.has_exited(),
        complete=ticket is not None and _complete(run, ticket),
    )
    return RunStatus(
        state,
        run.config.prune.rounds,
        max([news.get("round", 0), *rounds]) if rounds or "round" in news else None,
        news.get("step") if state == "running" else None,
        news.get("steps") if state == "running" else None,
        None if ticket is None else ticket.total_sparsity,
        None if ticket is None else metrics(ticket).get("psnr/mean"),
        str(found) if found is not None and state == "running" else "",
        b"" if found is None else found.beat,
    )


def _complete(run: SweepRun, ticket: Ticket) -> bool:
    """Whether no round follows this ticket's."""
    target = run.config.prune.target_sparsity
    return ticket.round >= run.config.prune.rounds or (target is not None and ticket.total_sparsity >= target)


def table(plan: SweepPlan, stands: dict[str, RunStatus]) -> Table:
    """One row per run; round, step, sparsity and PSNR (mean over tasks, in dB) of the last ticket."""
    made = Table(title=Text(f"sweep {plan.name}", style="table.title"))  # Text: names are no markup
    for column in ("method", "seed", "state", "round", "step", "sparsity", "PSNR"):
        made.add_column(column, justify="left" if column in ("method", "state") else "right")
    for run in plan.runs:
        made.add_row(Text(run.method), str(run.seed), *stands[run.name].cells())
    return made


class StatusTable:
    """What a person sees of a sweep that runs. stands: of each run by name."""

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self.stands = {run.name: look(run) for run in plan.runs}
        self._runs = {run.name: run for run in plan.runs}
        self._looked = time.monotonic()
        console = Console(stderr=True)
        self._live = (
            Live(console=console, get_renderable=lambda: table(plan, self.stands), refresh_per_second=2)
            if console.is_terminal
            else None
        )

    def put(self, run: SweepRun, state: State, why: str = "") -> None:
        """A run's state has changed; why: said beside it."""
        self.stands[run.name] = self.stands[run.name]._replace(state=state, step=None, steps=None)
        if self._live is None or state == "failed":
            say(f"{run.name}: {state}{f' ({why})' if why else ''}")

    def refresh(self, mine: Collection[str]) -> None:
        """Look, every few seconds, at the runs that are trained. mine: those whose processes are known to run."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        for name, stand in self.stands.items():
            if stand.state == "running":
                found = self.look(self._runs[name])
                self.stands[name] = found._replace(state="running") if name in mine else found
        self._looked = time.monotonic()

    def look(self, run: SweepRun) -> RunStatus:
        """Where a run stands, or stood when that was last told."""
        try:
            return look(run)
        except UserError:  # away, or a commit that went while it was read
            return self.stands[run.name]

    def __enter__(self) -> StatusTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
