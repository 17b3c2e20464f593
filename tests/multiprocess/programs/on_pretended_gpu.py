"""`on_pretended_gpu.py REPORT ARGUMENTS`: mirl-dist with a pretended GPU, of tests/services/pretend_cuda.py.

Writes to REPORT as JSON: steps, where the host waited for the device in each step of training, [round, updates, {place:
times}]; phases, how often in each phase; not_deterministic, operations without a deterministic kernel.
PRETEND_STOP: '[round, updates]', SIGTERM to itself before that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirl_dist.cli import app
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.training import loop
from tests.services.pretend_cuda import JOURNAL, pretended_cuda

STEPS: list[tuple[int, int, Counter[str]]] = []
PHASES: Counter[str] = Counter()


def watch_steps() -> None:
    """Count from one step's beginning to the next, without commits and what lies between rounds."""
    begin, commit, train = loop.call_before_step, loop.commit, loop.train_round
    stop = json.loads(os.environ.get("PRETEND_STOP", "null"))
    at_begin: list[Counter[str]] = []

    def end_step() -> None:
        if at_begin:
            STEPS[-1][2].update(JOURNAL.waits - at_begin.pop())

    def beginning(hooks: Any, progress: Any, meter: Any) -> None:
        end_step()
        if [progress.round, progress.updates] == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(hooks, progress, meter)
        at_begin.append(JOURNAL.waits.copy())
        STEPS.append((progress.round, progress.updates, Counter()))

    def committing(*args: Any, **kwargs: Any) -> None:
        end_step()
        commit(*args, **kwargs)

    def training(*args: Any) -> None:
        train(*args)
        end_step()

    loop.call_before_step, loop.commit, loop.train_round = beginning, committing, training


def watch_phases() -> None:
    inside = Ranks.in_phase

    @contextmanager
    def entering(self: Ranks, name: str) -> Iterator[None]:
        before = JOURNAL.waits.total()
        with inside(self, name):
            yield
        PHASES[name] += JOURNAL.waits.total() - before

    Ranks.in_phase = entering  # type: ignore[assignment, method-assign]


def write_at_the_end(report: Path) -> None:
    """The command ends by os._exit, which runs nothing else."""
    leave = os._exit

    def leaving(code: int) -> None:
        found = {"steps": STEPS, "phases": PHASES, "not_deterministic": JOURNAL.not_deterministic}
        report.write_text(json.dumps(found))
        leave(code)

    os._exit = leaving  # type: ignore[assignment]


if __name__ == "__main__":
    _, written, *sys.argv[1:] = sys.argv
    watch_steps()
    watch_phases()
    write_at_the_end(Path(written))
    with pretended_cuda():
        app.main()
