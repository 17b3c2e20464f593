"""The memory that doctor counts, against torch's own autocast on tensors that say they lie on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mirl_dist import models
from mirl_dist.cli.doctor import memory
from mirl_dist.training import losses


def kept_bytes(precision: str) -> int:
    """What autograd keeps of a forward pass of the published network over 8 patches of 64 pixels on pretend cuda:0."""
    with FakeTensorMode():
        network = models.create("promptir")
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, torch.nn.Parameter(torch.empty(parameter.shape, device="cuda:0")))
        images = torch.empty(8, 3, 64, 64, device="cuda:0")

        def loss() -> torch.Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
                restored = network(images)
            return losses.per_sample_l1(restored, images).mean()

        return memory.saved_bytes(loss, network)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_counted_activations_are_within_a_tenth_of_those_on_a_fake_gpu(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    counted = memory.passes_of("promptir", {}, 64, precision, "cuda").of(8).saved
    real = kept_bytes(precision)
    assert real > 10**9 and counted == pytest.approx(real, rel=0.1)
