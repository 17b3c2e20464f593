"""Laws of the network that all ranks train, and of torch's settings, that one process can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mirl_dist import models
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.pruning import masks as masking

TINY: dict[str, Any] = {
    "dim": 8,
    "blocks": (1, 1, 1, 1),
    "refinement_blocks": 1,
    "prompt_dims": (8, 8, 8),
    "prompt_sizes": (4, 4, 4),
}


@pytest.mark.parametrize(("precision", "inside"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_precision_asked_for_is_that_of_the_layers_in_the_wrapped_network(
    precision: str, inside: torch.dtype
) -> None:
    ranks = Ranks(device="cpu", precision=precision)
    bare = models.create("promptir", **TINY)
    wrapped = ranks.network.wrap(bare)
    seen: list[torch.dtype] = []
    stem = bare.get_submodule("patch_embed.proj")
    assert isinstance(stem, nn.Conv2d)
    stem.register_forward_hook(lambda _module, _given, out: seen.append(out.dtype))
    ranks.network.forward(wrapped, torch.rand(1, 3, 16, 16))
    assert seen == [inside]
    bare(torch.rand(1, 3, 16, 16))
    assert seen[1] == torch.float32, "scores are computed in full precision"
    assert {p.dtype for p in bare.parameters()} == {torch.float32}


def test_the_throwaway_pass_leaves_no_gradient_and_no_changed_weight() -> None:
    ranks = Ranks(device="cpu")
    model = models.create("promptir", **TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ranks.network.warm_up(ranks.network.wrap(model), torch.zeros(1, 3, 16, 16))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_new_tensors_are_not_filled_and_steps_have_the_bits_of_filled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(device="cpu")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    digests = set()
    for fills in (False, True):
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fills)
        assert bool(torch.empty(64).isnan().all()) == fills
        torch.manual_seed(0)
        model = models.create("promptir", **TINY)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            ranks.network.backward(ranks.network.forward(model, torch.rand(2, 3, 16, 16)).square().mean())
            optimiser.step()
        digests.add(masking.digest_tensors(dict(model.named_parameters())))
    assert len(digests) == 1
