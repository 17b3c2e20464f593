"""Laws of counting on an accelerator: what it counts is what a CPU counts, and the host seldom waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mirl_dist.pruning import magnitudes, quantile
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.magnitudes import BitSearch, CountedPart, Guess, count_near, count_on_cpu, count_on_device
from mirl_dist.pruning.masks import Masks, dense_masks
from mirl_dist.pruning.prune import PruneConfig, prune

floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.51, 1e-40, 3e38]),
)
AWAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal"}
"""Operations whose result a host must wait for, in whole or for its shape."""


RULES = [PruneConfig(0.2), PruneConfig(0.2, per="layer"), PruneConfig(0.2, floor=0.5)]


@contextmanager
def elsewhere(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are treated as if they were on an accelerator."""
    with patch.context() as inner:
        for module in (magnitudes, masking):
            inner.setattr(module, "on_cpu", lambda tensors: False)
        yield


class Waits(TorchDispatchMode):
    """Counts how often a host would wait for an accelerator inside."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.number = 0
        for name in ("cpu", "tolist", "numpy"):
            patch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, transfer: Any) -> Any:
        def call(tensor: Tensor) -> Any:
            self.number += 1
            return transfer(tensor)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket.__name__ in AWAITING
        return func(*args, **(kwargs or {}))


def parts_of(numbers: Iterable[float], masked: bool) -> list[CountedPart]:
    values = torch.tensor(list(numbers), dtype=torch.float32)
    mask = torch.arange(len(values)) % 3 != 1 if masked else None
    ends = (0, len(values) // 3, len(values) // 2, len(values))
    slices = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return [CountedPart(values[s], None if mask is None else mask[s]) for s in slices]


@settings(max_examples=100, deadline=None)
@given(st.lists(floats, max_size=40), st.booleans(), st.sampled_from([1, 7, 1 << 20]), st.sampled_from([1, 5, 1 << 17]))
def test_every_pass_counts_the_same_on_a_device_as_on_a_cpu(
    numbers: list[float], masked: bool, chunk: int, block: int
) -> None:
    parts = parts_of(numbers, masked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magnitudes, "CHUNK", chunk)
        patch.setattr(magnitudes, "BLOCK", block)
        for prefix, known in ((0, 0), (0x3F0, 11), (0x3F0 << 10, 21), (0, 11), (0, 21)):
            search = BitSearch(1, prefix, known)
            here, there = count_on_cpu(parts, search), count_on_device(parts, search)
            assert torch.equal(here.counts, there.counts)
            assert known or here.largest == there.largest
        for guess in (
            Guess(0x3F0, 0x3F0, True),
            Guess(0x3E0, 0x3F1, False),
            Guess(0, 1, True),
            Guess(2030, 2039, True),
        ):
            here, near = count_near(parts, guess)
            with elsewhere(patch):
                there, whole = count_near(parts, guess)
            assert torch.equal(here.counts, there.counts) and here.largest == there.largest
            assert whole is parts
            for prefix in range(guess.first, guess.last + 1):
                search = BitSearch(1, prefix, 11)
                assert torch.equal(count_on_cpu(near, search).counts, count_on_cpu(parts, search).counts)


def network(tensors: int = 40, equal: bool = False) -> tuple[dict[str, Tensor], Masks]:
    draw = torch.Generator().manual_seed(0)
    weights = {f"{i}.weight": torch.randn(3, 50 + i, generator=draw) for i in range(tensors)}
    if equal:
        weights = {name: weight.mul(2).round() for name, weight in weights.items()}
    return weights, {name: torch.rand(w.shape, generator=draw) > 0.3 for name, w in weights.items()}


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("many", [1, 1 << 18], ids=["guessed", "counted"])
@pytest.mark.parametrize(
    "rule",
    [PruneConfig(0.2), PruneConfig(0.2, per="layer"), PruneConfig(0.2, floor=0.5)],
    ids=["global", "layer", "floor"],
)
def test_a_cut_on_a_device_is_that_of_a_cpu(
    rule: PruneConfig, many: int, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, masks = network(equal=equal)
    monkeypatch.setattr(quantile, "_MANY", many)
    here = prune(weights, masks, rule)
    with elsewhere(monkeypatch):
        there = prune(weights, masks, rule)
    assert here[1:] == there[1:]
    assert masking.digest(here.masks) == masking.digest(there.masks)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("many", [1, 1 << 18], ids=["guessed", "counted"])
def test_a_cut_waits_no_longer_for_many_tensors_than_for_few(
    many: int, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantile, "_MANY", many)
    numbers = []
    for tensors in (3, 60):
        weights, masks = network(tensors, equal)
        with monkeypatch.context() as patch, elsewhere(monkeypatch), Waits(patch) as waits:
            prune(weights, masks, PruneConfig(0.2))
        numbers.append(waits.number)
    assert 0 < numbers[1] <= numbers[0]


def test_a_rewind_and_its_proof_wait_once_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, masks = network()
    initial = {name: torch.randn_like(weight) for name, weight in weights.items()}
    with monkeypatch.context() as patch, elsewhere(monkeypatch), Waits(patch) as waits:
        masking.rewind(weights, initial, masks, frozenset(weights))
        assert masking.find_unrewound(weights, initial, masks, frozenset(weights)) is None
        assert masking.find_nonzero_pruned(weights, masks) is None
        assert masking.count_surviving(masks) and masking.densities(masks)
    assert waits.number == 4
    weights["7.weight"][0, 0] += 1
    assert masking.find_unrewound(weights, initial, masks, frozenset(weights)) == "7.weight"


SPECIAL = [1.5, -1.5, 0.0, -0.0, float("nan"), float("inf"), 1e-40, -3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strides", ["contiguous", "channels last"])
def test_pruned_weights_become_positive_zeros_and_others_keep_their_bits(dtype: torch.dtype, strides: str) -> None:
    whole = torch.tensor(SPECIAL * 6, dtype=dtype).reshape(2, 4, 3, 2)
    layout = torch.channels_last if strides == "channels last" else torch.contiguous_format
    mask = torch.arange(whole.numel()).reshape(whole.shape) % 5 < 3
    expected = whole.masked_fill(~mask, 0.0)

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8)

    weights = {"a": whole.clone().contiguous(memory_format=layout)}
    masking.apply_masks(weights, {"a": mask})
    assert torch.equal(bits(weights["a"]), bits(expected))
    rewound = {"a": torch.full_like(weights["a"], 7.0)}
    masking.rewind(rewound, {"a": whole}, {"a": mask}, frozenset({"a"}))
    assert torch.equal(bits(rewound["a"]), bits(expected))


def test_large_tensors_are_masked_in_pieces_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "BLOCK", 7)
    weights, masks = network()
    expected = {name: weight.masked_fill(~masks[name], 0.0) for name, weight in weights.items()}
    masking.apply_masks(weights, masks)
    assert masking.digest_tensors(weights) == masking.digest_tensors(expected)
    assert masking.find_nonzero_pruned(weights, masks) is None
    weights["3.weight"].view(-1)[np.flatnonzero(~masks["3.weight"].numpy().reshape(-1))[-1]] = 1e-3
    assert masking.find_nonzero_pruned(weights, masks) == "3.weight"
    assert masking.find_nonzero_pruned(weights, dense_masks(weights, weights)) is None
