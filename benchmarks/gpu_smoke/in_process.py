"""The stages of gpu_smoke that compute with the package's parts, each in a process of its own; see __main__.py."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from mirl_dist import models
from mirl_dist.distributed import hardware
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning import prune as pruning
from mirl_dist.training import losses

Result = dict[str, Any]
TINY = {
    "dim": 8,
    "blocks": (1, 1, 1, 1),
    "refinement_blocks": 1,
    "prompt_dims": (8, 16, 32),
    "prompt_sizes": (16, 8, 4),
}
PACKAGES = (
    *("accelerate", "einops", "numpy", "pillow", "platformdirs", "psutil", "pydantic", "pyyaml", "rich", "safetensors"),
    *("scikit-image", "typer", "webdataset", "triton", "deepspeed", "mlflow", "boto3"),
)


def make_network(cpu: bool) -> nn.Module:
    torch.manual_seed(0)
    return models.create("promptir", **(TINY if cpu else {}))


def synchronize(cpu: bool) -> None:
    if not cpu:
        torch.cuda.synchronize()


def compile_by(cpu: bool) -> Any:
    """Return torch.compile; on a CPU, where only the script is tried, without the minutes of its C++ compiler."""
    return functools.partial(torch.compile, backend="aot_eager") if cpu else torch.compile


def facts(cpu: bool) -> Result:
    """Versions and the GPU."""
    found: Result = {"ok": True, "python": sys.version.split()[0], "torch": torch.__version__, "cpus": os.cpu_count()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    found["CUDA"] = hardware.why_no_cuda() or torch.version.cuda
    if cpu:
        return found
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit,mig.mode.current"
    smi = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return found | {
        "ok": torch.cuda.is_available(),
        "GPUs": torch.cuda.device_count(),
        "nvidia-smi": smi.stdout.strip(),
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def numbers(cpu: bool) -> Result:
    """Loss and gradients as on the CPU, the same bits twice; masks of a cut as on the CPU, to the bit."""
    hardware.choose_device("auto")
    hardware.use_exact_arithmetic()
    device = torch.device("cpu" if cpu else "cuda")
    reference, network = make_network(cpu), make_network(cpu).to(device)
    images = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    expected_loss, expected = gradients(reference, *images)
    found: Result = {}
    for precision in ("fp32", "bf16"):
        here = [image.to(device) for image in images]
        first, second = (gradients(network, *here, half=precision == "bf16") for _ in range(2))
        errors = [float((a.cpu() - b).norm() / (b.norm() + 1e-12)) for a, b in zip(first[1], expected, strict=True)]
        is_same = first[0] == second[0] and all(map(torch.equal, first[1], second[1]))
        figures = {"loss error": abs(first[0] - expected_loss), "gradient error": max(errors), "same bits": is_same}
        found[precision] = figures
    found |= cut(reference, device, cpu)
    found["ok"] = (
        found["fp32"]["gradient error"] < 1e-3
        and found["fp32"]["same bits"]
        and found["bf16"]["same bits"]
        and found["masks of the CPU"]
    )
    if not cpu:
        found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def gradients(network: nn.Module, degraded: Tensor, clean: Tensor, half: bool = False) -> tuple[float, list[Tensor]]:
    network.zero_grad()
    with torch.autocast(degraded.device.type, torch.bfloat16, enabled=half):
        restored = network(degraded)
    loss = losses.per_sample_l1(restored, clean).mean()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


def cut(network: nn.Module, device: torch.device, cpu: bool) -> Result:
    """Prune on both devices, with ties and subnormal weights among those that compete."""
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    first = next(iter(weights.values())).view(-1)
    first[: len(first) // 2], first[len(first) // 2 :] = 1e-41, 0.01
    dense = masking.dense_masks(weights, pruning.in_scope(weights, "published"))
    expected = pruning.prune(weights, dense, pruning.PruneConfig(0.2))
    there = {name: weight.to(device) for name, weight in weights.items()}
    masks = {name: mask.to(device) for name, mask in dense.items()}
    pruning.prune(there, masks, pruning.PruneConfig(0.2))
    synchronize(cpu)
    began = time.monotonic()
    found = pruning.prune(there, masks, pruning.PruneConfig(0.2))
    synchronize(cpu)
    seconds = round(time.monotonic() - began, 4)
    return {"masks of the CPU": masking.digest(found.masks) == masking.digest(expected.masks), "cut seconds": seconds}


def sizes(cpu: bool) -> Result:
    """Compile for images of any size, as evaluation does, and count the graphs of six sizes; restored as without."""
    from torch._dynamo.utils import counters

    from mirl_dist.errors import UserError
    from mirl_dist.models.compiled import Compiled

    hardware.use_exact_arithmetic()
    device = torch.device("cpu" if cpu else "cuda")
    network = make_network(cpu=True).to(device).eval()
    torch.compile = compile_by(cpu)
    compiled, error, began = Compiled(network), 0.0, time.monotonic()
    images = ((64, 64), (72, 96), (120, 80), (97, 131), (160, 160), (56, 200))
    for height, width in images[: 2 if cpu else 6]:
        image = torch.rand(1, 3, height, width, device=device)
        with torch.inference_mode():
            try:
                error = max(error, float((compiled(image) - network(image)).abs().max()))
            except UserError as fault:
                return {"ok": f"skipped: {str(fault)[:60]}"}
    graphs = int(counters["stats"]["unique_graphs"])
    seconds = round(time.monotonic() - began, 1)
    return {"ok": graphs <= 4 and error < 1e-3, "graphs": graphs, "error": error, "compiling": seconds}
