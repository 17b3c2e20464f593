"""Laws of compiled networks: one graph, the numbers of the network itself, and the names of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from mirl_dist import models
from mirl_dist.errors import UserError
from mirl_dist.models import compiled
from mirl_dist.models.restormer import TransformerBlock
from mirl_dist.training import losses

# Warnings about what torch.compile itself does: it reads gradients of inputs that are no leaves, and makes instances of
# autograd functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
]

TINY: dict[str, Any] = {
    "dim": 8,
    "blocks": (2, 1, 1, 1),
    "refinement_blocks": 1,
    "prompt_dims": (8, 8, 8),
    "prompt_sizes": (4, 4, 4),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compilation of another test; determinism as in training."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):
        yield
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    torch.use_deterministic_algorithms(deterministic)


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.create("promptir", **TINY)


def images(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return losses.per_sample_l1(model(batch), batch.flip(0)).mean()


def assert_same_step(one: nn.Module, loss: Tensor, other: nn.Module, expected: Tensor) -> None:
    """Loss and gradients are equal up to the rounding of sums in another order."""
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients, all_wanted = (
        torch.autograd.grad(value, list(model.parameters())) for model, value in ((one, loss), (other, expected))
    )
    for (name, _), gradient, wanted in zip(one.named_parameters(), gradients, all_wanted, strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_forward_and_loss_are_one_graph() -> None:
    counter = CompileCounter()
    torch.compile(loss_of, backend=counter, fullgraph=True, dynamic=False)(network(), images())
    assert counter.frame_count == 1


@pytest.mark.long
def test_the_one_graph_computes_what_the_network_computes() -> None:
    model, batch = network(), images()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(loss_of, backend=counter, fullgraph=True, dynamic=False)
    loss, eager = step(model, batch), loss_of(model, batch)
    assert counter.frame_count == 1
    assert_same_step(model, loss, model, eager)


def test_compiled_blocks_compute_what_the_network_computes_under_the_same_names() -> None:
    eager, model, batch = network(), network(), images()
    names = list(model.state_dict())
    compiled.compile_blocks(model, backend="aot_eager")
    assert list(model.state_dict()) == names == list(eager.state_dict())
    assert_same_step(model, loss_of(model, batch), eager, loss_of(eager, batch))


def test_equal_blocks_share_a_compilation_and_there_is_room_for_all_shapes() -> None:
    model, counter = network(), CompileCounter()
    compiled.compile_blocks(model, backend=counter)
    for _ in range(3):
        loss_of(model, images()).backward()  # type: ignore[no-untyped-call]
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    assert len(blocks) == 13 and counter.frame_count == 8, "each width and resolution once, in three steps"
    loss_of(model, images(64))
    assert counter.frame_count == 16, "more than the 8 that torch allows by default"


def test_without_a_compiler_compiled_training_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    compiled.check_compiler()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"^found that torch.compile fails .*Install a C\+\+ compiler.*train.compile"):
        compiled.check_compiler()
