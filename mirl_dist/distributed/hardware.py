"""The processors and GPUs of this machine: their number, which of them a rank computes on, and how exactly."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

_LEAST_TF32 = (8, 0)
"""Compute capability from which on GPUs have TF32."""


class DeviceChoice(NamedTuple):
    """Where this process computes.

    cpu: on its processors; otherwise on the GPU of its LOCAL_RANK. why_cpu: why it has no GPU; '' if it has one or none
    was asked for. fault: why this choice cannot be used, in one line; '' if it can.
    """

    cpu: bool
    why_cpu: str = ""
    fault: str = ""

    def note(self) -> str:
        """Return a line about processors that are used for want of a GPU, or ''."""
        return f"computes on processors: {self.why_cpu}" if self.why_cpu and not self.fault else ""


def choose_device(wanted: str) -> DeviceChoice:
    """Choose where this process computes; set the allocator, and what CUDA and DeepSpeed read when they start.

    wanted: 'auto' (a GPU if there is any), 'cpu' or 'cuda' (a GPU, or a fault).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matmul
    missing = "" if wanted == "cpu" else why_no_cuda()
    if wanted == "cpu" or missing:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed logs that it guesses the accelerator
        keep_freed_memory()
        fault = f"found device cuda where no GPU can be used: {missing}. Mend that, or choose cpu or auto."
        return DeviceChoice(True, missing, fault if wanted == "cuda" else "")
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), gpus()
    if local >= visible:  # NCCL rejects two ranks on one GPU with an unclear error
        fault = (
            f"rank {local} of this node finds {visible} GPUs and has none of its own. Start one rank per GPU, or add "
            "--set train.device=cpu to train on its processors."
        )
        return DeviceChoice(False, "", fault)
    return DeviceChoice(False)


def why_no_cuda() -> str:
    """Return why torch cannot compute on a GPU here, or '' if it can. Creates no CUDA context where it can."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch reports the driver's error only here
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
    else:
        reason = "no GPU is visible"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return reason if hidden is None else f"{reason} (CUDA_VISIBLE_DEVICES={hidden!r})"


def with_precision(choice: DeviceChoice, precision: str) -> DeviceChoice:
    """Return the choice, with a fault if that device cannot compute in the precision. precision: as in the config."""
    if precision != "tf32" or choice.fault:
        return choice
    if choice.cpu:
        reason = f" ({choice.why_cpu})" if choice.why_cpu else ""
        return choice._replace(
            fault=f"found train.precision tf32, but processors compute here{reason}, which do not have it. Use fp32."
        )
    import torch

    number = int(os.environ.get("LOCAL_RANK", "0"))
    if (version := torch.cuda.get_device_capability(number)) < _LEAST_TF32:
        fault = (
            f"found train.precision tf32, but GPU {number} ({torch.cuda.get_device_name(number)}, compute capability "
            f"{version[0]}.{version[1]}) does not have it; GPUs from 8.0 (Ampere) on do. Use fp32."
        )
        return choice._replace(fault=fault)
    return choice


def use_exact_arithmetic(precision: str = "fp32") -> None:
    """Make torch compute the same bits in every run, and in float32 without shortened products.

    precision: 'tf32' lets GPUs multiply float32 with 10 bits of mantissa; under every other name they must not. Sets
    process-wide switches: training, evaluation and restoring call this before their first tensor.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.use_deterministic_algorithms(True)
    # Determinism would also fill every new tensor before it is written: thousands of fills a step, and the same bits.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply float32 in full inside the context, whatever `use_exact_arithmetic` allows."""
    import torch

    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    allowed = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, before in zip(switches, allowed, strict=True):
            switch.allow_tf32 = before


_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of malloc.h


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory for the next tensors, in the whole process; no effect without glibc.

    By default it returns large blocks to the kernel, which clears their pages again at the next use: measured as a
    fifth to a quarter of a training step on the CPU. Peak memory stays the same.
    """
    if libc := _glibc():
        if not libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1):
            libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that older versions accept
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def return_freed_memory() -> None:
    """Return the memory that `keep_freed_memory` kept to the operating system."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def processes() -> int:
    """Return the default number of worker processes per rank: allowed CPUs divided by local ranks, at least 1.

    CPU quotas of cgroups are ignored.
    """
    # On Linux, the CPUs left by taskset, Slurm or a container's cpuset, not all CPUs of the node.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def gpus() -> int:
    """Return the number of GPUs visible to this process."""
    import torch

    return torch.cuda.device_count()


def gpus_for(device: str) -> int:
    """Return the number of GPUs that ranks of this node could use with that train.device."""
    return 0 if device == "cpu" else gpus()


def backends() -> dict[str, bool]:
    """Return which collective backends this torch build has, by name; empty without torch.distributed."""
    import torch.distributed

    if not torch.distributed.is_available():
        return {}
    return {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
