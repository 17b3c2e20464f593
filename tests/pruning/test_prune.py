"""Laws of pruning: which weights go, and how many, down to the published counts."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mirl_dist import models
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks, count_surviving, dense_masks
from mirl_dist.pruning.partition import Partition
from mirl_dist.pruning.prune import PruneConfig, PruneResult, count_to_remove, in_scope, prune
from tests.pruning.test_quantile import on_ranks

# MIR-L at 20 % per round. Six tensors of the published class are never used; they count there and are absent here.
DEAD = {
    "chnl_reduce1.weight": (64, 64, 1, 1),
    "chnl_reduce2.weight": (128, 128, 1, 1),
    "chnl_reduce3.weight": (256, 320, 1, 1),
    "reduce_noise_channel_1.weight": (48, 112, 1, 1),
    "reduce_noise_channel_2.weight": (96, 224, 1, 1),
    "reduce_noise_channel_3.weight": (192, 448, 1, 1),
}
UNPRUNABLE = 2_393_199
# round: prunable (dead tensors counted), total, prunable without dead, total without dead, total layer-wise,
# and of 48 scales of a norm those that layer-wise pruning leaves.
TABLE = {
    0: (33_199_064, 35_592_263, 32_983_768, 35_376_967, 35_592_263, 48),
    1: (26_559_251, 28_952_450, 26_387_014, 28_780_213, 28_952_647, 38),
    2: (21_247_401, 23_640_600, 21_109_611, 23_502_810, 23_640_850, 30),
    3: (16_997_921, 19_391_120, 16_887_689, 19_280_888, 19_391_433, 24),
    4: (13_598_337, 15_991_536, 13_510_151, 15_903_350, 15_991_872, 19),
    5: (10_878_669, 13_271_868, 10_808_121, 13_201_320, 13_272_209, 15),
    6: (8_702_935, 11_096_134, 8_646_497, 11_039_696, 11_096_487, 12),
    7: (6_962_348, 9_355_547, 6_917_197, 9_310_396, 9_355_851, 9),
    8: (5_569_878, 7_963_077, 5_533_757, 7_926_956, 7_963_378, 7),
    9: (4_455_902, 6_849_101, 4_427_005, 6_820_204, 6_849_381, 5),
    10: (3_564_721, 5_957_920, 3_541_604, 5_934_803, 5_958_163, 4),
    11: (2_851_777, 5_244_976, 2_833_283, 5_226_482, 5_245_160, 3),
    12: (2_281_421, 4_674_620, 2_266_626, 4_659_825, 4_674_768, 2),
    13: (1_825_137, 4_218_336, 1_813_301, 4_206_500, 4_218_441, 1),
    14: (1_460_109, 3_853_308, 1_450_641, 3_843_840, 3_853_434, 1),
    15: (1_168_087, 3_561_286, 1_160_513, 3_553_712, 3_561_365, 1),
}
FIFTH = PruneConfig(0.2)
FTZ = torch.set_flush_denormal(True)  # False where the processor cannot
torch.set_flush_denormal(False)


def sizes() -> dict[str, int]:
    """The full-size network's tensors and how many weights each has."""
    with torch.device("meta"):
        return {name: p.numel() for name, p in models.create("promptir").named_parameters()}


def prunable(of: Mapping[str, int]) -> dict[str, int]:
    return {name: of[name] for name in in_scope(of, "published")}


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small() -> dict[str, Tensor]:
    shapes = {"a.weight": (7, 5), "b.weight": (40,), "output.weight": (3, 10), "z.weight": (2, 2, 2)}
    return {name: some(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


# -- published counts -------------------------------------------------------------------------------------------


def test_counts_of_every_round_are_the_published_ones_pruned_globally() -> None:
    here = sum(prunable(sizes()).values())
    other = sum(sizes().values()) - here
    there = here + sum(math.prod(shape) for shape in DEAD.values())
    assert other == UNPRUNABLE
    for with_dead, total, without_dead, total_without, _, _ in TABLE.values():
        assert (here, here + other) == (without_dead, total_without)
        assert (there, there + other) == (with_dead, total)
        here -= count_to_remove(here, 0.2)
        there -= count_to_remove(there, 0.2)


def test_counts_of_every_round_are_the_published_ones_pruned_per_layer() -> None:
    left = prunable(sizes()) | {name: math.prod(shape) for name, shape in DEAD.items()}
    scale = "encoder_level1.0.norm1.body.weight"
    assert left["output.weight"] == 2592
    for *_, total, scales in TABLE.values():
        assert sum(left.values()) + UNPRUNABLE == total
        assert left[scale] == scales
        left = {n: c - count_to_remove(c, 0.2, 0.5 if n == "output.weight" else 1.0) for n, c in left.items()}


def test_one_shot_counts_are_the_published_ones() -> None:
    everything = TABLE[0][0]
    assert everything - count_to_remove(everything, 0.3) + UNPRUNABLE == 25_632_544
    assert everything - count_to_remove(everything, 0.7) + UNPRUNABLE == 12_352_918


@pytest.mark.long
def test_pruning_the_full_size_network_leaves_the_published_counts() -> None:
    torch.manual_seed(0)
    weights = {name: p.detach() for name, p in models.create("promptir").named_parameters()}
    masks = dense_masks(weights, in_scope(weights, "published"))
    layer_weights = weights | {name: some(*shape) for name, shape in DEAD.items()}
    layer_masks = dense_masks(layer_weights, in_scope(layer_weights, "published"))
    for round_ in (1, 2):
        _, _, left, total, total_per_layer, scales = TABLE[round_]
        before, masks = masks, prune(weights, masks, FIFTH).masks
        assert count_surviving(masks) == left
        assert count_surviving(masks) + UNPRUNABLE == total
        assert not any(bool((masks[n] & ~before[n]).any()) for n in masks), "nothing returns"
        layer_masks = prune(layer_weights, layer_masks, PruneConfig(0.2, per="layer")).masks
        assert count_surviving(layer_masks) + UNPRUNABLE == total_per_layer
        assert int(layer_masks["latent.0.norm1.body.weight"].sum()) == left_of(384, round_)
        assert int(layer_masks["encoder_level1.0.norm1.body.weight"].sum()) == scales
    assert all(bool(masks[n].all()) for n in masks if n.endswith("norm1.body.weight")), "scales are 1: none goes"


def left_of(count: int, rounds: int) -> int:
    for _ in range(rounds):
        count -= math.ceil(Fraction(1, 5) * (count - 1))
    return count


# -- how many ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**8), st.decimals("0.0001", "0.9999", places=4))
def test_the_count_is_the_ceiling_in_exact_arithmetic(alive_: int, fraction: object) -> None:
    wanted = math.ceil(Fraction(str(fraction)) * (alive_ - 1)) if alive_ else 0
    assert count_to_remove(alive_, float(str(fraction))) == wanted
    assert 0 <= wanted <= max(alive_ - 1, 0), "one weight at least stays"


def test_binary_rounding_does_not_change_the_count() -> None:
    assert count_to_remove(11, 0.3) == 3, "0.3 * 10 is 3 exactly, whatever floats say"
    assert count_to_remove(11, 0.7) == 7
    assert count_to_remove(11, 0.2, 0.5) == 1
    assert count_to_remove(1, 0.9) == count_to_remove(0, 0.9) == 0


numbers = st.one_of(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=40),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 2.0]), min_size=3, max_size=40),
)


def joined(masks: Masks) -> NDArray[np.bool_]:
    """All bits in the order of names."""
    return torch.cat([masks[n].reshape(-1) for n in sorted(masks)]).numpy()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("per", ["global", "layer"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_of_equal_weights_exactly_the_stated_number_goes_on_every_rank_alike(
    ranks: int, per: Literal["global", "layer"], criterion: Literal["magnitude", "random"]
) -> None:
    weights = {name: torch.full_like(w, -0.5) for name, w in small().items()}
    masks = dense_masks(weights, weights)
    rule = PruneConfig(0.2, criterion, per)
    found = on_ranks(ranks, lambda rank, gather: prune(weights, masks, rule, Partition(rank, ranks), gather))
    counts = {n: w.numel() for n, w in weights.items()}
    if per == "global":
        wanted = count_to_remove(sum(counts.values()), 0.2)
    else:
        wanted = sum(count_to_remove(c, 0.2, 0.5 if n == "output.weight" else 1.0) for n, c in counts.items())
    digests = set()
    for pruned in found:
        assert isinstance(pruned, PruneResult)
        assert pruned.removed == wanted == sum(counts.values()) - count_surviving(pruned.masks)
        digests.add(masking.digest(pruned.masks))
    assert len(digests) == 1


# -- laws of rounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["global", "layer"])
def test_pruned_weights_never_return_even_when_they_have_grown(per: Literal["global", "layer"]) -> None:
    weights = small()
    masks = dense_masks(weights, weights)
    for round_ in range(6):
        before, masks = masks, prune(weights, masks, PruneConfig(0.2, per=per)).masks
        assert not any(bool((masks[n] & ~before[n]).any()) for n in masks)
        assert count_surviving(masks) < count_surviving(before)
        weights = {n: torch.where(masks[n], some(*w.shape, seed=round_), 9.0) for n, w in weights.items()}


def test_global_and_layer_wise_are_the_same_on_one_tensor() -> None:
    weights = {"a.weight": some(9, 9)}
    masks = dense_masks(weights, weights)
    assert masking.digest(prune(weights, masks, PruneConfig(0.3)).masks) == (
        masking.digest(prune(weights, masks, PruneConfig(0.3, per="layer")).masks)
    )


def test_only_layer_wise_pruning_spares_the_output_layer_by_half() -> None:
    weights = {"attn.project_out.weight": some(101), "output.weight": some(101, seed=1)}
    masks = dense_masks(weights, weights)
    layer = prune(weights, masks, PruneConfig(0.2, per="layer"))
    assert {n: 101 - int(m.sum()) for n, m in layer.masks.items()} == {
        "attn.project_out.weight": 20,
        "output.weight": 10,
    }
    chosen = prune(weights, masks, PruneConfig(0.2, per="layer", output_layers=("*out*",), output_factor=0.1))
    assert {n: 101 - int(m.sum()) for n, m in chosen.masks.items()} == {
        "attn.project_out.weight": 2,
        "output.weight": 2,
    }
    everywhere = prune({n: w * 0 + 1 for n, w in weights.items()}, masks, FIFTH)
    assert everywhere.removed == count_to_remove(202, 0.2), "globally there is no exception"


def test_the_layer_wise_threshold_is_the_largest_of_all_layers() -> None:
    weights = {"a.weight": torch.arange(1.0, 12.0), "b.weight": torch.arange(101.0, 112.0)}
    pruned = prune(weights, dense_masks(weights, weights), PruneConfig(0.2, per="layer"))
    assert (pruned.threshold, pruned.removed) == (102.0, 4)


def test_tensors_without_a_mask_are_neither_counted_nor_pruned() -> None:
    weights = {"a.weight": torch.arange(1.0, 12.0), "a.bias": torch.zeros(100)}
    pruned = prune(weights, dense_masks(weights, ["a.weight"]), FIFTH)
    assert pruned.masks.keys() == {"a.weight"}
    assert pruned.removed == 2


# -- floors -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    numbers,
    st.sampled_from([0.01, 0.2, 0.5, 0.9, 0.99]),
    st.sampled_from([0.0, 0.0, 0.1, 0.3, 1 / 3, 0.5, 0.95]),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_the_weakest_go_ties_by_name_and_place_and_a_floor_spares_the_strongest(
    values: list[float], p: float, floor: float, ranks: int, dice: random.Random
) -> None:
    cuts = sorted(dice.randint(0, len(values)) for _ in range(3))
    flat, ends = np.array(values, dtype=np.float32), [0, *cuts, len(values)]
    living = np.array([dice.random() < 0.8 for _ in values])
    spans = list(zip("abcd", ends, ends[1:], strict=False))
    weights = {n: torch.from_numpy(flat[a:b].copy()).reshape(1, -1) for n, a, b in reversed(spans)}
    masks = {n: torch.from_numpy(living[a:b].copy()).reshape(1, -1) for n, a, b in spans}
    k = count_to_remove(int(living.sum()), p)
    expected, gone = living.copy(), 0
    for place in np.argsort(flat.view(np.int32) & 0x7FFFFFFF, kind="stable"):  # one by one, while its tensor may lose
        a, b = next((a, b) for _, a, b in spans if a <= place < b)
        if expected[place] and gone < k and expected[a:b].sum() > math.ceil(Fraction(str(floor)) * (b - a)):
            expected[place], gone = False, gone + 1
    rule = PruneConfig(p, floor=floor)
    found = on_ranks(ranks, lambda rank, gather: prune(weights, masks, rule, Partition(rank, ranks), gather))
    for pruned in found:
        if gone < k:
            assert isinstance(pruned, UserError) and "prune.floor: found" in str(pruned)
            continue
        assert isinstance(pruned, PruneResult)
        assert pruned.removed == k
        assert np.array_equal(joined(pruned.masks), expected)
        assert pruned.threshold == (float(np.abs(flat[living & ~expected].astype(np.float64)).max()) if k else 0.0)
        assert pruned.collapsed == tuple(n for n, a, b in spans if not expected[a:b].any())
    assert np.array_equal(joined(masks), living), "the old masks stay as they were"


def test_a_floor_that_leaves_too_few_weights_to_remove_is_refused_with_both_numbers() -> None:
    weights = small()
    with pytest.raises(UserError) as caught:
        prune(weights, dense_masks(weights, weights), PruneConfig(0.7, floor=0.4))
    assert str(caught.value) == (
        "prune.floor: found 0.4, which lets only 67 of 113 alive weights go, with prune.fraction 0.7, which asks for "
        "79. Lower one of them, or prune.rounds."
    )
    assert caught.value.everywhere
    with pytest.raises(ValueError, match="a floor belongs to per='global'"):
        prune(weights, dense_masks(weights, weights), PruneConfig(0.1, per="layer", floor=0.4))


# -- random masks -----------------------------------------------------------------------------------------------


def test_random_masks_depend_on_the_seed_and_not_on_the_weights() -> None:
    weights = small()
    masks = dense_masks(weights, weights)

    def drawn(of: Mapping[str, Tensor], seed: int) -> str:
        return masking.digest(prune(of, masks, PruneConfig(0.3, "random", seed=seed)).masks)

    assert drawn(weights, 1) == drawn({n: -7 * w for n, w in weights.items()}, 1)
    assert len({drawn(weights, seed) for seed in range(8)}) == 8
    assert drawn(weights, 1) != masking.digest(prune(weights, masks, PruneConfig(0.3)).masks)


def test_random_masks_spread_over_all_tensors() -> None:
    weights = {f"{i}.weight": torch.ones(1000) for i in range(4)}
    pruned = prune(weights, dense_masks(weights, weights), PruneConfig(0.5, "random"))
    assert all(400 < int(m.sum()) < 600 for m in pruned.masks.values())
    assert len({masking.digest({"x": m}) for m in pruned.masks.values()}) == 4, "each tensor has its own draw"


# -- scope ------------------------------------------------------------------------------------------------------


def test_the_published_scope_is_what_mir_l_prunes() -> None:
    of = sizes()
    chosen = in_scope(of, "published")
    assert len(chosen) == 401 - len(DEAD)
    assert list(chosen) == sorted(chosen)
    assert "encoder_level1.0.norm1.body.weight" in chosen, "scales of norms are pruned"
    left = set(of) - set(chosen)
    kinds = {"bias" if "bias" in n else n.rpartition(".")[2] for n in left}
    assert kinds == {"bias", "temperature", "prompt_param"}


def test_the_scope_may_be_all_or_globs() -> None:
    of = sizes()
    assert in_scope(of, "all") == tuple(sorted(of))
    found = in_scope(of, ("output.*", "*.temperature"))
    assert "output.weight" in found
    assert len(found) == 1 + 47


def test_a_glob_that_matches_nothing_is_refused_by_name() -> None:
    with pytest.raises(UserError) as caught:
        in_scope(["a.weight", "b.weight"], ("a.*", "decoder.*"))
    assert str(caught.value) == ("prune.scope: the glob 'decoder.*' matches no parameter. Names look like 'a.weight'.")
    assert caught.value.everywhere


# -- hard numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", [False, pytest.param(True, marks=pytest.mark.skipif(not FTZ, reason="no FTZ here"))])
def test_weights_below_the_normal_range_are_cut_exactly(flush: bool) -> None:
    weights = {"a.weight": torch.tensor([4, 3, 2, 1, 0, 0x3F800000], dtype=torch.int32).view(torch.float32)}
    masks = dense_masks(weights, weights)
    torch.set_flush_denormal(flush)
    try:
        pruned = prune(weights, masks, PruneConfig(0.5))
        subnormal = pruned.threshold == 2 * 2.0**-149
    finally:
        torch.set_flush_denormal(False)
    assert subnormal
    assert pruned.masks["a.weight"].tolist() == [True, True, False, False, False, True]


def test_slices_of_all_ranks_hold_every_weight_once() -> None:
    flat = torch.arange(11)
    for ranks in (1, 2, 3, 4, 13):
        assert torch.cat([Partition(rank, ranks).own_part(flat) for rank in range(ranks)]).tolist() == flat.tolist()
