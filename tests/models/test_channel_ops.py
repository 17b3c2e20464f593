"""Operations written for speed equal their formulas, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.published.promptir import PublishedPromptIR
from mirl_dist import models
from mirl_dist.cli.doctor import memory
from mirl_dist.models import channel_ops
from mirl_dist.models.channel_ops import cosine_scores, gated_projection, mix_values, pad_channels
from mirl_dist.models.promptir import resize_bilinear
from mirl_dist.models.restormer import TransformerBlock


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients of all inputs are equal up to rounding."""
    weights, results = None, []
    for function in (ours, plain):
        leaves = [value.clone().requires_grad_() for value in inputs]
        output = function(*leaves)
        weights = torch.randn_like(output) if weights is None else weights
        results.append((output, *torch.autograd.grad((output * weights).sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def per_head(channels: Tensor, heads: int) -> Tensor:
    """(B, P, C) to (B, N, P, D)."""
    return channels.unflatten(-1, (heads, -1)).transpose(1, 2)


def plain_scores(queries_keys: Tensor, heads: int) -> Tensor:
    queries, keys = (F.normalize(per_head(part, heads), dim=2) for part in queries_keys.chunk(2, dim=-1))
    return queries.mT @ keys


@pytest.fixture(params=["on a CPU", "as on a GPU"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "as on a GPU":
        monkeypatch.setattr(channel_ops, "_on_cpu", lambda tensor: False)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("heads", [1, 3])
def test_cosine_scores_are_products_of_normalised_channels(heads: int) -> None:
    torch.manual_seed(0)
    assert_same(lambda x: cosine_scores(x, heads), lambda x: plain_scores(x, heads), draw(2, 20, 12))


@pytest.mark.usefixtures("place")
def test_channels_that_are_almost_zero_count_as_1e_12_long_as_in_the_formula() -> None:
    torch.manual_seed(1)
    queries_keys = draw(1, 5, 8)
    queries_keys[..., 0], queries_keys[..., 5] = 1e-14, 3e-14
    unit = torch.full((), 1e-12, dtype=torch.float64)  # gradients of short channels are large: scale them
    assert_same(lambda x: cosine_scores(x * unit, 2), lambda x: plain_scores(x * unit, 2), queries_keys / unit)
    zero = torch.zeros(1, 5, 8, dtype=torch.float64, requires_grad=True)
    cosine_scores(zero, 2).sum().backward()
    assert zero.grad is not None and not zero.grad.any()


@pytest.mark.parametrize("pixels", [5, 40])
@pytest.mark.parametrize("heads", [1, 3])
def test_values_are_mixed_and_projected_in_either_order(pixels: int, heads: int) -> None:
    torch.manual_seed(2)

    def plain(attention: Tensor, values: Tensor, projection: Tensor) -> Tensor:
        mixed = per_head(values, heads) @ attention.mT
        return mixed.transpose(1, 2).flatten(2) @ projection.T

    assert_same(mix_values, plain, draw(2, heads, 12 // heads, 12 // heads), draw(2, pixels, 12), draw(7, 12))


def test_a_gated_projection_multiplies_the_halves_and_keeps_only_its_inputs() -> None:
    torch.manual_seed(3)

    def plain(hidden: Tensor, projection: Tensor) -> Tensor:
        gate, value = hidden.chunk(2, dim=-1)
        return (F.gelu(gate) * value) @ projection.T

    hidden, projection = draw(2, 3, 4, 10), draw(6, 5)
    assert_same(gated_projection, plain, hidden, projection)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_projection(hidden.requires_grad_(), projection.requires_grad_())
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 3, 4, 10), (6, 5)]


def test_padded_channels_are_zeros_up_to_a_multiple_of_eight() -> None:
    weight = torch.ones(2, 13, 3)
    padded = pad_channels(weight, dim=1)
    assert padded.shape == (2, 16, 3) and torch.equal(padded[:, :13], weight) and not padded[:, 13:].any()
    assert pad_channels(padded, dim=1) is padded


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (16, 16), (37, 23), (1, 1)])
def test_resizing_by_matrices_is_bilinear_interpolation(size: tuple[int, int]) -> None:
    torch.manual_seed(4)

    def plain(x: Tensor) -> Tensor:
        return F.interpolate(x.movedim(-1, 1), size, mode="bilinear", align_corners=False).movedim(1, -1)

    assert_same(lambda x: resize_bilinear(x, *size), plain, draw(2, 16, 16, 3))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracing does so
@pytest.mark.parametrize("side", [2, 16])
def test_a_block_is_one_graph_for_torch_compile_and_gives_the_same_bits(side: int) -> None:
    torch.manual_seed(5)
    block, x = TransformerBlock(8, 2, 2.66), torch.rand(2, side, side, 8, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    results = []
    for function in (block, compiled):
        output = function(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *block.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("place")
def test_under_autocast_outputs_and_gradients_are_those_of_float32_up_to_bfloat16() -> None:
    torch.manual_seed(6)
    block, x = TransformerBlock(16, 2, 2.66), torch.randn(2, 8, 8, 16, requires_grad=True)
    results = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = block(x)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), [x, *block.parameters()])))
    for full, half_result in zip(*results, strict=True):
        assert half_result.isfinite().all() and half_result.shape == full.shape
        assert (half_result - full).norm() < 0.05 * full.norm() + 1e-3


def test_a_step_keeps_at_most_three_quarters_of_what_the_published_one_keeps() -> None:
    with torch.device("meta"):
        images = torch.rand(8, 3, 64, 64)
        ours, published = (
            memory.saved_bytes(memory.loss_of(network, images, "fp32", "cpu"), network)
            for network in (models.create("promptir"), PublishedPromptIR())
        )
    assert ours < 0.75 * published
