"""Counts what this machine offers to training: processors, GPUs and collective libraries."""

from __future__ import annotations

import os


def processes() -> int:
    """Worker processes for this rank unless a user says otherwise: the processors that it may use, shared by its node.

    What cgroups' CPU quotas grant is not looked at.
    """
    # On Linux what taskset, Slurm or a container's cpuset leave, not all that the node has.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def gpus() -> int:
    """GPUs that this process could use."""
    import torch

    return torch.cuda.device_count()


def backends() -> dict[str, bool]:
    """The collectives that this torch was built with."""
    import torch.distributed

    if not torch.distributed.is_available():
        return {}
    return {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
