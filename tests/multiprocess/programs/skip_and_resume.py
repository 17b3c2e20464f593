"""Runs on every rank: `skip_and_resume.py FOLDER EXAMPLES` trains small rounds with mishaps drawn at random.

Each is trained thrice: whole; killed and resumed from its last commit; and by a loop that waits for each step. Writes
to W-r.json in the folder what each of the three has ended in: weights, position, reports, messages, error.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from mirl_dist.distributed.engines.ddp import DdpEngine
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import Stopped, UserError
from mirl_dist.training import guards
from tests.training.small_round import STEPS, Run, bits, plan


class Killed(BaseException):
    """The process ends here; what it had in memory is lost."""


def draw(seed: int, world: int) -> dict[str, Any]:
    """An example, the same on all ranks."""
    chance = random.Random(f"{seed}, {world}")
    passes = chance.choice((1, 2))

    def place() -> tuple[int, int, int]:
        return chance.randrange(STEPS), chance.randrange(world), chance.randrange(passes)

    return {
        "passes": passes,
        "nan": [place() for _ in range(chance.randrange(4))],
        "skip": chance.randrange(4),
        "starved": [place()] if chance.random() < 0.3 else [],
        "stop": [place()[:2]] if chance.random() < 0.2 else [],
        "kill": chance.randrange(1, STEPS),
        "commit": chance.choice((2, 3, 5, None)),
        "report": chance.choice((1, 5, 7)),
    }


def made(example: dict[str, Any], rank: int, *, kill: bool = False) -> Run:
    """The run of an example on this rank."""

    class Dying(Run):
        def before_step(self, progress: Any) -> None:
            super().before_step(progress)
            if kill and progress.updates == example["kill"]:
                raise Killed

    return Dying(
        nan_in=lambda step, number: (step, rank, number) in example["nan"],
        starved_in=lambda step, number: (step, rank, number) in example["starved"],
        stop_in=lambda step: (step, rank) in example["stop"],
    )


def ending(run: Run, example: dict[str, Any], ranks: Ranks, resumed: Run | None = None) -> dict[str, Any]:
    """How a run ends, with what it says on the way."""
    said: list[str] = []
    settings = {"commit_every": example["commit"], "report_every": example["report"]}
    config = plan(**settings, skip_bad=example["skip"], passes=example["passes"], world=ranks.world)
    error = ""
    with mock.patch.object(guards, "say", said.append):
        try:
            run.train(config, resumed, ranks)
        except (Stopped, UserError) as end:
            error = f"{type(end).__name__}: {end}"
        except Killed:
            error = "killed"
    reports = {s: {n: v for n, v in told.items() if n != "samples_per_second"} for s, told in run.told.items()}
    return {
        "error": error,
        "weights": bits(run),
        "progress": run.state.progress.model_dump(exclude={"seconds", "unreported"}),
        "reports": reports,
        "said": said,
    }


def tried(example: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    whole = ending(made(example, ranks.rank), example, ranks)
    first = made(example, ranks.rank, kill=True)
    before = ending(first, example, ranks)
    after = before
    if before["error"] == "killed":
        after = ending(made(example, ranks.rank), example, ranks, first)
        after["reports"] = before["reports"] | after["reports"]
        after["said"] = list(dict.fromkeys(before["said"] + after["said"]))
    with mock.patch.object(DdpEngine, "runs_ahead", property(lambda self: False)):
        waited = ending(made(example, ranks.rank), example, ranks)
    return {"example": example, "whole": whole, "resumed": after, "waited": waited, "killed": before["error"]}


def main(folder: Path, examples: int) -> None:
    ranks, Run.fused = Ranks(device="cpu"), True
    found = [tried(draw(seed, ranks.world), ranks) for seed in range(examples)]
    (folder / f"{ranks.world}-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # as the commands do: taking a gloo group apart at Python's end can hang
