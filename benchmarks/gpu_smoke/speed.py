"""The stage `speed` of gpu_smoke: steps of the published network with one switch changed at a time; see __main__.py.

A step here is made of torch's own parts, so that switches can be changed. The rate of the training loop itself is
measured by the stage `full`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from in_process import compile_by, make_network, synchronize
from torch import nn

from mirl_dist.distributed import hardware
from mirl_dist.training import losses

Result = dict[str, Any]


class Switches(NamedTuple):
    """What one measurement of `speed` changes."""

    batch: int
    side: int
    half: bool = False
    deterministic: bool = True
    fill: bool = False
    tf32: bool = False
    benchmark: bool = False
    channels_last: bool = False
    fused: bool = True
    waits: bool = False
    compiled: bool = False
    profiled: bool = False


def speed(cpu: bool) -> Result:
    """Steps of the published network with one switch changed at a time: milliseconds, kernels, memory."""
    found: Result = {"ok": True}
    end = time.monotonic() + (100 if cpu else 110)
    for name, switches in variants(cpu).items():
        if time.monotonic() < end:
            found[name] = measure_safely(switches, cpu)
            print("RESULT " + json.dumps(found | {"ok": "stopped at its limit"}), flush=True)
    found["ok"] = all("error" not in figures for figures in found.values() if isinstance(figures, dict))
    return found


def variants(cpu: bool) -> dict[str, Switches]:
    """Return what is measured, in the order of its worth; compiling takes long, so it comes last."""
    base, found = Switches(2, 16) if cpu else Switches(8, 64), {}
    words = {"fp32": base, "bf16": base._replace(half=True)}
    found |= {f"{word} base": start._replace(profiled=True) for word, start in words.items()}
    if not cpu:
        found |= {f"{word} 32 of 128": s._replace(batch=32, side=128, profiled=s.half) for word, s in words.items()}
    for word, start in words.items():
        found |= {
            f"{word} channels last": start._replace(channels_last=True),
            f"{word} with fills": start._replace(fill=True),
            f"{word} not deterministic": start._replace(deterministic=False),
            f"{word} per tensor, with waits": start._replace(fused=False, waits=True),
        }
    found["tf32"] = base._replace(tf32=True)
    if not cpu:
        found |= {f"{word} cudnn.benchmark": start._replace(benchmark=True) for word, start in words.items()}
        compiled = words["bf16"]._replace(batch=32, side=128, compiled=True)
        found["bf16 32 of 128, blocks compiled"] = compiled
    return found | {f"{word} blocks compiled": words[word]._replace(compiled=True) for word in ("bf16", "fp32")}


def measure_safely(switches: Switches, cpu: bool) -> Result:
    """Return the figures, or the error, of one measurement; out of memory or without a compiler is no failure."""
    try:
        return measure(switches, cpu)
    except torch.OutOfMemoryError:
        return {"skipped": "does not fit"}
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        kind = "skipped" if "compiler" in str(error).lower() else "error"
        return {kind: f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        if not cpu:
            torch.cuda.empty_cache()


def measure(switches: Switches, cpu: bool) -> Result:
    torch._dynamo.reset()
    runs = 2 if cpu else 8
    with switched(switches):
        step = prepare(switches, torch.device("cpu" if cpu else "cuda"), cpu)
        began = time.monotonic()
        for _ in range(2):
            step()
        synchronize(cpu)
        warm_up = time.monotonic() - began
        if not cpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        for _ in range(runs):
            step()
        queued = time.monotonic() - began
        synchronize(cpu)
        seconds = (time.monotonic() - began) / runs
        figures: Result = {"ms": round(1e3 * seconds, 1), "samples/s": round(switches.batch / seconds, 1)}
        figures |= {"host ms": round(1e3 * queued / runs, 1), "warm-up s": round(warm_up, 1)}
        if not cpu:
            figures["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return figures | (profile(step, cpu) if switches.profiled else {})


@contextmanager
def switched(switches: Switches) -> Iterator[None]:
    hardware.use_exact_arithmetic("tf32" if switches.tf32 else "fp32")
    torch.use_deterministic_algorithms(switches.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = switches.fill
    torch.backends.cudnn.benchmark = switches.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


def prepare(switches: Switches, device: torch.device, cpu: bool) -> Callable[[], None]:
    """Return a function that does one training step."""
    network = make_network(cpu).to(device)
    images = torch.rand(switches.batch, 3, switches.side, switches.side, device=device)
    if switches.channels_last:
        images = images.to(memory_format=torch.channels_last)
        for parameter in network.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
    if switches.compiled:
        for module in network.modules():
            if type(module).__name__ == "TransformerBlock":
                module.forward = compile_by(cpu)(module.forward, fullgraph=True, dynamic=False)
    parameters = dict(network.named_parameters())
    alive = {name: torch.ones_like(p) for name, p in parameters.items() if "weight" in name}
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-5, fused=switches.fused or None)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if switches.half else nullcontext():
            restored = network(images)
        sample_losses = losses.per_sample_l1(restored, images)
        if switches.waits:
            bool(torch.isfinite(sample_losses.detach()).all())
        sample_losses.mean().backward()
        own = [parameters[name].grad for name in alive]
        if switches.fused:
            torch._foreach_mul_(own, list(alive.values()))
            norm = torch.stack(torch._foreach_norm([p.grad for p in parameters.values()])).norm()
        else:
            for gradient, mask in zip(own, alive.values(), strict=True):
                gradient.mul_(mask)
            norm = nn.utils.clip_grad_norm_(parameters.values(), float("inf"))
        if switches.waits:
            bool(torch.isfinite(norm))
        optimiser.step()
        optimiser.zero_grad()

    return step


def profile(step: Callable[[], None], cpu: bool) -> Result:
    """Count the kernels of one step, the time in which the GPU works, and the largest of them."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] if cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        synchronize(cpu)
    events, wanted = profiler.events(), "CPU" if cpu else "CUDA"
    kernels = [event for event in events if str(event.device_type).endswith(wanted)]
    time_of = (lambda e: e.self_cpu_time_total) if cpu else (lambda e: e.self_device_time_total)
    largest = sorted(profiler.key_averages(), key=time_of, reverse=True)[:8]
    return {
        "kernels": len(kernels),
        "busy ms": round(sum(map(time_of, kernels)) / 1e3, 1),
        "fills": sum(event.name == "aten::fill_" for event in events),
        "largest": [(e.key[:60], e.count, round(time_of(e) / 1e3, 2)) for e in largest],
    }
