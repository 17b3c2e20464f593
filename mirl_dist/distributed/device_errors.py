"""Errors of devices in one line: memory that does not suffice, and GPUs that fail."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from mirl_dist.errors import UserError

_OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "unable to allocate", "not enough memory"),
    *("cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
)
_GPU_FAILURE = re.compile(r"CUDA error|CUDA driver error|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|NCCL error")
_ASKED = re.compile(r"ried to allocate ([\d.]+) (\w+)")
_FULL_GPU = re.compile(r"GPU (\d+) has a total capacity of ([\d.]+ \w+)")


class OutOfMemory(Exception):
    """Memory of the GPU or of the host did not suffice."""


@contextlib.contextmanager
def out_of_memory() -> Iterator[None]:
    """Raise OutOfMemory in place of the exceptions by which torch and numpy report that memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error).splitlines()[0] if str(error) else "MemoryError") from None


@contextlib.contextmanager
def out_of_memory_in_training() -> Iterator[None]:
    """Raise UserError, which starts no rank again, in place of the exceptions that `out_of_memory` knows.

    The same step would need the same memory after a restart.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "Lower batch.forward (mirl-dist doctor CONFIG --launch FILE says what fits)"
        raise UserError(f"{describe_out_of_memory(error)} {advice}, or end what else runs there.") from None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def describe_out_of_memory(error: BaseException) -> str:
    """Return in a sentence whose memory did not suffice, how much that is, and what was asked for in addition."""
    text, place = str(error), "this machine"
    if match := _FULL_GPU.search(text):
        name = gpu_name(int(match.group(1)))
        place = f"GPU {match.group(1)} ({name + ', ' if name else ''}{match.group(2)})"
    elif "cuda" in text.lower() or "cublas" in text.lower() or "cudnn" in text.lower():
        place = this_gpu()
    asked = _ASKED.search(text)
    if asked is None:
        return f"found {place} out of memory."
    size = f"{int(asked[1]) / 2**30:.2f} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    return f"found {place} out of memory, where {size} more were needed."


def describe_gpu_failure(error: RuntimeError) -> str | None:
    """Return in one line that this process's GPU has failed, and the driver's reason; None for other errors."""
    import torch

    text = str(error)
    match = _GPU_FAILURE.search(text)
    if match is None and not isinstance(error, getattr(torch, "AcceleratorError", ())):  # torch 2.8 or newer
        return None
    reason = (text[match.start() if match else 0 :].strip().splitlines() or ["no reason given"])[0]
    return (
        f"{this_gpu()} has failed ({reason[:160]}). Look for Xid in the system's log of this node, and at nvidia-smi; "
        "CUDA_LAUNCH_BLOCKING=1 shows where. A run resumes from its last commit."
    )


def this_gpu() -> str:
    """Return number and name of this process's GPU: 'GPU 3 (NVIDIA H200)'."""
    index = int(os.environ.get("LOCAL_RANK", "0"))
    name = gpu_name(index)
    return f"GPU {index} ({name})" if name else f"GPU {index}"


def gpu_name(index: int) -> str:
    """Return the name of a GPU, or '' where it cannot be asked."""
    import torch

    with contextlib.suppress(RuntimeError, AssertionError):
        return str(torch.cuda.get_device_name(index))
    return ""
