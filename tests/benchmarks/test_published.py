"""The published formulation that the benchmarks measure against is the published network, and ours trains alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import same_losses
from benchmarks.ours import step as ours
from benchmarks.published import step as published
from benchmarks.published.promptir import PublishedPromptIR

OFFICIAL: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "models" / "golden" / "promptir_official.json").read_text()
)
SMALL: dict[str, Any] = {
    "dim": 8,
    "blocks": (1, 1, 1, 1),
    "refinement_blocks": 1,
    "prompt_dims": (8, 8, 8),
    "prompt_sizes": (4, 4, 4),
}


def hashed(count: int, index: int) -> Tensor:
    """The numbers of the golden file's recipe, float64 in [-0.5, 0.5)."""
    prime = 1_000_003
    k = torch.arange(count) % prime
    return ((611_953 * k * k + 350_377 * k + 104_729 * index + 1_299_709) % prime).double() / prime - 0.5


def fill(tensor: Tensor, index: int) -> None:
    u = hashed(tensor.numel(), index).reshape(tensor.shape)
    if tensor.ndim in (2, 4):
        tensor.copy_(3.5 * u / (tensor.numel() / tensor.shape[0]) ** 0.5)
    elif tensor.ndim == 1:
        tensor.copy_(0.8 + 0.8 * u)
    else:
        tensor.copy_(1 + u)


@pytest.mark.long
def test_the_published_formulation_has_the_published_names_and_outputs() -> None:
    with torch.device("meta"):
        network = PublishedPromptIR().double()
    network = network.to_empty(device="cpu")
    assert {n: list(p.shape) for n, p in network.named_parameters()} == {
        n: shape for n, (shape, _) in OFFICIAL["tensors"].items()
    }
    names = sorted(OFFICIAL["tensors"])
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            fill(tensor, names.index(name))
            if tensor.ndim == 1 and name.endswith("bias"):
                tensor.copy_(0.2 * hashed(tensor.numel(), names.index(name)))
        for case in OFFICIAL["cases"].values():
            shape = torch.Size(case["input_shape"])
            output = network((hashed(shape.numel(), 123) + 0.5).reshape(shape))
            wanted = case["outputs"][0]
            assert output.mean().item() == pytest.approx(wanted["mean"], rel=1e-9)
            assert output.flatten()[:5].tolist() == pytest.approx(wanted["first5"], rel=1e-9)


def test_both_formulations_have_the_same_losses_over_many_steps() -> None:
    found = list(same_losses.losses(20, batch=2, patch=16, sizes=SMALL))
    assert len(found) == 20 and found[-1][1] < 0.9 * found[0][1], "the losses fall"
    for step, first, second in found:
        assert second == pytest.approx(first, rel=same_losses.TOLERANCE), step


@pytest.mark.parametrize("options", [{"batch": 1, "patch": 16}, {"image": (19, 24)}, {"image": (16, 16)}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_sides_of_the_benchmark_run(options: dict[str, Any], precision: str) -> None:
    for side in (published, ours):
        once = side.prepare(**options, precision=precision, **SMALL)
        once()
        once()
