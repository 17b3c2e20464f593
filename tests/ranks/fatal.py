"""`mirl_dist` with one planned mishap, described by the environment variable MIRL_FATAL as JSON.

{"rank": 0, "put": GLOB, "when": "before" | "during" | "after", "signal": 9}   at the first put of a matching name;
    during: the bytes lie under a temporary name, the rename has not happened
{"rank": 1, "step": [ROUND, UPDATES], "signal": 9}    before that optimiser step; rank "all": every rank
{"rank": 1, "step": [ROUND, UPDATES], "do": "nan"}    that rank's network returns NaN at that step
{"rank": 1, "step": [ROUND, UPDATES], "do": "drift"}  one weight of that rank moves by one part in a million
{"rank": 1, "step": [ROUND, UPDATES], "do": "fault"}  that rank raises a Fault of its own
{"rank": 0, "do": "keep"}                             no mishap: commits inside rounds are kept for a look at them
"""

from __future__ import annotations

import fnmatch
import json
import os
from typing import Any

import torch

from mirl_dist import cli, commits, objective, storage, train
from mirl_dist.faults import Fault
from mirl_dist.pruning import masks

PLAN: dict[str, Any] = json.loads(os.environ["MIRL_FATAL"])
MINE = PLAN["rank"] in ("all", int(os.environ.get("RANK", "0")))


def die() -> None:
    os.kill(os.getpid(), PLAN.get("signal", 9))


def at_put() -> None:
    put, put_if_absent, replace, link = storage.Folder.put, storage.Folder.put_if_absent, os.replace, os.link
    armed = [True]

    def strike(name: str, when: str) -> None:
        if armed[0] and when == PLAN["when"] and fnmatch.fnmatchcase(name, PLAN["put"]):
            armed[0] = False
            die()

    def putting(self: storage.Folder, name: str, data: bytes) -> None:
        strike(name, "before")
        put(self, name, data)
        strike(name, "after")

    def putting_if_absent(self: storage.Folder, name: str, data: bytes) -> bool:
        strike(name, "before")
        written = put_if_absent(self, name, data)
        strike(name, "after")
        return written

    def replacing(source: str, target: Any) -> None:
        strike(str(target), "during")
        replace(source, target)

    def linking(source: str, target: Any) -> None:
        strike(str(target), "during")
        link(source, target)

    storage.Folder.put = putting  # type: ignore[method-assign]
    storage.Folder.put_if_absent = putting_if_absent  # type: ignore[method-assign]
    storage.folder.os.replace = replacing  # type: ignore[assignment]
    storage.folder.os.link = linking  # type: ignore[assignment]


def at_step() -> None:
    train_round, close_gradients, l1 = train.train_round, masks.close_gradients, objective.per_sample_l1
    where: list[Any] = []

    def now() -> bool:
        return bool(where) and [where[0].progress.round, where[0].progress.updates] == PLAN["step"]

    def training(state: Any, model: Any, batches: Any, plan: Any, ranks: Any, around: Any, advance: Any) -> None:
        where[:] = [state, around]
        train_round(state, model, batches, plan, ranks, around, advance)

    def closing(weights: Any, alive: Any) -> None:
        if now() and "do" not in PLAN:
            where[1].keeper.settle(60)  # a commit that is under way is the matter of other mishaps
            die()
        if now() and PLAN["do"] == "fault":
            raise Fault("found a planned fault, in this rank alone, so that a test can see it.")
        close_gradients(weights, alive)
        if now() and PLAN["do"] == "drift":
            with torch.no_grad():
                next(iter(weights.values())).view(-1)[0] *= 1.000001

    def losing(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        losses = l1(restored, clean)
        if now() and PLAN.get("do") == "nan":
            losses = torch.cat([losses[:-1], losses[-1:] * float("nan")])
        return losses

    train.train_round = training
    masks.close_gradients = closing
    objective.per_sample_l1 = losing


def keep() -> None:
    commits.Commits.remove = lambda self, folder: None  # type: ignore[method-assign]


if __name__ == "__main__":
    if MINE:
        (keep if PLAN.get("do") == "keep" else at_put if "put" in PLAN else at_step)()
    cli.main()
