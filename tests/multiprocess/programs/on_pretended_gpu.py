"""`on_pretended_gpu.py GUARD REPORT ARGUMENTS`: mirl-dist on a pretended GPU, in one process.

Writes to REPORT as JSON: waits, where the host waited for the device in each step of training ([round, updates, {place:
times}]) and in each phase; not_deterministic: operations without a deterministic kernel.
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
    begin, train = loop.call_before_step, loop.train_round
    stop = json.loads(os.environ.get("PRETEND_STOP", "null"))

    def beginning(hooks: Any, progress: Any, meter: Any) -> None:
        if STEPS:
            STEPS[-1][2].update(JOURNAL.waits - before)
        if [progress.round, progress.updates] == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        begin(hooks, progress, meter)
        before.clear()
        before.update(JOURNAL.waits)
        STEPS.append((progress.round, progress.updates, Counter()))

    def training(*args: Any) -> None:
        try:
            train(*args)
        finally:
            STEPS[-1][2].update(JOURNAL.waits - before)

    before: Counter[str] = Counter()
    loop.call_before_step, loop.train_round = beginning, training


def watch_phases() -> None:
    inside = Ranks.in_phase

    @contextmanager
    def entering(self: Ranks, name: str) -> Iterator[None]:
        before = JOURNAL.waits.total()
        with inside(self, name):
            yield
        PHASES[name] += JOURNAL.waits.total() - before

    Ranks.in_phase = entering  # type: ignore[assignment, method-assign]


def main(guard: Path, report: Path) -> None:
    watch_steps()
    watch_phases()
    try:
        with pretended_cuda(guard):
            app.main()
    finally:
        found = {"steps": STEPS, "phases": PHASES, "not_deterministic": JOURNAL.not_deterministic}
        report.write_text(json.dumps(found))


if __name__ == "__main__":
    _, library, written, *sys.argv[1:] = sys.argv
    main(Path(library), Path(written))
