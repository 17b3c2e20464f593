"""`mirl-dist profile`: some steps of a run, measured; nothing of the run, of MLflow or of the machine is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mirl_dist.cli.profile import flops
from tests.services.processes import PATIENCE

PHASES = {"data", "forward", "loss sum", "backward", "reduce", "masks, clip", "optimiser", "commit", "tracking"}
PHASES |= {"wait", "other"}


def profile(lab: Any, folder: Path, *more: str) -> Any:
    return lab.mirl("profile", str(lab.config(folder)), "--steps", "2", *more, cwd=folder)


def check(measured: dict[str, Any], world: int) -> None:
    """The phases make the step; time passed in all phases that every step has; the kernels are the largest ones."""
    assert measured["world"] == len(measured["ranks"]) == world and measured["batch"]["global"] == 4
    for rank in measured["ranks"]:
        phases = rank["phases"]
        assert phases.keys() == PHASES
        assert sum(phases.values()) == pytest.approx(rank["step_seconds"], rel=0.01)
        assert all(phases[name] > 0 for name in PHASES - {"reduce", "other"})
        assert (phases["reduce"] > 0) == (world > 1)
        assert phases["commit"] == pytest.approx(rank["commit_seconds"] / 2), "checkpoint.every_steps: 2"
        assert rank["flops"] * world == flops.step_flops("promptir", SIZES, 16, 4)
    slowest = max(rank["step_seconds"] for rank in measured["ranks"])
    assert measured["samples_per_second"] == pytest.approx(4 / slowest)
    assert 0 < measured["peak_share"] < 1
    kernels = measured["ranks"][0]["kernels"]
    assert len(kernels) == 10 and "aten::convolution_backward" in {kernel["name"] for kernel in kernels}
    shares = [kernel["share"] for kernel in kernels]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1


SIZES: dict[str, Any] = {
    "dim": 8,
    "blocks": (1,) * 4,
    "refinement_blocks": 1,
    "prompt_dims": (8,) * 3,
    "prompt_sizes": (4,) * 3,
}


def test_a_profile_shows_phases_speed_and_kernels_and_writes_only_its_file(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("of another run")
    ended = profile(lab, tmp_path, "--out", "times.json", "--set", "tracking.enabled=true").ok()
    for text in ("forward", "samples/s", "GFLOP/s", "aten::convolution_backward", "all numbers: times.json"):
        assert text in ended.out, ended.said()
    check(json.loads((tmp_path / "times.json").read_text()), world=1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run", "run.json", "times.json", "tiny.yaml"]
    ended = profile(lab, tmp_path, "--out", "times.json")
    assert ended.rc == 2 and "times.json exists already" in ended.err and ended.err.count("\n") == 1, ended.said()


@pytest.mark.long
def test_two_ranks_are_profiled_with_their_all_reduce(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    words = ("profile", str(lab.config(tmp_path)), "--steps", "3", "--launch", "auto", "--out", "times.json")
    ended = lab.cold("python", "-m", "mirl_dist", *words, cwd=tmp_path, env={"TMPDIR": str(tmp_path / "tmp")})
    finished = ended.wait(PATIENCE).ok()
    assert finished.err == "", finished.said()
    out = finished.out
    assert "rank 1" in out and "2 ranks x 1 x 2 samples" in out
    check(json.loads((tmp_path / "times.json").read_text()), world=2)
    assert list((tmp_path / "tmp").glob("mirl-dist-profile*")) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--set", "train.epochs=0"), "train.epochs"),
        (("--set", "data.shards=nowhere"), "nowhere"),
        (("--launch", "nowhere.yaml"), "nowhere.yaml"),
        (("--out", "tiny.yaml", "--overwrite"), "which this command reads"),
        (("--set", "start.ticket=nowhere"), "nowhere"),
    ],
)
def test_what_train_would_refuse_a_profile_refuses_in_a_line(
    lab: Any, tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    ended = profile(lab, tmp_path, *words)
    assert ended.rc == 2 and text in ended.err and ended.err.count("\n") <= 2, ended.said()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_the_published_network_takes_its_operations_per_patch() -> None:
    eight = flops.step_flops("promptir", {}, 64, 8)
    assert eight == pytest.approx(0.5e12, rel=0.1)


def test_a_depthwise_convolution_counts_its_own_filters_only() -> None:
    images = torch.rand(2, 6, 8, 8, device="meta", requires_grad=True)
    layer = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False, device="meta")
    with flops.counter() as counted:
        layer(images).sum().backward()  # type: ignore[no-untyped-call]
    forward = 2 * (2 * 6 * 8 * 8) * 9
    assert counted.get_total_flops() == 3 * forward, "forward, and the gradients of input and weight"
