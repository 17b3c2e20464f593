"""Records which collective a rank is in. Collectives are numbered, so that ranks missing from one can be named."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_MOST_NAMED = 4


class RankState(NamedTuple):
    """Snapshot of a rank's progress.

    sequence, name: number and name of the current collective, or of the last one. waiting: whether the rank is still in
    it. seconds: time in the collective, or since leaving it. location: source line in this package. beat: grows as long
    as the process runs.
    """

    sequence: int
    name: str
    waiting: bool
    phase: str
    seconds: float
    location: str
    beat: int


class FlightRecorder:
    """Record of the main thread's position. Values are replaced as a whole, so any thread may read them at any time."""

    def __init__(self) -> None:
        self.phase = "starting"
        self._thread = threading.get_ident()
        self._current: tuple[int, str, float, Callable[[], bool] | None] = (0, "", time.monotonic(), lambda: True)

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """Set the phase shown in messages; restore the enclosing phase on exit."""
        before, self.phase = self.phase, name
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Record the collective that runs in this context."""
        self.begin(what)
        try:
            yield
        finally:
            self.end()

    def begin(self, what: str) -> None:
        """Record that the main thread enters the collective `what`."""
        self._current = (self._current[0] + 1, what, time.monotonic(), None)

    def end(self, is_done: Callable[[], bool] = lambda: True) -> None:
        """Record that the main thread leaves the collective.

        is_done: returns whether the GPU has finished the collective too; called from other threads.
        """
        sequence, what, since, _ = self._current
        self._current = (sequence, what, time.monotonic() if is_done() else since, is_done)

    def state(self, beat: int = 0) -> RankState:
        """Return the main thread's current state. beat: counter that other ranks compare between reads."""
        sequence, what, since, is_done = self._current
        waiting = is_done is None or not is_done()
        return RankState(sequence, what, waiting, self.phase, time.monotonic() - since, self._location(), beat)

    def _location(self) -> str:
        """Return the main thread's innermost frame in this package and overall: 'loop.py:9 run, in conv.py:1 f'."""
        frame: Any = sys._current_frames().get(self._thread)
        innermost = frame
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] != "mirl_dist":
            frame = frame.f_back
        locations = [_frame_location(f) for f in (frame, innermost) if f is not None]
        return ", in ".join(dict.fromkeys(locations))


def _frame_location(frame: Any) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def diagnose(own: RankState, others: Mapping[int, RankState], silent: Collection[int], names: Sequence[str]) -> str:
    """Return a message that names the ranks that have not reached the collective in which this rank waits.

    others: states by rank; silent: ranks whose process no longer updates its state; names: one per rank.
    """
    behind = {r: o for r, o in others.items() if r in silent or o.sequence < own.sequence}
    if any(r in silent or not o.waiting for r, o in behind.items()):
        # Ranks waiting in an earlier collective are blocked too: name only the ranks that block them.
        behind = {r: o for r, o in behind.items() if r in silent or not o.waiting}
    causes = [f"{names[r]} has not arrived: {_describe_state(o, r in silent)}" for r, o in behind.items()]
    for rank, other in others.items():
        if other.sequence == own.sequence and other.name != own.name:
            causes.append(
                f"{names[rank]} calls this collective {other.name}: a fault of this program, please report it"
            )
    if len(causes) > _MOST_NAMED:
        causes[_MOST_NAMED:] = [f"and {len(causes) - _MOST_NAMED} more ranks have not arrived"]
    stuck = "all have reached it: the network between them, or a GPU, is stuck"
    return f"{describe_wait(own)}; {'; '.join(causes) or stuck}"


def _describe_state(other: RankState, silent: bool) -> str:
    last = f"{'in' if other.waiting else 'after'} collective {other.sequence}"
    if silent:
        gone = "its process no longer responds: it is stopped, swapped out, or its node is down"
        return f"{gone} (last seen in {other.phase}, {last})"
    waits = "waits" if other.waiting else "is"
    return f"it {waits} in {other.phase}, {last}, at {other.location}, for {other.seconds:.0f} s"


def describe_wait(own: RankState) -> str:
    """Return the first part of the message about a rank that has waited too long."""
    what = own.name.removeprefix("the ").removeprefix("a ")
    return f"waited {own.seconds:.0f} s in {own.phase} for the {what} (collective {own.sequence})"
