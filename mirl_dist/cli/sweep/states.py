"""The states of a sweep's runs, and the exit code that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from mirl_dist.cli.sweep.spec import SweepRun
from mirl_dist.distributed.signals import RESUMABLE

State: TypeAlias = Literal["waiting", "running", "stopped", "failed", "finished"]


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
        step = "" if self.step is None else f"{self.step}/{self.steps or '?'}"
        return [
            self.state,
            "" if self.round is None else f"{self.round}/{self.rounds}",
            step,
            "" if self.sparsity is None else f"{self.sparsity:.1%}",
            "" if self.psnr is None else f"{self.psnr:.2f}",
        ]

    def row(self, run: SweepRun) -> dict[str, object]:
        """Return the run and its progress for JSON output."""
        fields = self._asdict()
        del fields["sign"]
        return {"run": run.folder, "method": run.method, "seed": run.seed, **fields, "who": self.who or None}


def state_of(*, launched: bool, ended: str | None, exited: bool, complete: bool) -> State:
    """Derive the state of a run.

    launched: any launch ever held it. ended: outcome that the last launch reported, if any. exited: the last launch's
    process is known to have exited. complete: the last round of the config has a ticket.
    """
    if not launched:
        return "finished" if complete else "waiting"
    if ended is None:
        return "failed" if exited else "running"
    if ended == "finished":
        return "finished" if complete else "stopped"  # the config now has more rounds
    return "failed" if ended in ("failed", "dead") else "stopped"


def exit_code(states: Sequence[State], asked: bool) -> int:
    """Return a sweep's exit code: 0 if all runs finished, else 75 if a stop was requested or no run failed, else 1.

    asked: a stop was requested.
    """
    if all(state == "finished" for state in states):
        return 0
    return RESUMABLE if asked or "failed" not in states else 1
