"""Laws of the exact selection: what counting finds is what sorting finds, on any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.pruning import magnitudes, quantile
from mirl_dist.pruning.magnitudes import BitSearch, CountedPart, Histogram
from mirl_dist.pruning.quantile import Gather, Threshold, kth_smallest

T = TypeVar("T")
Values = NDArray[np.float32]


def on_ranks(ranks: int, work: Callable[[int, Gather], T]) -> list[T | Exception]:
    """What `work(rank, gather)` returned or raised on each of several ranks: threads that meet in `gather`."""
    meeting, brought = threading.Barrier(ranks, timeout=30), [torch.empty(0)] * ranks

    def one(rank: int) -> T | Exception:
        def gather(counts: Tensor) -> Tensor:
            brought[rank] = counts.clone()
            meeting.wait()
            everyone = torch.stack(brought)
            meeting.wait()
            return everyone

        try:
            return work(rank, gather)
        except (UserError, ValueError, TypeError) as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


def dealt(values: Values, cuts: Sequence[int]) -> list[dict[str, Tensor]]:
    """The values as one dict of two named tensors for each rank, cut at the given places."""
    flat = torch.from_numpy(values.copy())
    ends = [0, *sorted(min(c, len(values)) for c in cuts), len(values)]
    shares = [flat[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return [{"a.weight": s[: len(s) // 3], "b.weight": s[len(s) // 3 :]} for s in shares]


def check(values: Values, k: int, cuts: Sequence[int] = ()) -> None:
    """kth_smallest on len(cuts) + 1 ranks against sorting."""
    shares = dealt(values, cuts)
    found = on_ranks(len(shares), lambda rank, gather: kth_smallest(shares[rank], k, gather))
    assert all(f == found[0] for f in found), "every rank has the same answer"
    cut = found[0]
    assert isinstance(cut, Threshold)
    bits = values.view(np.int32) & 0x7FFFFFFF  # sorts as magnitudes do, and keeps subnormals apart
    ordered = np.sort(bits)
    assert cut.bits == ordered[k - 1]
    assert cut.value == np.sort(np.abs(values.astype(np.float64)))[k - 1]
    assert cut.below == int((bits < cut.bits).sum())
    assert cut.below + cut.ties == k
    assert 1 <= cut.ties <= int((bits == cut.bits).sum())


anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, 1e-45, 3.4e38])
tiny = st.floats(min_value=-(2.0**-126), max_value=2.0**-126, width=32)
lists = st.one_of(*(st.lists(kind, min_size=1, max_size=60) for kind in (anything, few, tiny)))


@settings(max_examples=150, deadline=None)
@given(lists, st.floats(0, 1), st.lists(st.integers(0, 60), max_size=3))
def test_counting_finds_what_sorting_finds_on_one_to_four_ranks(
    numbers: list[float], where: float, cuts: list[int]
) -> None:
    values = np.array(numbers, dtype=np.float32)
    check(values, 1 + int(where * (len(values) - 1)), cuts)


@settings(max_examples=150, deadline=None)
@given(lists, st.floats(0, 1), st.lists(st.integers(0, 60), max_size=3), st.sampled_from([1, 2, 5]))
def test_a_guess_from_a_sample_right_or_wrong_changes_nothing(
    numbers: list[float], where: float, cuts: list[int], sampled: int
) -> None:
    values = np.array(numbers, dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantile, "_MANY", 1)
        patch.setattr(quantile, "SAMPLED", sampled)
        patch.setattr(magnitudes, "SAMPLED", sampled)
        check(values, 1 + int(where * (len(values) - 1)), cuts)


@pytest.mark.parametrize("rare", [0.0, 1.0], ids=["read again", "copied"])
def test_a_guess_spares_reading_all_weights_three_times(rare: float, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def counted(parts: Sequence[CountedPart], search: BitSearch) -> Histogram:
        passes.append(sum(part.values.numel() for part in parts))
        return magnitudes.count(parts, search)

    monkeypatch.setattr(quantile, "count", counted)
    monkeypatch.setattr(quantile, "_RARE", rare)
    values = np.random.default_rng(0).normal(0, 0.02, 2_000_000).astype(np.float32)
    check(values, 400_000)
    sampled, *others = passes
    assert sampled < 5_000
    assert len(others) == 2 and all(number < 200_000 if rare else number == 2_000_000 for number in others)


@pytest.mark.parametrize(
    "values",
    [
        np.full(100, 0.25, np.float32),
        np.zeros(10, np.float32),
        np.array([0.0, -0.0, 0.0, -0.0], np.float32),
        np.array([1.0, -1.0, 2.0, -2.0, 2.0], np.float32),
        np.array([1, 2, 3, 0x007FFFFF, 0x00800000], np.int32).view(np.float32),
        np.array([0x7F7FFFFF, 0x7F7FFFFE, 0x3F800000], np.int32).view(np.float32),
    ],
    ids=["constant", "zeros", "both zeros", "signed ties", "subnormals", "largest"],
)
@pytest.mark.parametrize("cuts", [(), (0,), (1, 1), (2, 3, 99)], ids=lambda cuts: f"{len(cuts) + 1} ranks")
def test_every_k_of_awkward_values_is_found(values: Values, cuts: tuple[int, ...]) -> None:
    for k in sorted({1, 2, len(values) // 2, len(values) - 1, len(values)}):
        check(values, k, cuts)


def test_large_normal_weights_are_cut_exactly() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.02, 300_000).astype(np.float32)
    for k in (1, 60_000, 150_000, 299_999, 300_000):
        check(values, k, (100_000, 100_000, 200_001))


def test_ranks_without_any_weight_hear_the_answer() -> None:
    values = np.array([3, 1, 2], np.float32)
    shares: list[dict[str, Tensor]] = [{}, {"a": torch.from_numpy(values)}, {"a": torch.empty(0)}]
    found = on_ranks(3, lambda rank, gather: kth_smallest(shares[rank], 2, gather))
    assert [(f.value, f.below, f.ties) for f in found if isinstance(f, Threshold)] == [(2.0, 1, 1)] * 3


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_chunks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(magnitudes, "BLOCK", chunk)
    values = np.random.default_rng(1).choice(np.array([0, 1e-40, 0.1, -0.1, 0.2, 3], np.float32), 200)
    for k in (1, 50, 200):
        check(values, k, (33, 100))


def test_a_tensor_that_is_not_contiguous_is_counted_as_it_is() -> None:
    held = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    assert kth_smallest({"a": held.t()[1:3]}, 3).value == 7.0
    assert kth_smallest({"a": held.requires_grad_()}, 5).value == 4.0


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_on_all_ranks_and_named_where_they_are(odd: float) -> None:
    good, bad = torch.ones(5), torch.tensor([1.0, odd])
    shares = [{"a.weight": good}, {"a.weight": good, "b.weight": bad}, {}]
    found = on_ranks(3, lambda rank, gather: kth_smallest(shares[rank], 2, gather))
    assert all(isinstance(f, UserError) for f in found)
    texts = [str(f) for f in found]
    assert all("found NaN or infinite weights on rank 1 (" in text for text in texts)
    assert "tensors: b.weight" in texts[1]
    assert "a.weight" not in texts[1]
    assert "none in this rank's share" in texts[0]
    assert all("nothing was pruned. Lower optimiser.lr" in text for text in texts)


@pytest.mark.parametrize("k", [0, -1, 8])
def test_k_outside_the_magnitudes_is_refused_on_all_ranks_alike(k: int) -> None:
    shares = dealt(np.ones(7, np.float32), (2, 5))
    found = on_ranks(3, lambda rank, gather: kth_smallest(shares[rank], k, gather))
    assert [(type(f), str(f)) for f in found] == [
        (ValueError, f"k = {k} is outside 1..7, the number of magnitudes")
    ] * 3
    with pytest.raises(ValueError, match=r"k = 1 is outside 1\.\.0"):
        kth_smallest({}, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_another_dtype_is_refused_by_name(dtype: torch.dtype) -> None:
    shares: dict[str, Any] = {"a": torch.ones(2), "b.weight": torch.ones(2, dtype=dtype)}
    with pytest.raises(TypeError, match=rf"magnitudes of 'b\.weight' are {dtype}; pass float32"):
        kth_smallest(shares, 1)


def test_only_counts_travel() -> None:
    sent: list[Tensor] = []

    def gather(counts: Tensor) -> Tensor:
        sent.append(counts)
        return counts.unsqueeze(0)

    kth_smallest({"a": torch.rand(100_000)}, 20_000, gather)
    assert all(s.dtype == torch.int64 for s in sent)
    assert sum(s.numel() for s in sent) == 1 + 2048 + 1024 + 1024
    sent.clear()
    kth_smallest({"a": torch.rand(2_000_000)}, 400_000, gather)
    assert sum(s.numel() for s in sent) == 2048 + 1 + 2048 + 1024 + 1024, "with the sample's"
