"""Where the ranks stand: meetings are numbered, and who has not come to one is named."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_NAMED = 4


class RankState(NamedTuple):
    """Where a rank is. number: of the meeting that it is in, or was in last; seconds: in it, or since it left it."""

    sequence: int
    name: str
    waiting: bool
    phase: str
    seconds: float
    location: str
    beat: int


class FlightRecorder:
    """Where the main thread is. It replaces a few words; another thread may read them at any time."""

    def __init__(self) -> None:
        self.phase = "starting"
        self._thread = threading.get_ident()
        self._now: tuple[int, str, float, Callable[[], bool] | None] = (0, "", time.monotonic(), lambda: True)

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """What messages call the work inside; the phase around it returns afterwards."""
        before, self.phase = self.phase, name
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Around a wait for all ranks."""
        self.begin(what)
        try:
            yield
        finally:
            self.end()

    def begin(self, what: str) -> None:
        self._now = (self._now[0] + 1, what, time.monotonic(), None)

    def end(self, over: Callable[[], bool] = lambda: True) -> None:
        """over: for a meeting that a GPU may still be in when the main thread goes on; called by other threads."""
        number, what, since, _ = self._now
        self._now = (number, what, time.monotonic() if over() else since, over)

    def state(self, beat: int = 0) -> RankState:
        number, what, since, over = self._now
        waiting = over is None or not over()
        return RankState(number, what, waiting, self.phase, time.monotonic() - since, self._where(), beat)

    def _where(self) -> str:
        """The main thread's place in this package, and inside what that called: 'train.py:9 run, in conv.py:1 f'."""
        frame: Any = sys._current_frames().get(self._thread)
        innermost = frame
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] != "mirl_dist":
            frame = frame.f_back
        places = [_place(f) for f in (frame, innermost) if f is not None]
        return ", in ".join(dict.fromkeys(places))


def _place(frame: Any) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def diagnose(mine: RankState, others: Mapping[int, RankState], silent: Collection[int], names: Sequence[str]) -> str:
    """Who has not come to the meeting that this rank waits in. silent: ranks whose process gives no sign of life."""
    behind = {r: o for r, o in others.items() if r in silent or o.sequence < mine.sequence}
    if any(r in silent or not o.waiting for r, o in behind.items()):
        # Who waits in an earlier meeting waits for the same ones.
        behind = {r: o for r, o in behind.items() if r in silent or not o.waiting}
    said = [f"{names[r]} has not come: {_about(o, r in silent)}" for r, o in behind.items()]
    for rank, other in others.items():
        if other.sequence == mine.sequence and other.name != mine.name:
            said.append(f"{names[rank]} calls this meeting {other.name}: a fault of this program, please report it")
    if len(said) > _NAMED:
        said[_NAMED:] = [f"and {len(said) - _NAMED} more ranks have not come"]
    return f"{waited(mine)}; {'; '.join(said) or 'all have come to it: the network between them, or a GPU, is stuck'}"


def _about(other: RankState, silent: bool) -> str:
    met = f"{'in' if other.waiting else 'after'} meeting {other.sequence}"
    if silent:
        gone = "its process does not answer any more: it is stopped, swapped out, or its node is gone"
        return f"{gone} (last heard of in {other.phase}, {met})"
    waits = "waits" if other.waiting else "is"
    return f"it {waits} in {other.phase}, {met}, at {other.location}, for {other.seconds:.0f} s"


def waited(mine: RankState) -> str:
    """The beginning of what a rank says that waits for too long."""
    what = mine.name.removeprefix("the ").removeprefix("a ")
    return f"waited {mine.seconds:.0f} s in {mine.phase} for the {what} (meeting {mine.sequence})"
