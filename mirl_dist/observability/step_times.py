"""Measures where the time of training steps goes: seconds of the training thread per phase of the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

from mirl_dist.observability.console import note
from mirl_dist.observability.progress import say


class Phase(str, Enum):
    """The phases of a training step, in their order.

    REDUCE: waiting for the all-reduce after the last gradient is computed, if that is measured (`PhaseClock.mark`);
    else part of BACKWARD. LOSS_SUM: the sum of losses, norm and flags over ranks, in which ranks wait for each other.
    WAIT: the host waits until the device has computed that sum, on a GPU thus for the step.
    """

    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCE = "reduce"
    MASKS = "masks, clip"
    LOSS_SUM = "loss sum"
    OPTIMISER = "optimiser"
    WAIT = "wait"
    COMMIT = "commit"
    TRACKING = "tracking"


_GROUPS = {
    "data": (Phase.DATA,),
    "forward + backward": (Phase.FORWARD, Phase.BACKWARD),
    "reduce + optimiser": (Phase.REDUCE, Phase.MASKS, Phase.LOSS_SUM, Phase.OPTIMISER),
    "wait": (Phase.WAIT,),
    "commit": (Phase.COMMIT,),
    "tracking": (Phase.TRACKING,),
}


class Times(NamedTuple):
    """Seconds by phase, the seconds that passed, and the samples that all ranks trained on meanwhile."""

    phases: dict[Phase, float]
    total: float
    samples: int

    def plus(self, other: Times) -> Times:
        """Return the sum of both."""
        phases = {phase: self.phases.get(phase, 0.0) + other.phases.get(phase, 0.0) for phase in Phase}
        return Times(phases, self.total + other.total, self.samples + other.samples)

    def percent(self) -> dict[str, float]:
        """Return groups of phases -> percent of the time, with 'other' for what no phase covers."""
        total = max(self.total, 1e-9)
        shares = {
            group: 100 * sum(self.phases.get(phase, 0.0) for phase in phases) / total
            for group, phases in _GROUPS.items()
        }
        return shares | {"other": max(0.0, 100 - sum(shares.values()))}

    def line(self) -> str:
        """Return the speed and the percentages in one line."""
        shares = ", ".join(f"{group} {percent:.1f} %" for group, percent in self.percent().items())
        return f"{self.samples / max(self.total, 1e-9):.3g} samples/s; {shares}"


class PhaseClock:
    """Stopwatch of the training thread. On a GPU a phase lasts until its work is queued, not until it is done.

    synchronise: called at both ends of each phase if not None; with torch.cuda.synchronize a phase includes its work on
    the GPU, which slows the step down. samples: trained on by all ranks since `take`; the loop counts them.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.synchronise: Callable[[], object] | None = None
        self.samples = 0
        self._clock = clock
        self._mark: tuple[Phase, float] | None = None
        self.begin_round()

    def begin_round(self) -> None:
        """Start to measure a round."""
        self._phases: dict[Phase, float] = {}
        self._began, self.samples = self._now(), 0
        self.round = Times({}, 0.0, 0)

    def _now(self) -> float:
        if self.synchronise is not None:
            self.synchronise()
        return self._clock()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Add the time inside the context to the phase. Phases do not nest."""
        began, self._mark = self._now(), None
        try:
            yield
        finally:
            ended = self._now()
            rest, since = self._mark or (phase, ended)
            for name, seconds in ((phase, since - began), (rest, ended - since)):
                self._phases[name] = self._phases.get(name, 0.0) + seconds

    def mark(self, rest: Phase) -> None:
        """Count the remaining time of the current phase as phase `rest`. May be called in a thread of autograd."""
        self._mark = (rest, self._now())

    def exclude(self, seconds: float) -> None:
        """Leave time that has just passed, such as a validation, out of the total."""
        self._began += seconds

    def take(self) -> Times:
        """Return the times since the last call or the beginning of the round, and add them to the round's."""
        now = self._now()
        times = Times(self._phases, now - self._began, self.samples)
        self._phases, self._began, self.samples = {}, now, 0
        self.round = self.round.plus(times)
        return times


def report_epoch(clock: PhaseClock, round_: int, epoch: int) -> dict[str, float]:
    """Note in this rank's log where its time went in the epoch that ends here; return percentages as MLflow metrics.

    A commit at the end of an epoch counts in the next one.
    """
    times = clock.take()
    note(f"epoch {epoch} of round {round_}: {times.line()}")
    return {f"time/{group.replace(' + ', '_')}": percent for group, percent in times.percent().items()}


def print_round(clock: PhaseClock, round_: int) -> None:
    """Print where this rank's time went in the round, or in the part of it that this process trained."""
    clock.take()
    if clock.round.samples:
        say(f"round {round_}: {clock.round.line()}")
