"""Prints, by precision, the bytes that autograd keeps of a pass of the published network on a GPU that is not there.

FakeTensor computes shapes alone, under torch's own autocast for CUDA. Argument: the library of `build_guard`.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mirl_dist import models
from mirl_dist.cli.doctor import memory
from mirl_dist.training import losses


def kept_bytes(precision: str, samples: int, side: int) -> int:
    with FakeTensorMode():
        network = models.create("promptir")
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, torch.nn.Parameter(torch.empty(parameter.shape, device="cuda:0")))
        images = torch.empty(samples, 3, side, side, device="cuda:0")

        def loss() -> torch.Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
                restored = network(images)
            return losses.per_sample_l1(restored, images).mean()

        return memory.saved_bytes(loss, network)


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    print(json.dumps({precision: kept_bytes(precision, 8, 64) for precision in ("fp32", "bf16")}))
