"""What ranks do about unequal nodes, memory that does not suffice, and GPUs that fail: in real processes."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.services.lab import PROGRAMS
from tests.services.outcomes import expect

HERE = platform.node()
FULL_GPU = (
    "CUDA out of memory. Tried to allocate 1.25 GiB. GPU 1 has a total capacity of 139.80 GiB of which 817.00 MiB is "
    "free. Including non-PyTorch memory, this process has 139.00 GiB memory in use."
)
BAD_GPU = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported elsewhere"


@pytest.mark.parametrize(
    "how, device, text",
    [
        (
            "torch",
            "cpu",
            f"ranks differ in their version of torch: rank 1 ({HERE}) has 1.13.0; rank 0 ({HERE}) has "
            f"{torch.__version__}. Install the same packages on every node.",
        ),
        (
            "gpus",
            "auto",
            f"ranks differ in their device: rank 1 ({HERE}) has cuda; rank 0 ({HERE}) has cpu (torch "
            f"{torch.__version__} is built without CUDA). Start ranks on equal nodes",
        ),
        ("no_gpus", "cuda", f"rank 1 ({HERE}): found device cuda where no GPU can be used: torch "),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends GPUs on a machine without")
def test_ranks_of_unequal_nodes_are_all_refused_at_once(
    lab: Any, how: str, device: str, text: str, tmp_path: Path
) -> None:
    arguments, script = lab.train(tmp_path, {"train.device": device}), str(PROGRAMS / "other_node.py")
    run = lab.start(*arguments, cwd=tmp_path, world=2, script=script, env={"MIRL_OTHER": how}).wait()
    expect((2, 2), run)
    (line,) = run.err.splitlines()
    assert line.startswith(f"mirl-dist: {text}"), run.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_run_says_once_why_it_trains_on_processors(lab: Any, tmp_path: Path) -> None:
    sets = {"train.device": "auto", "prune.rounds": 0, "train.epochs": 1, "schedule.warmup_epochs": 0}
    run = expect((0, 0), lab.play(tmp_path, sets))
    assert run.out.count(f"computes on processors: torch {torch.__version__} is built without CUDA\n") == 1


@pytest.mark.parametrize(
    "mishap, code, text",
    [
        (
            {"do": "raise", "error": "OutOfMemoryError", "text": FULL_GPU},
            2,
            "found GPU 1 (139.80 GiB) out of memory, where 1.25 GiB more were needed. Lower batch.forward (mirl-dist "
            "doctor CONFIG --launch FILE says what fits), or end what else runs there.",
        ),
        (
            {"do": "allocate", "bytes": 2**46},
            2,
            "found this machine out of memory, where 65536.00 GiB more were needed. Lower batch.forward",
        ),
        (
            {"do": "raise", "error": "AcceleratorError", "text": BAD_GPU},
            1,
            "GPU 1 has failed (CUDA error: an illegal memory access was encountered). Look for Xid in the system's log",
        ),
    ],
    ids=["gpu memory", "memory", "gpu failure"],
)
def test_a_device_that_fails_in_a_step_is_named_by_its_rank(
    lab: Any, mishap: dict[str, Any], code: int, text: str, tmp_path: Path
) -> None:
    run = lab.play(tmp_path, fatal={"rank": 1, "step": [0, 2]} | mishap)
    assert run.codes == (1, code), run.said()
    (line,) = (line for line in run.err.splitlines() if "another rank has exited" not in line)
    assert line.startswith(f"mirl-dist, rank 1 ({HERE}): {text}"), run.said()


def test_a_step_that_does_not_fit_counts_as_no_crash_where_a_failed_gpu_does(lab: Any, tmp_path: Path) -> None:
    sets = {"guard.same_step_failures": 1}
    full = {"rank": 0, "step": [0, 2], "do": "raise", "error": "OutOfMemoryError", "text": FULL_GPU}
    for _ in range(2):
        expect(2, lab.play(tmp_path, sets, world=1, fatal=full), "GPU 1 (139.80 GiB) out of memory")
    broken = full | {"error": "AcceleratorError", "text": BAD_GPU}
    expect(1, lab.play(tmp_path, sets, world=1, fatal=broken), "GPU 0 has failed (CUDA error")
    expect(2, lab.play(tmp_path, sets, world=1, fatal=broken), "1 launches in a row died in step 3 of round 0")


@pytest.mark.long
def test_memory_that_does_not_suffice_starts_no_rank_again(lab: Any, tmp_path: Path) -> None:
    sets = {"batch.global": 4096, "data.steps_per_epoch": 1, "model.dim": 16, "data.mix": {"derain": 4096}}
    command = [sys.executable, "-m", "mirl_dist", *lab.train(tmp_path, sets), "--launch", "auto"]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)),
        check=False,
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "found this machine out of memory" in ended.stderr and "Lower batch.forward" in ended.stderr
    assert "starting the ranks again" not in ended.stderr
