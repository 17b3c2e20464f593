"""The script that tries the package on a lent GPU, tried itself on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def smoke(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """How the script ended, and its results by stage."""
    ended = subprocess.run(
        [sys.executable, "benchmarks/gpu_smoke", "--cpu", *arguments],
        cwd=ROOT,
        env=os.environ | {"OUT": str(out)},
        capture_output=True,
        text=True,
        check=False,
    )
    return ended, json.loads((out / "gpu_smoke.json").read_text())


def test_stages_in_processes_of_their_own_end_in_results_and_a_table(tmp_path: Path) -> None:
    ended, results = smoke(tmp_path, "--only", "facts,numbers")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list(results) == ["facts", "numbers"] and results["facts"]["deepspeed"]
    assert results["numbers"]["fp32"] == {"loss error": 0.0, "gradient error": 0.0, "same bits": True}
    assert results["numbers"]["masks of the CPU"]
    table = ended.stdout.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["facts", "numbers"] and all(" ok " in line for line in table)


@pytest.mark.long
def test_a_stage_that_fails_stops_none_of_the_others(tmp_path: Path) -> None:
    ended, results = smoke(tmp_path, "--only", "plain,shards,using,refusals")  # plain: before there are shards
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert not results["plain"]["ok"] and results["plain"]["code"] == 2 and "shards" in results["plain"]["tail"][0]
    assert results["using"]["ok"] == "skipped: needs the stage plain"
    assert results["shards"]["ok"] is True and results["refusals"]["ok"] is True, results


@pytest.mark.long
@pytest.mark.parametrize("stages", ["shards,plain,using", "speed", "shards,killed"])
def test_every_kind_of_stage_succeeds(stages: str, tmp_path: Path) -> None:
    ended, results = smoke(tmp_path, "--only", stages)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert all(results[stage]["ok"] is True for stage in stages.split(","))
