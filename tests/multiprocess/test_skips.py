"""Rounds that skip steps, are killed and resumed, by a loop that queues a step ahead of what it knows."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.services.lab import PROGRAMS, Lab
from tests.services.outcomes import expect

EXAMPLES = 24


@pytest.fixture(scope="module", params=[1, 2])
def tried(request: pytest.FixtureRequest, lab: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of each example what each rank saw of its three runs."""
    folder, world = tmp_path_factory.mktemp("skips"), request.param
    script = str(PROGRAMS / "skip_and_resume.py")
    lab.start(str(folder), str(EXAMPLES), cwd=folder, world=world, script=script).wait().ok()
    per_rank = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    return list(zip(*per_rank, strict=True))


def test_a_killed_round_ends_as_a_whole_one_with_the_same_messages_and_counts(tried: list[Any]) -> None:
    for ranks in tried:
        for rank in ranks:
            whole, resumed = rank["whole"], rank["resumed"]
            for key in ("error", "weights", "progress", "said"):
                assert resumed[key] == whole[key], (key, rank["example"])
            assert resumed["reports"].keys() == whole["reports"].keys(), rank["example"]
            for step, values in whole["reports"].items():
                assert resumed["reports"][step] == pytest.approx(values, rel=1e-12, nan_ok=True), rank["example"]
    assert sum(ranks[0]["killed"] == "killed" for ranks in tried) > EXAMPLES / 3, "few were killed"


def test_a_loop_that_queues_a_step_ahead_does_what_one_that_waits_does(tried: list[Any]) -> None:
    for ranks in tried:
        for rank in ranks:
            assert rank["waited"] == rank["whole"], rank["example"]


def test_every_rank_skips_ends_and_counts_alike(tried: list[Any]) -> None:
    for first, *others in tried:
        for rank in others:
            for key in ("error", "weights", "progress"):
                assert rank["whole"][key] == first["whole"][key], first["example"]
            assert rank["whole"]["said"] == [], "one rank says it"


def test_as_many_steps_are_skipped_as_are_bad_and_one_more_than_allowed_is_refused(tried: list[Any]) -> None:
    refused = 0
    for first, *_ in tried:
        example, whole = first["example"], first["whole"]
        begun = [step for step, *_ in example["starved"]]  # of it no update is made
        ended = begun + [step + 1 for step, *_ in example["stop"]]
        bad = sorted({step for step, *_ in example["nan"] if step < min(ended, default=12)})
        allowed = bad[: example["skip"]]
        assert len([line for line in whole["said"] if "The step is skipped" in line]) == len(allowed)
        if len(bad) > len(allowed):
            refused += 1
            step = bad[len(allowed)]
            assert whole["error"].startswith(f"UserError: the loss is not finite at round 0, epoch {step // 4}")
            assert re.search(rf"task:key: .*: {step}-\d", whole["error"])
            assert (whole["progress"]["updates"], whole["progress"]["bad"]) == (step, len(allowed))
        else:
            assert (whole["progress"]["updates"], whole["progress"]["bad"]) == (min([*ended, 12]), len(bad))
            assert whole["error"].startswith("Stopped: ") == bool(ended and min(ended) <= 12)
    assert refused > 2, "the examples were to have refusals"


@pytest.mark.long
def test_ranks_that_run_ahead_are_killed_and_stopped_and_end_as_undisturbed(lab: Lab, tmp_path: Path) -> None:
    sets = {
        "data.steps_per_epoch": 6,
        "train.epochs": 1,
        "schedule.warmup_epochs": 0,
        "prune.rounds": 1,
        "tracking.every_steps": 6,
        "checkpoint.every_steps": 4,
        "guard.skip_bad_batches": 1,
    }
    nan = {"rank": 1, "step": [0, 1], "do": "nan"}
    stop = {"rank": 0, "step": [0, 2], "signal": 15}
    kill = {"rank": "all", "step": [1, 5]}
    for name in ("whole", "disturbed"):
        (tmp_path / name).mkdir()
    play = partial(lab.play, sets=sets, env={"MIRL_AHEAD": "1"})
    whole = play(tmp_path / "whole", fatal=nan).ok()
    assert whole.out.count("The step is skipped (1 of 1 allowed in a round)") == 1
    expect((75, 75), play(tmp_path / "disturbed", fatal=[nan, stop]), "stopped on request in round 0 after 3 steps")
    expect((-9, -9), play(tmp_path / "disturbed", fatal=kill), "resuming: round 0, after step 3")
    expect(0, play(tmp_path / "disturbed", fatal={"rank": 0, "do": "keep"}), "resuming: round 1, after step 4")
    lab.assert_same_run(tmp_path / "disturbed/run", tmp_path / "whole/run")
