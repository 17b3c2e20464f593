"""`mirl_dist` with planned mishaps, described by the environment variable MIRL_FATAL as JSON: one, or a list.

{"rank": 0, "put": GLOB, "when": "before" | "during" | "after", "signal": 9}   at the first put of a matching name;
    during: the bytes lie under a temporary name, the rename has not happened
{"rank": 1, "step": [ROUND, UPDATES], "signal": 9}    before that optimiser step; rank "all": every rank
{"rank": 1, "step": [ROUND, UPDATES], "do": "nan", "pass": 0}    that rank's network returns NaN at that step, in one
    of its passes; without "pass": in all
{"rank": 1, "step": [ROUND, UPDATES], "do": "inf_gradient"}    its losses are finite, their gradient is not
{"rank": 1, "step": [ROUND, UPDATES], "do": "drift"}  one weight of that rank moves by one part in a million
{"rank": 1, "step": [ROUND, UPDATES], "do": "fault"}  that rank raises a UserError of its own
{"rank": 1, "step": [ROUND, UPDATES], "do": "raise", "error": NAME, "text": TEXT}    that error of torch
{"rank": 1, "step": [ROUND, UPDATES], "do": "allocate", "bytes": NUMBER}    a tensor of that size in a pass
{"rank": 0, "do": "keep"}                             no mishap: commits inside rounds are kept for a look at them
"""

from __future__ import annotations

import fnmatch
import json
import os
from typing import Any

import torch

from mirl_dist import storage
from mirl_dist.cli import app
from mirl_dist.distributed.engines import sharding
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks
from mirl_dist.storage import async_writer, commits, local
from mirl_dist.training import loop
from mirl_dist.training import losses as objective

Plan = dict[str, Any]


def die(plan: Plan) -> None:
    os.kill(os.getpid(), plan.get("signal", 9))


def at_put(plan: Plan) -> None:
    armed = [True]

    def strike(name: str, when: str) -> None:
        if armed[0] and when == plan["when"] and fnmatch.fnmatchcase(name, plan["put"]):
            armed[0] = False
            die(plan)

    def around(owner: Any, method: str) -> None:
        put = getattr(owner, method)

        def putting(self: Any, name: str, data: bytes) -> Any:
            strike(name, "before")
            written = put(self, name, data)
            strike(name, "after")
            return written

        setattr(owner, method, putting)

    def during(call: str) -> None:
        publish = getattr(os, call)

        def publishing(source: str, target: Any) -> None:
            strike(str(target), "during")
            publish(source, target)

        setattr(local.os, call, publishing)

    around(storage.Folder, "put")
    around(storage.Folder, "put_if_absent")
    during("replace")
    during("link")


def at_step(plan: Plan) -> None:
    train_round, close_gradients, l1 = loop.train_round, masks.mask_gradients, objective.per_sample_l1
    close_parts = sharding.mask_gradients
    where: list[Any] = []
    passes = [0]

    def now() -> bool:
        return bool(where) and [where[0].progress.round, where[0].progress.updates] == plan["step"]

    def training(state: Any, model: Any, batches: Any, config: Any, ranks: Any, hooks: Any, advance: Any) -> None:
        where[:] = [state, hooks]
        train_round(state, model, batches, config, ranks, hooks, advance)

    def before_closing() -> None:
        if now() and "do" not in plan:
            where[1].committer.writer.wait_at_most(60)  # a commit that is under way is the matter of other mishaps
            die(plan)
        if now() and plan.get("do") == "fault":
            raise UserError("found a planned fault, in this rank alone, so that a test can see it.")

    def closing_parts(*given: Any) -> None:
        before_closing()
        close_parts(*given)

    def closing(weights: Any, alive: Any) -> None:
        before_closing()
        close_gradients(weights, alive)
        if now() and plan.get("do") == "drift":
            with torch.no_grad():
                next(iter(weights.values())).view(-1)[0] *= 1.000001

    def losing(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        passes[0] = passes[0] + 1 if now() else 0
        mine = passes[0] and plan.get("pass", passes[0] - 1) == passes[0] - 1
        if mine and plan.get("do") == "inf_gradient":
            restored.register_hook(lambda gradient: gradient * float("inf"))
        if mine and plan.get("do") == "raise":
            raise getattr(torch, plan["error"])(plan["text"])
        if mine and plan.get("do") == "allocate":
            torch.empty(plan["bytes"], dtype=torch.uint8)
        losses = l1(restored, clean)
        if mine and plan.get("do") == "nan":
            losses = torch.cat([losses[:-1], losses[-1:] * float("nan")])
        return losses

    loop.train_round = training
    masks.mask_gradients = closing
    sharding.mask_gradients = closing_parts
    objective.per_sample_l1 = losing


def keep(plan: Plan) -> None:
    commits.Commits.remove = lambda self, folder: None  # type: ignore[method-assign]


def main() -> None:
    told = json.loads(os.environ["MIRL_FATAL"])
    for plan in told if isinstance(told, list) else [told]:
        if plan["rank"] in ("all", int(os.environ.get("RANK", "0"))):
            (keep if plan.get("do") == "keep" else at_put if "put" in plan else at_step)(plan)
    app.main()


def commit_on_time() -> None:
    """Commits that are due are made at their step, not at a later one because the one before is still being written:
    so that a test knows which are there."""

    def waits(self: async_writer.AsyncWriter) -> bool:
        self.wait_at_most(60)
        return False

    async_writer.AsyncWriter.busy = property(waits)  # type: ignore[assignment]


if __name__ == "__main__":
    commit_on_time()
    main()
