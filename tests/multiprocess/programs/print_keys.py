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
    sync_status, kill = loop.sync_status, json.loads(os.environ.get("MIRL_KILL", "null"))
    lines = Path(os.environ["MIRL_KEYS"]) / f"{os.environ.get('RANK', '0')}.jsonl"

    def watching(losses: Any, batch: Any, ranks: Any, hooks: Any, stragglers: Any) -> Any:
        progress = hooks.state.progress
        if [progress.round, progress.updates] == kill:
            hooks.committer.writer.wait_at_most(60)  # a commit under way is not what this test is about
            os.kill(os.getpid(), signal.SIGKILL)
        at = [progress.round, progress.epoch, progress.step]
        line = {"at": at, "keys": batch.keys, "losses": [loss.hex() for loss in losses.tolist()]}
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return sync_status(losses, batch, ranks, hooks, stragglers)

    loop.sync_status = watching
    # A commit that is due is made at its step, not later because the one before is still being written.
    AsyncWriter.busy = property(lambda self: bool(self.wait_at_most(60)))  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    watch()
    app.main()
