"""Laws of the training loop that one process can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mirl_dist import models
from mirl_dist.ranks import Ranks

TINY: dict[str, Any] = {
    "dim": 8,
    "blocks": (1, 1, 1, 1),
    "refinement_blocks": 1,
    "prompt_dims": (8, 8, 8),
    "prompt_sizes": (4, 4, 4),
}


@pytest.mark.parametrize(("precision", "inside"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_precision_that_was_asked_for_is_that_of_the_layers_inside_the_wrapped_network(
    precision: str, inside: torch.dtype
) -> None:
    ranks = Ranks(device="cpu", precision=precision)
    model = models.create("promptir", **TINY)
    wrapped = ranks.wrap(model)
    bare = ranks.unwrap(wrapped)
    seen: list[torch.dtype] = []
    stem = bare.get_submodule("patch_embed.proj")
    assert isinstance(stem, nn.Conv2d)
    stem.register_forward_hook(lambda _module, _given, out: seen.append(out.dtype))
    with ranks.autocast():
        wrapped(torch.rand(1, 3, 16, 16))
    assert seen == [inside]
    bare(torch.rand(1, 3, 16, 16))
    assert seen[1] == torch.float32, "scores are computed in full precision"
    assert {p.dtype for p in bare.parameters()} == {torch.float32}


def test_the_throwaway_pass_leaves_no_gradient_and_no_changed_weight() -> None:
    ranks = Ranks(device="cpu")
    model = models.create("promptir", **TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ranks.settle(ranks.wrap(model), torch.zeros(1, 3, 16, 16))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
