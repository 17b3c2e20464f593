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


def while_uploading() -> None:
    from mirl_dist.training.checkpoint import Checkpoints

    commit, armed = Checkpoints.commit_step, [True]

    def slowly(self: Checkpoints, *args: Any) -> None:
        if armed[0]:
            armed[0] = False
            strike()
            time.sleep(1)
        commit(self, *args)

    Checkpoints.commit_step = slowly  # type: ignore[method-assign]


def while_counting() -> None:
    from mirl_dist.training import selection

    prune, armed = selection.prune, [True]

    def pruning(weights: Any, masks: Any, rule: Any, share: Any, gather: Any, *scores: Any) -> Any:
        def gathering(values: Any) -> Any:
            if armed[0]:
                armed[0] = False
                strike()
                time.sleep(0.2)
            return gather(values)

        return prune(weights, masks, rule, share, gathering, *scores)

    selection.prune = pruning


def while_starting() -> None:
    from mirl_dist.training import resume

    newest = resume.load_latest

    def looking(*args: Any) -> Any:
        strike()
        time.sleep(0.2)
        return newest(*args)

    resume.load_latest = looking


def while_building() -> None:
    from mirl_dist.data.building import build

    write, left = build.write_shard, [PLAN["times"]]

    def writing(*args: Any) -> Any:
        written = write(*args)
        left[0] -= 1
        if left[0] == 0:
            strike()
            time.sleep(0.2)
        return written

    build.write_shard = writing


if __name__ == "__main__":
    from mirl_dist.cli import app

    if MINE:
        special = {
            "uploading": while_uploading,
            "counting": while_counting,
            "starting": while_starting,
            "shards": while_building,
        }
        special.get(PLAN["phase"], at_phase)()
    app.main()
