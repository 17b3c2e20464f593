"""Counts the CPUs and GPUs available to training, and lists torch's collective backends."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "unable to allocate", "not enough memory")


class OutOfMemory(Exception):
    """Memory of the GPU or of the host did not suffice."""


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Raise OutOfMemory in place of the exceptions by which torch and numpy report that memory does not suffice."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(str(error)) from None
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if any(sign in str(error).lower() for sign in _OUT_OF_MEMORY):
            raise OutOfMemory(str(error).splitlines()[0]) from None
        raise


_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of malloc.h


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory for the next tensors, in the whole process; no effect without glibc.

    By default it returns large blocks to the kernel, which clears their pages again at the next use: measured as a
    fifth to a quarter of a training step on the CPU. Peak memory stays the same.
    """
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
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


def backends() -> dict[str, bool]:
    """Return which collective backends this torch build has, by name; empty without torch.distributed."""
    import torch.distributed

    if not torch.distributed.is_available():
        return {}
    return {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
