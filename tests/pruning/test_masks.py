"""Laws of masks and rewinding: pruned weights stay at zero, surviving ones return to their first values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks, find_unrewound, rewind, rewound_names
from mirl_dist.pruning.prune import PruneConfig, in_scope, prune
from tests.factories import small_promptir


def pruned(weights: dict[str, Tensor], fraction: float = 0.5) -> Masks:
    masks = masking.dense_masks(weights, in_scope(weights, "published"))
    return prune(weights, masks, PruneConfig(fraction)).masks


def first_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- masks ------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)
some_masks = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(shapes, st.integers(0, 99)).map(
        lambda drawn: torch.rand(drawn[0], generator=torch.Generator().manual_seed(drawn[1])) < 0.5
    ),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(some_masks)
def test_masks_come_back_from_their_bits(masks: Masks) -> None:
    packed = masking.pack(masks)
    assert all(p.dtype == torch.uint8 and p.numel() == (masks[n].numel() + 7) // 8 for n, p in packed.items())
    again = masking.unpack(packed, {n: tuple(m.shape) for n, m in masks.items()})
    assert again.keys() == masks.keys()
    assert all(again[n].dtype == torch.bool and torch.equal(again[n], masks[n]) for n in masks)
    assert masking.digest(again) == masking.digest(masks)


def test_the_first_weight_lies_in_the_highest_bit() -> None:
    assert masking.pack({"a": torch.tensor([[True, False], [False, True]])})["a"].tolist() == [0b10010000]


def test_bits_that_do_not_fit_the_network_are_refused_by_name() -> None:
    packed = masking.pack({"a": torch.ones(9, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"the mask of 'a' has 2 bytes for 17 weights"):
        masking.unpack(packed, {"a": (17,)})
    with pytest.raises(ValueError, match="masks and prunable tensors differ: b"):
        masking.unpack(packed, {"a": (9,), "b": (1,)})
    with pytest.raises(ValueError, match="masks and prunable tensors differ: a, b"):
        masking.unpack(packed, {"b": (9,)})


def test_the_digest_feels_every_bit_name_shape_and_nothing_else() -> None:
    base = {"a": torch.tensor([True, False, True]), "b": torch.ones(2, 4, dtype=torch.bool)}
    others: list[Masks] = [
        {"a": torch.tensor([True, True, True]), "b": base["b"]},
        {"a": base["a"], "b": base["b"].reshape(4, 2)},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"]},
        {"a": torch.tensor([True, False, True, False]), "b": base["b"]},
        {"b": base["a"], "a": base["b"]},
        {},
    ]
    digests = [masking.digest(m) for m in (base, *others)]
    assert len(set(digests)) == len(digests)
    assert masking.digest({"b": base["b"].clone(), "a": base["a"].clone()}) == digests[0]


def test_the_digest_of_tensors_feels_every_byte_and_the_dtype() -> None:
    weights = {"a": torch.tensor([0.0, 1.0])}
    others = [
        {"a": torch.tensor([-0.0, 1.0])},
        {"a": torch.tensor([0.0, 1.0 + 2**-23])},
        {"a": torch.tensor([[0.0, 1.0]])},
        {"a": torch.tensor([0.0, 1.0], dtype=torch.float64)},
        {"a": torch.tensor([0, 0x3F800000], dtype=torch.int32)},
    ]
    digests = [masking.digest_tensors(w) for w in (weights, *others)]
    assert len(set(digests)) == len(digests)
    turned = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert masking.digest_tensors({"a": turned.t()}) == masking.digest_tensors({"a": turned.t().contiguous()})


def test_counts_are_those_of_the_masks_and_not_of_zeros() -> None:
    masks = {"a": torch.tensor([True, True, False]), "b": torch.tensor([[True]])}
    assert (masking.count_surviving(masks), masking.size(masks)) == (3, 4)
    assert masking.densities(masks) == {"a": 2 / 3, "b": 1.0}
    weights = {"a": torch.zeros(3), "b": torch.zeros(1, 1), "c": torch.zeros(5)}
    assert masking.count_surviving(masking.dense_masks(weights, ["b", "a"])) == 4


def test_applying_masks_zeroes_the_pruned_and_leaves_the_surviving() -> None:
    weights = {"a": torch.tensor([-1.0, 2.0, float("nan")]), "b": torch.tensor([5.0])}
    masking.apply_masks(weights, {"a": torch.tensor([False, True, False])})
    assert weights["a"].tolist() == [0.0, 2.0, 0.0]
    assert weights["b"].tolist() == [5.0]


def test_a_pruned_weight_that_is_not_zero_is_named() -> None:
    masks = {"a": torch.tensor([True, False]), "b": torch.tensor([False, True])}
    zero = torch.tensor([0.0, 3.0])
    assert masking.find_nonzero_pruned({"a": torch.tensor([1.0, 0.0]), "b": zero}, masks) is None
    assert masking.find_nonzero_pruned({"a": torch.tensor([1.0, -0.0]), "b": zero}, masks) is None
    assert masking.find_nonzero_pruned({"a": torch.tensor([1.0, 1e-30]), "b": zero}, masks) == "a"
    assert (
        masking.find_nonzero_pruned({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([float("nan"), 0])}, masks) == "b"
    )
    for odd in (float("inf"), float("nan")):  # of a surviving weight
        assert masking.find_nonzero_pruned({"a": torch.tensor([odd, 0.0]), "b": zero}, masks) is None


# -- masks hold by gradients ------------------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam, weight decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw, one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
}


def steps(model: nn.Module, optimiser: torch.optim.Optimizer, masks: Masks, count: int) -> None:
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        clean = torch.rand(1, 3, 16, 16, generator=generator)
        optimiser.zero_grad()
        (model(clean + 0.1) - clean).abs().mean().backward()
        masking.mask_gradients(parameters, masks)
        nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimiser.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_pruned_weights_and_their_moments_stay_exactly_zero_under(name: str) -> None:
    model = small_promptir()
    masks = pruned(first_values(model))
    parameters = dict(model.named_parameters())
    masking.apply_masks(parameters, masks)
    before = first_values(model)
    optimiser = OPTIMISERS[name](list(model.parameters()))
    steps(model, optimiser, masks, 4)
    for tensor, mask in masks.items():
        pruned_values = parameters[tensor].detach()[~mask]
        assert torch.equal(pruned_values, torch.zeros_like(pruned_values)), tensor
        for kind, moment in optimiser.state[parameters[tensor]].items():
            if isinstance(moment, Tensor) and moment.shape == mask.shape:
                assert not moment[~mask].any(), f"{tensor}, {kind}"
        surviving = mask & (before[tensor] != 0)
        if surviving.any():
            assert not torch.equal(parameters[tensor].detach()[surviving], before[tensor][surviving]), f"{tensor} moves"
    assert masking.find_nonzero_pruned(parameters, masks) is None
    steps(model, OPTIMISERS[name](list(model.parameters())), {}, 1)
    assert masking.find_nonzero_pruned(parameters, masks) is not None, "without masked gradients they move"


def test_only_masked_gradients_are_touched() -> None:
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    weight.grad, other.grad = torch.tensor([1.0, -2.0, 3.0]), torch.ones(2)
    parameters = {"a": weight, "b": other, "c": nn.Parameter(torch.ones(1))}
    masks = {"a": torch.tensor([True, False, True]), "c": torch.tensor([False])}
    masking.mask_gradients(parameters, masks)
    assert weight.grad.tolist() == [1.0, 0.0, 3.0]
    assert other.grad.tolist() == [1.0, 1.0]
    assert parameters["c"].grad is None


def test_masked_gradients_have_the_bits_of_a_product_with_the_mask() -> None:
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), -1.5])
    gradient, mask = special.repeat(2), torch.arange(20) < 10
    weights = {name: nn.Parameter(torch.zeros(20)) for name in ("some", "none", "all")}
    masks = {"some": mask, "none": torch.zeros(20, dtype=torch.bool), "all": torch.ones(20, dtype=torch.bool)}
    for weight in weights.values():
        weight.grad = gradient.clone()
    factors = masking.gradient_factors(masks)
    assert factors.keys() == {"some", "none"}, "where every weight survives there is nothing to do"
    masking.mask_gradients(weights, factors)
    for name, weight in weights.items():
        assert weight.grad is not None
        assert torch.equal(weight.grad.view(torch.int32), (gradient * masks[name]).view(torch.int32))
    assert torch.signbit(weights["none"].grad[1]), "a negative gradient of a pruned weight becomes -0.0"  # type: ignore[index]


# -- rewinding --------------------------------------------------------------------------------------------------


def kind(name: str) -> str:
    return next((word for word in ("weight", "bias", "temperature", "prompt_param") if word in name), "?")


def test_all_rewinds_everything_and_published_weights_always_and_biases_once() -> None:
    names = list(first_values(small_promptir()))
    assert {kind(n) for n in names} == {"weight", "bias", "temperature", "prompt_param"}
    assert rewound_names(names, "published", 1) == {n for n in names if kind(n) in ("weight", "bias")}
    for round_ in (2, 3, 15):
        assert rewound_names(names, "all", round_) == rewound_names(names, "all", 1) == frozenset(names)
        assert rewound_names(names, "published", round_) == {n for n in names if kind(n) == "weight"}


@pytest.mark.parametrize("what", ["all", "published"])
def test_surviving_weights_return_to_their_first_values_and_pruned_ones_to_zero(what: str) -> None:
    model = small_promptir()
    initial = first_values(model)
    steps(model, OPTIMISERS["adamw"](list(model.parameters())), {}, 2)
    trained = first_values(model)
    masks = pruned(trained)
    weights = {n: p.data for n, p in model.named_parameters()}
    names = rewound_names(weights, what, 2)
    assert find_unrewound(weights, initial, masks, names) is not None, "training moved them"
    rewind(weights, initial, masks, names)
    assert find_unrewound(weights, initial, masks, names) is None
    assert masking.find_nonzero_pruned(weights, masks) is None
    for name, weight in weights.items():
        expected = initial[name] if name in names else trained[name]
        if name in masks:
            expected = expected.masked_fill(~masks[name], 0.0)
        assert torch.equal(weight, expected), name
    assert all(torch.equal(v, first_values(small_promptir())[n]) for n, v in initial.items()), "the first values stay"


def test_rewinding_nothing_only_zeroes_the_pruned() -> None:
    weights = {"a.weight": torch.tensor([1.0, 2.0]), "b.bias": torch.tensor([3.0])}
    initial = {name: torch.zeros_like(w) for name, w in weights.items()}
    rewind(weights, initial, {"a.weight": torch.tensor([False, True])}, frozenset())
    assert weights["a.weight"].tolist() == [0.0, 2.0]
    assert weights["b.bias"].tolist() == [3.0]


def test_a_tensor_that_did_not_return_is_named() -> None:
    initial = {"a.weight": torch.tensor([1.0, 2.0]), "b.weight": torch.tensor([3.0])}
    masks = {"a.weight": torch.tensor([False, True])}
    good = {"a.weight": torch.tensor([0.0, 2.0]), "b.weight": torch.tensor([3.0])}
    names = frozenset(initial)
    assert find_unrewound(good, initial, masks, names) is None
    assert find_unrewound(good | {"b.weight": torch.tensor([3.0 + 2**-22])}, initial, masks, names) == "b.weight"
    assert find_unrewound(good | {"a.weight": torch.tensor([1.0, 2.0])}, initial, masks, names) == "a.weight"
    assert find_unrewound(good | {"b.weight": torch.tensor([9.0])}, initial, masks, frozenset({"a.weight"})) is None
