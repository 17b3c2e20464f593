"""Counts the CPUs and GPUs available to training, and lists torch's collective backends."""

from __future__ import annotations

import os


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


def backends() -> dict[str, bool]:
    """Return which collective backends this torch build has, by name; empty without torch.distributed."""
    import torch.distributed

    if not torch.distributed.is_available():
        return {}
    return {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
