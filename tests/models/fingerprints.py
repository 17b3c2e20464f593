"""Numbers measured on published classes, and networks filled with the values that these were measured with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return numbers


def hashed(count: int, index: int) -> Tensor:
    """The recipe's numbers: an integer hash of (position, tensor index), float64 in [-0.5, 0.5)."""
    prime = 1_000_003
    k = torch.arange(count) % prime
    return ((611_953 * k * k + 350_377 * k + 104_729 * index + 1_299_709) % prime).double() / prime - 0.5


def hashed_image(shape: Sequence[int]) -> Tensor:
    return (hashed(torch.Size(shape).numel(), 123) + 0.5).reshape(list(shape))


def fill(network: nn.Module, names: Sequence[str], factors: Sequence[Mapping[str, Any]]) -> None:
    """Give each parameter the values that follow from its place in the sorted `names` of the published class."""
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            u = hashed(tensor.numel(), names.index(name)).reshape(tensor.shape)
            if tensor.ndim in (2, 4):
                values = 3.5 * u / (tensor.numel() / tensor.shape[0]) ** 0.5
            elif tensor.ndim == 1:
                values = 0.2 * u if name.endswith("bias") else 0.8 + 0.8 * u
            else:
                values = 1 + u
            for rule in factors:
                begins_and_ends = name.startswith(rule.get("startswith", "")) and name.endswith(
                    rule.get("endswith", "")
                )
                if begins_and_ends and rule.get("contains", "") in name:
                    values = values * rule["multiply"]
            tensor.copy_(values)


def assert_statistics(output: Tensor, wanted: Mapping[str, Any], where: str) -> None:
    """All numbers agree to 1e-9 of the deviation between pixels."""
    assert list(output.shape) == wanted["shape"], where
    measured = {"mean": output.mean(), "std": output.std(correction=0), "min": output.min(), "max": output.max()}
    pairs = {key: (value.item(), wanted[key]) for key, value in measured.items()}
    first = zip(output.flatten()[:5].tolist(), wanted["first5"], strict=True)
    pairs |= {f"pixel {at}": pair for at, pair in enumerate(first)}
    for place, value in wanted["at"].items():
        pairs[place] = (output[tuple(int(axis) for axis in place.split(","))].item(), value)
    for key, (ours, published) in pairs.items():
        assert ours == pytest.approx(published, rel=1e-9, abs=1e-9 * wanted["std"]), (where, key)


def assert_published(
    network: nn.Module, name: str, run: Callable[[nn.Module, Tensor], Sequence[Tensor]], gradients: float
) -> None:
    """Outputs, loss and the norm of each gradient are as published in golden/`name`.json.

    network: with any values. run: gives the published outputs for an input. gradients: relative tolerance of the norms.
    """
    published = golden(name)
    network = network.double().eval()
    names = sorted(published.get("tensors", [key for key, _ in network.named_parameters()]))
    fill(network, names, published.get("factors", []))
    for label, case in published["cases"].items():
        with torch.set_grad_enabled(case["loss"] is not None):
            outputs = run(network, hashed_image(case["input_shape"]))
        for output, wanted in zip(outputs, case["outputs"], strict=True):
            assert_statistics(output.detach(), wanted, label)
        if case["loss"] is not None:
            targets = [hashed(output.numel(), 999 + at).reshape(output.shape) for at, output in enumerate(outputs)]
            loss = sum(((o * t).mean() for o, t in zip(outputs, targets, strict=True)), torch.zeros(()))
            assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
            loss.backward()
            assert_gradients(network, published, gradients)


def assert_gradients(network: nn.Module, published: Mapping[str, Any], tolerance: float) -> None:
    norms = {n: None if t.grad is None else t.grad.norm().item() for n, t in network.named_parameters()}
    total = sum(norm**2 for norm in norms.values() if norm is not None) ** 0.5
    assert total == pytest.approx(published["gradient_norm"], rel=tolerance)
    if "tensors" in published:
        wanted = {name: norm for name, (_, norm) in published["tensors"].items() if name in norms}
        trained = {name for name, norm in wanted.items() if norm is not None}
        assert {name for name, norm in norms.items() if norm is not None} == trained
        assert {n: norms[n] for n in trained} == pytest.approx({n: wanted[n] for n in trained}, rel=tolerance)
