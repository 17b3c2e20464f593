"""The training step on a GPU, as far as a machine without one shows it: tests/services/pretend_cuda.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.services.lab import PROGRAMS, ROOT, Lab
from tests.services.outcomes import expect
from tests.services.pretend_cuda import build_guard

# Numbers that may only fall.
WAITS_IN_A_STEP = 1
WAITS_IN_A_REPORT = 3  # the step behind which none is queued included
WAITS_IN_A_CUT = 1_760  # of 107 tensors
KERNELS = {  # operations of a step of 8 patches of 64 x 64; each launches one kernel or more
    "fp32": {"forward": 1_178, "backward": 2_342, "update": 12},
    "bf16": {"forward": 1_727, "backward": 2_985, "update": 12},
}
GIGABYTES = {"fp32": {"forward": 13.8, "backward": 32.0}, "bf16": {"forward": 8.8, "backward": 18.2}}

SETS = {
    "train.device": "auto",
    "train.epochs": 1,
    "schedule.warmup_epochs": 0,
    "data.steps_per_epoch": 6,
    "prune.rounds": 1,
    "checkpoint.every_steps": None,
    "tracking.every_steps": 4,
}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed, with which a device guard is compiled: apt-get install g++")
    return build_guard(tmp_path_factory.mktemp("guard"))


def environment(guard: Path) -> dict[str, str]:
    return {"LD_PRELOAD": str(guard), "PYTHONPATH": str(ROOT)}


class Pretended:
    """Trains on the pretended GPU."""

    def __init__(self, lab: Lab, guard: Path) -> None:
        self._lab, self._env = lab, environment(guard)

    def train(self, folder: Path, sets: dict[str, Any], *, code: int = 0, **env: str) -> dict[str, Any]:
        """What the host waited for, by step and by phase."""
        folder.mkdir(exist_ok=True)
        report = folder / "report.json"
        command = ["python", str(PROGRAMS / "on_pretended_gpu.py"), str(report), *self._lab.train(folder, SETS | sets)]
        expect(code, self._lab.cold(*command, cwd=folder, env=self._env | env).wait())
        found: dict[str, Any] = json.loads(report.read_text())
        return found


@pytest.fixture(scope="module")
def pretended(lab: Lab, guard: Path) -> Pretended:
    return Pretended(lab, guard)


@pytest.fixture(scope="module")
def whole(pretended: Pretended, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A dense and a pruned round."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", pretended.train(folder, {})


def assert_few_waits(found: dict[str, Any]) -> None:
    assert found["not_deterministic"] == {}
    for round_, updates, waits in found["steps"]:
        looked_at = (updates + 1) in (4, 6)  # a report, and the end of the round
        most = WAITS_IN_A_REPORT if looked_at else WAITS_IN_A_STEP
        assert sum(waits.values()) <= most, f"round {round_}, step {updates}: {json.dumps(waits, indent=2)}"


def test_a_step_waits_once_for_the_gpu_in_a_dense_and_in_a_pruned_round(whole: tuple[Path, dict[str, Any]]) -> None:
    _, found = whole
    assert [step[:2] for step in found["steps"]] == [[round_, step] for round_ in (0, 1) for step in range(6)]
    assert_few_waits(found)


def test_a_cut_does_not_wait_more_often_than_it_did(whole: tuple[Path, dict[str, Any]]) -> None:
    assert whole[1]["phases"]["selecting"] <= WAITS_IN_A_CUT


@pytest.mark.parametrize("sets", [{"batch.forward": 2}, {"train.precision": "bf16"}], ids=["two passes", "bf16"])
def test_passes_and_precisions_wait_as_often(sets: dict[str, Any], pretended: Pretended, tmp_path: Path) -> None:
    found = pretended.train(tmp_path, sets | {"prune.rounds": 0})
    assert len(found["steps"]) == 6
    assert_few_waits(found)


@pytest.mark.long
def test_a_round_that_is_stopped_goes_on_to_the_same_tickets(
    pretended: Pretended, whole: tuple[Path, dict[str, Any]], lab: Lab, tmp_path: Path
) -> None:
    pretended.train(tmp_path, {}, code=75, PRETEND_STOP="[1, 2]")
    found = pretended.train(tmp_path, {})
    assert [step[:2] for step in found["steps"]] == [[1, step] for step in range(3, 6)]
    assert lab.digests(tmp_path / "run") == lab.digests(whole[0])


def test_a_full_size_step_launches_no_more_and_moves_no_more(guard: Path, lab: Lab, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = ["python", str(PROGRAMS / "count_kernels.py"), str(report)]
    lab.cold(*command, cwd=tmp_path, env=environment(guard)).wait().ok()
    counts = json.loads(report.read_text())
    for precision, parts in KERNELS.items():
        for part, most in parts.items():
            assert counts[precision][part][0] <= most, (precision, part, counts)
        for part, gigabytes in GIGABYTES[precision].items():
            assert counts[precision][part][1] <= gigabytes, (precision, part, counts)
