"""Laws of a sweep's states: when a run has finished, how a sweep ends, what people and programs are shown."""

from __future__ import annotations

import json

import pytest

from mirl_dist.cli.sweep import states
from mirl_dist.cli.sweep.spec import SweepRun
from mirl_dist.config.config import Config


@pytest.mark.parametrize(
    ("launched", "ended", "exited", "complete", "state"),
    [
        (False, None, False, False, "waiting"),
        (False, None, False, True, "finished"),
        (True, None, False, False, "running"),
        (True, None, True, False, "failed"),
        (True, "finished", False, True, "finished"),
        (True, "finished", False, False, "stopped"),
        (True, "stopped", False, True, "stopped"),
        (True, "failed", False, False, "failed"),
        (True, None, True, True, "failed"),
    ],
)
def test_a_finished_run_has_a_launch_that_said_so_and_a_last_ticket(
    launched: bool, ended: str | None, exited: bool, complete: bool, state: str
) -> None:
    assert states.state_of(launched=launched, ended=ended, exited=exited, complete=complete) == state


@pytest.mark.parametrize(
    ("run_states", "asked", "code"),
    [
        (["finished", "finished"], False, 0),
        (["finished", "finished"], True, 0),
        (["finished", "failed", "stopped"], False, 1),
        (["finished", "stopped"], False, 75),
        (["failed", "waiting"], True, 75),
    ],
)
def test_a_sweep_asked_to_stop_can_be_queued_again_whatever_failed(
    run_states: list[states.State], asked: bool, code: int
) -> None:
    assert states.exit_code(run_states, asked) == code


def test_where_a_run_stands_is_told_in_words_and_to_programs() -> None:
    run = SweepRun("mirl-seed0", "mirl", 0, "runs/s/mirl-seed0", (), Config())
    status = states.RunStatus("running", 3, 1, 5, 36, 0.2, 17.256, "host, pid 4", b"beat")
    assert status.cells() == ["running", "1/3", "5/36", "20.0%", "17.26"]
    assert states.RunStatus().cells() == ["waiting", "", "", "", ""]
    row = json.loads(json.dumps(status.row(run)))
    assert row["method"] == "mirl" and row["seed"] == 0 and row["state"] == "running" and row["psnr"] == 17.256
    assert row["who"] == "host, pid 4" and "sign" not in row
