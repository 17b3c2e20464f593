"""`mirl-dist` that writes down what every step read and lost: one JSON line per forward pass and rank.

Environment: MIRL_KEYS, the folder for the lines; MIRL_KILL, '[round, updates]': every rank dies before that step.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from mirl_dist.cli import app
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.training import loop


def watch() -> None:
    forward, begin, kill = loop.forward, loop.call_before_step, json.loads(os.environ.get("MIRL_KILL", "null"))
    lines = Path(os.environ["MIRL_KEYS"]) / f"{os.environ.get('RANK', '0')}.jsonl"
    now: list[Any] = []

    def beginning(hooks: Any, progress: Any, meter: Any) -> None:
        now[:] = [progress.round, progress.epoch, progress.step]
        begin(hooks, progress, meter)
        if [progress.round, progress.updates] == kill:
            hooks.committer.writer.wait_at_most(60)  # a commit under way is not what this test is about
            os.kill(os.getpid(), signal.SIGKILL)

    def watching(model: Any, batch: Any, plan: Any, step_losses: Any, ranks: Any) -> Any:
        mean = forward(model, batch, plan, step_losses, ranks)
        losses, _ = step_losses.passes[-1]
        line = {"at": now, "keys": batch.keys, "losses": [loss.hex() for loss in losses.tolist()]}
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return mean

    loop.forward, loop.call_before_step = watching, beginning
    # A commit that is due is made at its step, not later because the one before is still being written.
    AsyncWriter.busy = property(lambda self: bool(self.wait_at_most(60)))  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    watch()
    app.main()
