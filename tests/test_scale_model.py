"""Laws of what measures scale: simulated ranks find what a sort finds, and the formulas count what really moves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.partition import Partition
from mirl_dist.pruning.prune import PruneConfig, prune
from mirl_dist.pruning.quantile import kth_smallest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import scale
import scale_round
from scale import Meeting, pruned_apart, search
from scale_round import Constants, phases, received, reduced, words

WEIGHTS = 50_001


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "PIECE", 1 << 12)


def row() -> Tensor:
    """All weights that are drawn."""
    return torch.cat([part for _, part in scale.parts(WEIGHTS, 1)])


def coarse(piece: int, seed: int = 0, drawn: Callable[[int, int], Tensor] = scale.drawn) -> Tensor:
    """Few magnitudes, so that a cut runs through many equal weights."""
    return drawn(piece, seed).mul(200).round()


@pytest.mark.parametrize("ranks", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10_000, WEIGHTS])
def test_simulated_ranks_find_the_cut_of_a_sort(ranks: int, k: int) -> None:
    found = search(WEIGHTS, ranks, k)
    ordered = row().abs().sort().values
    assert found.cut.value == ordered[k - 1].item()
    assert found.cut.bits == found.sorted_bits
    assert found.cut.below == int((ordered < ordered[k - 1]).sum())
    assert found.cut.below + int(found.allotted.sum()) == k


@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_simulated_ranks_hold_equal_parts_and_find_what_the_package_finds(ranks: int) -> None:
    held: list[list[Tensor]] = [[] for _ in range(ranks)]
    for rank, part in scale.parts(WEIGHTS, ranks):
        held[rank].append(part)
    mine = [torch.cat(parts) for parts in held]
    assert all(torch.equal(m, scale.part_of(row(), rank, ranks)) for rank, m in enumerate(mine))
    cuts = Meeting(ranks).on_all(lambda rank, gather: kth_smallest({"a": mine[rank]}, 10_000, gather))
    assert cuts == [search(WEIGHTS, ranks, 10_000).cut] * ranks


def test_a_wrong_guess_of_what_to_keep_costs_a_drawing_and_no_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    parts = scale.parts
    monkeypatch.setattr(scale, "PIECE", 2)
    monkeypatch.setattr(scale, "parts", lambda *given: begun.append(1) or parts(*given))
    for seed in range(8):
        found = search(200, 300, 40, seed)  # some ranks hold nothing
        values = torch.cat([part for _, part in parts(200, 1, seed)]).abs().sort().values
        assert found.cut.value == values[39].item()
    assert 8 < len(begun) <= 16, "some of these guesses were meant to be wrong"


@pytest.mark.parametrize("ranks", [2, 5, 40])
def test_ties_are_allotted_to_ranks_as_the_package_drops_them(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "drawn", coarse)
    found = search(WEIGHTS, ranks, 10_000)
    assert found.cut.ties > 1
    assert int((found.allotted > 0).sum()) > 0
    pruned, _, _ = pruned_apart({"a.weight": row()}, ranks, PruneConfig(0.2))
    assert pruned[0].removed == 10_000
    equal = [scale.part_of(row(), r, ranks).abs() == found.cut.value for r in range(ranks)]
    gone = [int((e & ~p.masks["a.weight"]).sum()) for e, p in zip(equal, pruned, strict=True)]
    assert gone == found.allotted.tolist()


@pytest.mark.parametrize("rule", [PruneConfig(0.2), PruneConfig(0.2, per="layer")], ids=["global", "layer"])
def test_masks_are_the_same_and_the_formula_counts_what_a_gather_moves(rule: PruneConfig) -> None:
    weights = {f"{i}.weight": coarse(i) for i in range(3)}
    layers = rule.per == "layer"
    digests = set()
    for ranks in (1, 2, 33):
        pruned, digest, moved = pruned_apart(weights, ranks, rule)
        assert moved == received(ranks, words(3, own=True, layers=layers))
        digests.add(digest)
        meeting, masks = Meeting(ranks), masking.dense_masks(weights, weights)
        whole = meeting.on_all(
            lambda rank, gather, n=ranks, old=masks: prune(weights, old, rule, Partition(rank, n), gather)
        )
        assert meeting.received == received(ranks, words(3, own=False, layers=layers))
        digests |= {masking.digest(found.masks) for found in whole}
        assert {found.removed for found in pruned} == {found.removed for found in whole}
    assert len(digests) == 1


def test_an_all_reduce_moves_no_more_with_more_ranks_where_a_gather_does() -> None:
    given = words(1, own=False)
    assert received(2, given) == reduced(2, given) == 8 * given
    assert received(4096, given) == 4095 * 8 * given
    assert reduced(4096, given) < 2 * 8 * given


def test_a_round_without_any_waiting_is_divided_by_the_ranks() -> None:
    free = Constants()._replace(launches=0, latency=0, node_bandwidth=float("inf"), network_bandwidth=float("inf"))
    alone = phases(free, 1, 512)
    for ranks in scale_round.WORLDS:
        cost = phases(free, ranks, 512)
        assert cost["train"] == pytest.approx(alone["train"] / ranks)
        assert cost["reduce"] == cost["meet"] == 0
        assert cost["digest"] == alone["digest"]


def test_no_number_of_ranks_takes_a_step_below_the_time_of_its_launches() -> None:
    c = Constants()
    floor, steps = c.launches * c.launch_seconds, c.samples / c.batch
    assert 0.03 <= floor <= 0.06, "30 to 60 ms, as counted"
    trained = {ranks: phases(c, ranks, c.batch)["train"] / steps for ranks in (1, 2, 4, 8)}
    assert trained[1] == pytest.approx(c.batch / c.samples_per_second)
    assert trained[4] == trained[8] == pytest.approx(floor), "more GPUs gain nothing"


def test_a_number_of_ranks_that_does_not_divide_the_batch_has_no_round() -> None:
    lines = scale_round.table(Constants(), 8)
    assert len(lines) == 2 + len(scale_round.WORLDS)
    assert sum("refused" in line for line in lines) == sum(ranks > 8 for ranks in scale_round.WORLDS)
