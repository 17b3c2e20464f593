"""`count_kernels.py REPORT`: what a training step of the published network launches on a GPU, without one.

The step runs on FakeTensors of device cuda:0, which have shapes and no numbers, under torch's own CUDA autocast.
REPORT: {precision: {part: [operations that launch kernels, gigabytes that they read and write]}} as JSON; parts:
forward, backward, update.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mirl_dist import models
from mirl_dist.distributed.engines.ddp import DdpEngine
from mirl_dist.training.losses import per_sample_l1
from tests.services.pretend_cuda import pretended_cuda

BATCH, PIXELS = 8, 64
LAUNCH_NOTHING = (
    "empty",
    "new_empty",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "sym_",
    "is_",
    "promote_types",
)


def nbytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(values) if isinstance(t, Tensor))


class Counted(TorchDispatchMode):
    """Counts operations and the bytes of their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.counts: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten" and not func.is_view and not name.startswith(LAUNCH_NOTHING):
            self.counts[self.part][0] += 1
            self.counts[self.part][1] += (nbytes((args, kwargs)) + nbytes(result)) / 1e9
        return result


def on_gpu(network: nn.Module) -> nn.Module:
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda:0"))
    return network


def count(precision: str) -> dict[str, list[float]]:
    with FakeTensorMode():
        network = on_gpu(models.create("promptir"))
        weights = dict(network.named_parameters())
        engine = DdpEngine(weights, lambda named: torch.optim.AdamW(list(named.values()), fused=True))
        degraded, clean = torch.empty(2, BATCH, 3, PIXELS, PIXELS, device="cuda:0").unbind()
        factors = {name: torch.empty_like(weight) for name, weight in engine.weights.items() if "weight" in name}
        refused = torch.empty((), device="cuda:0")
        with Counted() as counted:
            counted.part = "forward"
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
                restored = network(degraded)
            loss = per_sample_l1(restored, clean).mean()
            counted.part = "backward"
            loss.backward()
            counted.part = "first update"  # makes the moments
            engine.step(1e-3, refused)
            for weight in weights.values():
                weight.grad = torch.empty_like(weight)
            counted.part = "update"
            engine._factors = factors  # masks of no numbers cannot tell whether they prune
            engine.mask_gradients()
            engine.clip(1.0)
            engine.step(1e-3, refused)
    return counted.counts


if __name__ == "__main__":
    with pretended_cuda():
        pass  # torch believes in a GPU from here on
    torch.use_deterministic_algorithms(True)
    Path(sys.argv[1]).write_text(json.dumps({precision: count(precision) for precision in ("fp32", "bf16")}))
