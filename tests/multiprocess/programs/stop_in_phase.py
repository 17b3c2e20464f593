"""`mirl_dist` that is sent a signal at a chosen moment, described by the environment variable MIRL_ASKED as JSON.

{"rank": 1, "phase": "evaluating", "times": 1, "signal": 15}   when that rank enters the phase for that many times
{"rank": 0, "phase": "uploading", "signal": 15}                while a commit is being written in the background, slowly
{"rank": 0, "phase": "counting", "signal": 15}                 in the middle of the exact selection
{"rank": 0, "phase": "starting", "signal": 15}                 before the newest commit is looked for
{"rank": 0, "phase": "shards", "times": 3, "signal": 15}       when so many shards have been built
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

PLAN: dict[str, Any] = json.loads(os.environ["MIRL_ASKED"])
MINE = PLAN["rank"] == int(os.environ.get("RANK", "0"))


def strike() -> None:
    """As another process would do it. The signal has come when this returns, however busy the machine is."""
    os.kill(os.getpid(), PLAN["signal"])


def at_phase() -> None:
    from mirl_dist.distributed.ranks import Ranks

    inside, left = Ranks.in_phase, [PLAN.get("times", 1)]

    @contextmanager
    def entering(self: Ranks, phase: str) -> Iterator[None]:
        with inside(self, phase):
            if phase == PLAN["phase"]:
                left[0] -= 1
                if left[0] == 0:
                    strike()
                    time.sleep(0.2)  # the phase is not over
            yield

    Ranks.in_phase = entering  # type: ignore[assignment, method-assign]


def at_call(owner: Any, name: str, *, after: bool = False, pause: float = 0.2) -> None:
    """Strike before a call of `owner.name`, or after it: the first one, or that after so many times."""
    call, left = getattr(owner, name), [PLAN.get("times", 1)]

    def calling(*args: Any) -> Any:
        made = call(*args) if after else None
        left[0] -= 1
        if left[0] == 0:
            strike()
            time.sleep(pause)
        return made if after else call(*args)

    setattr(owner, name, calling)


def while_counting() -> None:
    from mirl_dist.training import selection

    prune = selection.prune

    def pruning(weights: Any, masks: Any, rule: Any, share: Any, gather: Any, *scores: Any) -> Any:
        counting = SimpleNamespace(gather=gather)
        at_call(counting, "gather")
        return prune(weights, masks, rule, share, lambda values: counting.gather(values), *scores)

    selection.prune = pruning


def aim() -> None:
    from mirl_dist.data.building import build
    from mirl_dist.training.checkpointing import resume
    from mirl_dist.training.checkpointing.checkpoint import Checkpoints

    match PLAN["phase"]:
        case "uploading":
            at_call(Checkpoints, "commit_step", pause=1)
        case "counting":
            while_counting()
        case "starting":
            at_call(resume, "load_latest")
        case "shards":
            at_call(build, "write_shard", after=True)
        case _:
            at_phase()


if __name__ == "__main__":
    from mirl_dist.cli import app

    if MINE:
        aim()
    app.main()
