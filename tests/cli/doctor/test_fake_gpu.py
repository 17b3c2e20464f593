"""The memory that doctor counts, against torch's own autocast on tensors that say they lie on a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mirl_dist.cli.doctor import memory
from tests.services import pretend_cuda
from tests.services.lab import ROOT


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
def test_the_counted_activations_are_within_a_tenth_of_those_on_a_fake_gpu(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.services.fake_gpu_program", str(pretend_cuda.build_guard(tmp_path))]
    kept = json.loads(subprocess.run(program, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)
    for precision in ("fp32", "bf16"):
        counted = memory.passes_of("promptir", {}, 64, precision, "cuda").of(8).saved
        assert kept[precision] > 10**9 and counted == pytest.approx(kept[precision], rel=0.1), precision
