"""The networks: equal to the published ones in numbers and names, and open to any image size."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mirl_dist import models
from mirl_dist.errors import UserError
from mirl_dist.models.restormer import pad_to_multiple

GOLDEN = Path(__file__).parent / "golden"
SMALL: dict[str, Any] = {
    "dim": 4,
    "blocks": (1, 1, 1, 1),
    "refinement_blocks": 1,
    "heads": (1, 2, 2, 4),
    "prompt_dims": (4, 8, 16),
    "prompt_sizes": (8, 4, 2),
}
DEAD = 215_296


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"promptir_{name}.json").read_text())
    return found


def small(seed: int = 0) -> models.PromptIR:
    torch.manual_seed(seed)
    return models.create("promptir", **SMALL)


def meta_promptir() -> models.PromptIR:
    """The published network, without values."""
    with torch.device("meta"):
        return models.create("promptir")


def hashed(count: int, index: int) -> Tensor:
    """The recipe's numbers: an integer hash of (position, tensor index), float64 in [-0.5, 0.5)."""
    prime = 1_000_003
    k = torch.arange(count) % prime
    return ((611_953 * k * k + 350_377 * k + 104_729 * index + 1_299_709) % prime).double() / prime - 0.5


def hashed_image(shape: list[int]) -> Tensor:
    return (hashed(torch.Size(shape).numel(), 123) + 0.5).reshape(shape)


def filled(names: list[str]) -> nn.Module:
    """The full network in float64; each tensor's values follow from its place in the sorted list `names`."""
    network = meta_promptir().double().to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            u = hashed(tensor.numel(), names.index(name)).reshape(tensor.shape)
            if tensor.ndim in (2, 4):
                tensor.copy_(3.5 * u / (tensor.numel() / tensor.shape[0]) ** 0.5)
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * u if name.endswith("bias") else 0.8 + 0.8 * u)
            else:
                tensor.copy_(1 + u)
    return network


def assert_statistics(found: Tensor, wanted: Mapping[str, Any], where: str) -> None:
    assert list(found.shape) == wanted["shape"], where
    measured: dict[str, Any] = {
        "mean": found.mean().item(),
        "std": found.std(correction=0).item(),
        "min": found.min().item(),
        "max": found.max().item(),
        "first5": found.flatten()[:5].tolist(),
    }
    for key in measured.keys() & wanted.keys():
        assert measured[key] == pytest.approx(wanted[key], rel=1e-9), (where, key)
    for place, value in wanted.get("at", {}).items():
        at = tuple(int(axis) for axis in place.split(","))
        assert found[at].item() == pytest.approx(value, rel=1e-9), (where, place)


def run_case_a(network: nn.Module, published: Mapping[str, Any]) -> Tensor:
    """Run the network on the published input A; its output and those of all its direct children are as published."""
    stages: dict[str, Tensor] = {}

    def record(name: str, output: Tensor) -> None:
        stages.setdefault(name, output.detach().movedim(-1, 1))  # our stages are channels last

    for name, child in network.named_children():
        child.register_forward_hook(lambda _module, _inputs, output, name=name: record(name, output))
    case = published["cases"]["A"]
    output: Tensor = network(hashed_image(case["input_shape"]))
    assert_statistics(output.detach(), case["outputs"][0], "A")
    assert stages.keys() >= published["stages"].keys()
    for name, wanted in published["stages"].items():
        assert_statistics(stages[name], wanted, name)
    return output


@pytest.mark.long
def test_promptir_equals_the_published_network_in_every_stage_output_and_gradient() -> None:
    published = golden("official")
    tensors: dict[str, tuple[list[int], float | None]] = published["tensors"]
    network = filled(sorted(tensors))
    assert {name for name, _ in network.named_children()} == published["stages"].keys()
    output, case = run_case_a(network, published), published["cases"]["A"]
    loss = (output * hashed(output.numel(), 999).reshape(output.shape)).mean()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm().item() == pytest.approx(tensors[name][1], rel=1e-8), name

    case = published["cases"]["B"]
    with torch.no_grad():
        assert_statistics(network(hashed_image(case["input_shape"])), case["outputs"][0], "B")


@pytest.mark.long
def test_promptir_equals_the_published_variant_without_unused_tensors() -> None:
    names = sorted(name for name, _ in meta_promptir().named_parameters())
    with torch.no_grad():
        run_case_a(filled(names), golden("without_dead"))
    assert len(names) == 542


def test_promptir_has_the_published_names_and_shapes_except_the_unused_six() -> None:
    published = {name: tuple(shape) for name, (shape, _) in golden("official")["tensors"].items()}
    without_gradient = {name for name, (_, norm) in golden("official")["tensors"].items() if norm is None}
    network = meta_promptir()
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert {name: published[name] for name in without_gradient} == network.official_only_shapes()
    assert ours == {name: shape for name, shape in published.items() if name not in without_gradient}
    assert not list(network.buffers())


def test_promptir_has_the_published_number_of_parameters_in_every_class() -> None:
    network = meta_promptir()
    count = {name: tensor.numel() for name, tensor in network.named_parameters()}

    def total(word: str) -> tuple[int, int]:
        sizes = [size for name, size in count.items() if word in name]
        return len(sizes), sum(sizes)

    assert total("") == (542, 35_376_967)
    assert sum(count.values()) + DEAD == golden("official")["parameters"]
    assert total("weight") == (401 - 6, 33_199_064 - DEAD)
    assert total("bias") == (97, 17_359)
    assert total("temperature") == (47, 160)
    assert total("prompt_param") == (3, 2_375_680)
    assert [total(f"prompt{k}.")[1] for k in (1, 2, 3)] == [1_348_069, 803_781, 1_333_125]


def test_a_fresh_network_starts_from_the_published_initial_values() -> None:
    network = small(3)
    for name, tensor in network.named_parameters():
        if "temperature" in name or re.search(r"norm\d\.body\.weight", name):
            assert bool((tensor == 1).all()), name
        elif "body.bias" in name:
            assert bool((tensor == 0).all()), name
        elif "prompt_param" in name:
            assert 0 <= tensor.min().item() < 0.2 and 0.8 < tensor.max().item() < 1, name
        elif tensor.ndim == 4:
            bound = (tensor.numel() / tensor.shape[0]) ** -0.5
            assert tensor.abs().max().item() <= bound, name
    again = small(3).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 3, 37, 51), (2, 3, 5, 3), (1, 3, 1, 1), (1, 3, 8, 13), (1, 3, 1, 16)])
def test_any_image_size_comes_back_as_it_went_in(shape: tuple[int, ...]) -> None:
    network = small()
    image = torch.rand(shape)
    output = network(image)
    assert output.shape == image.shape
    assert output.dtype == image.dtype
    assert bool(output.isfinite().all())
    grown = pad_to_multiple(image, 8)
    assert torch.equal(output, network(grown)[..., : shape[2], : shape[3]])


def test_padding_reflects_as_far_as_the_side_reaches_and_then_repeats_the_border() -> None:
    row = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
    assert pad_to_multiple(row, 8)[0, 0].tolist() == [[1.0, 2.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]] * 8
    column = torch.arange(6.0).reshape(1, 1, 6, 1)
    assert pad_to_multiple(column, 8)[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
    fits = torch.rand(1, 3, 16, 24)
    assert pad_to_multiple(fits, 8) is fits


def test_images_of_a_batch_do_not_influence_each_other() -> None:
    network = small().double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, rtol=1e-12, atol=1e-12)


def test_every_parameter_learns() -> None:
    network = small()
    network(torch.rand(2, 3, 16, 16)).square().mean().backward()
    for name, tensor in network.named_parameters():
        assert tensor.grad is not None and bool(tensor.grad.any()), name


def test_the_network_exports_and_the_exported_program_gives_the_same_bits() -> None:
    network = small().eval()
    exported = torch.export.export(network, (torch.rand(2, 3, 13, 21),))
    image = torch.rand(2, 3, 13, 21)
    with torch.no_grad():
        assert torch.equal(exported.module()(image), network(image))


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 0, 16)])
def test_an_input_that_is_no_batch_of_colour_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=re.escape(f"found an input of shape {shape}, where PromptIR takes")):
        small()(torch.zeros(shape))


def test_unknown_networks_and_sizes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"found the network name 'prompir', where .* Use one of: promptir\."):
        models.create("prompir")
    with pytest.raises(UserError, match=r"found unknown sizes 'width', 'deep', where .* Its sizes are: .*_heads\."):
        models.create("promptir", width=3, dim=8, deep=1)
    with pytest.raises(UserError, match="Use one of: promptir"):
        models.from_official("restormer", {})


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"dim": 5}, "dim = 5 is odd"),
        ({"dim": 0}, "dim = 0 (must be >= 1)"),
        ({"heads": (1, 3, 2, 4)}, "level 2 has 8 channels, which heads[1] = 3 does not divide"),
        ({"heads": (1, 2, 2)}, "heads = [1, 2, 2] has 3 numbers (must be 4)"),
        ({"blocks": (1, 0, 1, 1)}, "blocks = [1, 0, 1, 1] (all must be >= 1)"),
        (
            {"prompt_dims": (5, 8, 16)},
            "prompt 1 is read with 8 + 5 = 13 channels, which prompt_heads = 4 does not divide",
        ),
        ({"prompt_sizes": (8, 4)}, "prompt_sizes = [8, 4] has 2 numbers (must be 3)"),
        ({"refinement_blocks": -1}, "refinement_blocks = -1 (must be >= 0)"),
        ({"ffn_expansion": 0.2}, "ffn_expansion = 0.2 leaves no hidden channel at dim = 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_their_numbers(sizes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)) as caught:
        models.create("promptir", **(SMALL | sizes))
    assert "where PromptIR is built. Change these numbers" in str(caught.value)


def test_all_bad_sizes_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"heads\[1\] = 3 .* 13 channels"):
        models.create("promptir", **(SMALL | {"heads": (1, 3, 2, 4), "prompt_dims": (5, 8, 16)}))


def test_official_tensors_convert_bare_with_prefix_and_in_lightnings_checkpoint() -> None:
    torch.manual_seed(1)
    official = {name: torch.empty(shape).normal_() for name, (shape, _) in golden("official")["tensors"].items()}
    prefixed = {f"net.{name}": tensor for name, tensor in official.items()}
    checkpoints: list[dict[str, Any]] = [official, prefixed, {"epoch": 3, "state_dict": prefixed}]
    for converted in (models.from_official("promptir", checkpoint) for checkpoint in checkpoints):
        assert converted.dropped == (
            "chnl_reduce1.weight (64, 64, 1, 1)",
            "chnl_reduce2.weight (128, 128, 1, 1)",
            "chnl_reduce3.weight (256, 320, 1, 1)",
            "reduce_noise_channel_1.weight (48, 112, 1, 1)",
            "reduce_noise_channel_2.weight (96, 224, 1, 1)",
            "reduce_noise_channel_3.weight (192, 448, 1, 1)",
        )
        meta_promptir().load_state_dict(converted.weights, strict=True, assign=True)
        assert all(torch.equal(tensor, official[name]) for name, tensor in converted.weights.items())
    without_unused = models.from_official("promptir", converted.weights)
    assert without_unused.dropped == () and list(without_unused.weights) == list(converted.weights)


def test_official_tensors_convert_at_other_sizes() -> None:
    weights = small().state_dict()
    assert list(models.from_official("promptir", weights, **SMALL).weights) == list(weights)
    with pytest.raises(UserError, match=r"found \d+ misshapen \(.* give the sizes"):
        models.from_official("promptir", weights, **(SMALL | {"dim": 8}))


def test_missing_unknown_and_misshapen_tensors_are_all_listed_at_once() -> None:
    weights = dict(small().state_dict())
    del weights["output.weight"]
    weights["extra.bias"] = torch.zeros(7)
    weights["patch_embed.proj.weight"] = torch.zeros(4, 1, 3, 3)
    weights["prompt1.linear_layer.bias"] = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(UserError) as caught:
        models.from_official("promptir", weights, **SMALL)
    assert str(caught.value) == (
        "found 1 missing ('output.weight'); 1 unknown ('extra.bias' (7,)); "
        "1 misshapen ('patch_embed.proj.weight' is (4, 1, 3, 3), the network has (4, 3, 3, 3)); "
        "1 not floating-point ('prompt1.linear_layer.bias' is torch.int64), "
        "where an official checkpoint of 'promptir' was read. "
        "Use a checkpoint of this very network, and give the sizes that it was trained with."
    )


def test_long_lists_of_wrong_tensors_are_cut_but_counted() -> None:
    total = len(small().state_dict())
    expected = rf"found {total} missing \(('[^']+', ){{7}}'[^']+', and {total - 8} more\), where"
    with pytest.raises(UserError, match=expected):
        models.from_official("promptir", {}, **SMALL)


def test_mixed_prefixes_and_entries_that_are_no_tensors_are_refused() -> None:
    weights = small().state_dict()
    mixed = {f"net.{name}": tensor for name, tensor in weights.items()} | {"loss.scale": torch.ones(1)}
    with pytest.raises(UserError, match=r"names with the prefix 'net\.' and 1 without it \('loss\.scale'\)"):
        models.from_official("promptir", mixed, **SMALL)
    with pytest.raises(UserError, match=r"found 1 entries that are no tensors \('weights' is dict\)"):
        models.from_official("promptir", {"weights": dict(weights)}, **SMALL)
    with pytest.raises(UserError, match="'state_dict' is list"):
        models.from_official("promptir", {"state_dict": []}, **SMALL)


@pytest.mark.parametrize(
    "wrap, note",
    [
        (lambda w: {f"module.{n}": t for n, t in w.items()}, "removed from all names: the prefix 'module.'"),
        (lambda w: {f"module.net.{n}": t for n, t in w.items()}, "removed from all names: the prefix 'module.net.'"),
        (lambda w: {f"net._orig_mod.{n}": t for n, t in w.items()}, "the prefix 'net._orig_mod.'"),
        (lambda w: {"params": w, "iter": 5}, "taken: the weights under 'params'"),
        (
            lambda w: {"params": {n: t + 1 for n, t in w.items()}, "params_ema": w},
            "taken: the weights under 'params_ema', not those under 'params'",
        ),
        (lambda w: {"epoch": 3, "model_state_dict": w}, "taken: the weights under 'model_state_dict'"),
        (lambda w: {n: t.double() for n, t in w.items()}, "converted to float32: 40 tensors of float64"),
    ],
)
def test_wrappers_and_precisions_of_other_programs_are_taken_and_noted(wrap: Any, note: str) -> None:
    weights = small().state_dict()
    converted = models.from_official("promptir", wrap(weights), **SMALL)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in converted.weights.items())
    assert any(note.replace("40", str(len(weights))) in text for text in converted.notes), converted.notes


def test_half_precision_is_widened_and_values_that_are_none_refused() -> None:
    weights = {name: tensor.half() for name, tensor in small().state_dict().items()}
    converted = models.from_official("promptir", weights, **SMALL).weights
    assert all(t.dtype == torch.float32 and torch.equal(t, weights[n].float()) for n, t in converted.items())
    weights[next(iter(weights))].view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="1 tensors with NaN or infinite values in float32"):
        models.from_official("promptir", weights, **SMALL)
