"""`mirl_dist` with planned mishaps, described by the environment variable MIRL_FATAL as JSON: one, or a list. With
MIRL_AHEAD the loop runs one step ahead of what the host knows, as on a GPU.

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
from mirl_dist.errors import UserError
from mirl_dist.storage import async_writer, commits, local
from mirl_dist.training import loop, losses

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
    train_round, begin = loop.train_round, loop.call_before_step
    passes, l1 = loop.forward_backward, losses.per_sample_l1
    around: list[Any] = []  # the state and the hooks of the round
    now, number = [False], [0]  # whether the step is the planned one, and its pass

    def training(state: Any, model: Any, batches: Any, config: Any, ranks: Any, hooks: Any, advance: Any) -> None:
        around[:] = [state, hooks]
        train_round(state, model, batches, config, ranks, hooks, advance)

    def beginning(hooks: Any, progress: Any, meter: Any) -> None:
        now[0], number[0] = [progress.round, progress.updates] == plan["step"], 0
        begin(hooks, progress, meter)

    def passing(*args: Any) -> None:
        passes(*args)
        if now[0] and "do" not in plan:
            around[1].committer.writer.wait_at_most(60)  # a commit that is under way is the matter of other mishaps
            die(plan)
        if now[0] and plan.get("do") == "fault":
            raise UserError("found a planned fault, in this rank alone, so that a test can see it.")
        if now[0] and plan.get("do") == "drift":
            next(iter(around[0].weights.values())).view(-1)[0] *= 1.000001

    def losing(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        strikes = now[0] and plan.get("pass", number[0]) == number[0]
        number[0] += 1
        if strikes and plan.get("do") == "inf_gradient":
            restored.register_hook(lambda gradient: gradient * float("inf"))
        if strikes and plan.get("do") == "raise":
            raise getattr(torch, plan["error"])(plan["text"])
        if strikes and plan.get("do") == "allocate":
            torch.empty(plan["bytes"], dtype=torch.uint8)
        samples = l1(restored, clean)
        if strikes and plan.get("do") == "nan":
            samples = torch.cat([samples[:-1], samples[-1:] * float("nan")])
        return samples

    loop.train_round, loop.call_before_step, loop.forward_backward = training, beginning, passing
    losses.per_sample_l1 = losing


def run_ahead() -> None:
    """Fused optimisers, as on a GPU: they gate their updates, and the loop queues a step before it knows the last."""
    for name in ("Adam", "AdamW"):
        build = getattr(torch.optim, name)
        setattr(torch.optim, name, lambda *args, build=build, **kwargs: build(*args, **kwargs | {"fused": True}))


def keep(plan: Plan) -> None:
    commits.Commits.remove = lambda self, folder: None  # type: ignore[method-assign]


def main() -> None:
    told = json.loads(os.environ["MIRL_FATAL"])
    if "MIRL_AHEAD" in os.environ:
        run_ahead()
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
