"""The states that the runs of a sweep pass through, and the exit code that they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from mirl_dist.cli.sweep.spec import SweepRun
from mirl_dist.distributed.signals import RESUMABLE

State: TypeAlias = Literal["waiting", "running", "stopped", "failed", "finished"]


class RunStatus(NamedTuple):
    """The progress of a run. round, of rounds: in which it is, or that of its last ticket; step, of steps: of a round
    that is trained now. sparsity over all parameters and psnr, in dB, mean over tasks: of the last ticket. who: the
    launch that holds it; sign: changes as long as that launch lives."""

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
        """State, round, step, sparsity and PSNR in words."""
        step = "" if self.step is None else f"{self.step}/{self.steps or '?'}"
        return [
            self.state,
            "" if self.round is None else f"{self.round}/{self.rounds}",
            step,
            "" if self.sparsity is None else f"{self.sparsity:.1%}",
            "" if self.psnr is None else f"{self.psnr:.2f}",
        ]

    def row(self, run: SweepRun) -> dict[str, object]:
        """The same for programs."""
        fields = self._asdict()
        del fields["sign"]
        return {"run": run.folder, "method": run.method, "seed": run.seed, **fields, "who": self.who or None}


def state_of(*, launched: bool, ended: str | None, exited: bool, complete: bool) -> State:
    """Derive the state of a run. launched: any launch ever held it; ended: how the last one said that it ended; exited:
    its process is known to have exited; complete: the last round that the config asks for has a ticket."""
    if not launched:
        return "finished" if complete else "waiting"
    if ended is None:
        return "failed" if exited else "running"
    if ended == "finished":
        return "finished" if complete else "stopped"  # more rounds are asked for now
    return "failed" if ended in ("failed", "dead") else "stopped"


def exit_code(states: Sequence[State], asked: bool) -> int:
    """How a sweep ends: 75 when it was asked to stop and has not finished, 1 when a run failed, 75 when one stopped."""
    if all(state == "finished" for state in states):
        return 0
    return RESUMABLE if asked or "failed" not in states else 1
