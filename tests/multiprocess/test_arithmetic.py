"""Runs with compiled blocks and in other precisions: the same bits every time, refused where they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.services.lab import ROOT

COMPILED = {"train.compile": True, "prune.rounds": 1}


def names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return sorted(opened.keys())


@pytest.mark.skipif("MIRL_COMPILE" not in os.environ, reason="compiles for minutes: run it with MIRL_COMPILE=1")
@pytest.mark.long
def test_two_compiled_ranks_end_in_the_same_bits_stopped_or_not(lab: Any, reference: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    lab.play(whole, COMPILED).ok()
    (compiled, _), eager = lab.tickets(whole / "run"), lab.tickets(reference)[0]
    assert compiled["arithmetic"] == {"compile": "yes"} and "arithmetic" not in eager
    assert eager["fingerprint"] != compiled["fingerprint"]
    (dense, *_) = lab.ended(reference)
    assert names(lab.ended(whole / "run")[0] / "weights.safetensors") == names(dense / "weights.safetensors")
    for name, score in eager["scores"].items():
        assert compiled["scores"][name]["psnr"] == pytest.approx(score["psnr"], abs=0.05)
    assert lab.play(killed, COMPILED, fatal={"rank": 1, "step": [0, 4], "signal": 9}).rc != 0
    lab.play(killed, COMPILED).ok()
    lab.assert_same_run(killed / "run", whole / "run")


@pytest.mark.parametrize(
    ("sets", "env", "text"),
    [
        ({"train.precision": "tf32"}, {}, "found train.precision tf32, but processors compute here"),
        ({"train.compile": True}, {"CXX": "/nowhere/g++", "PATH": "/nowhere"}, "Install a C++ compiler (g++)"),
        ({"train.compile": True}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "found true with engine fsdp"),
    ],
)
def test_arithmetic_that_cannot_be_had_is_refused_in_one_line(
    lab: Any, tmp_path: Path, sets: dict[str, Any], env: dict[str, str], text: str
) -> None:
    ended = lab.play(tmp_path, sets, world=None, env=env)
    assert ended.rc == 2 and text in ended.err and ended.err.count("\n") == 1, ended.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_loss_in_bf16_stays_within_the_noise_between_seeds() -> None:
    script = [sys.executable, "benchmarks/precision.py", "--steps", "200"]
    ended = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "within the noise" in ended.stdout, ended.stdout + ended.stderr
