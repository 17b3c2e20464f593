"""Errors of torch and numpy about memory and GPUs become one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mirl_dist.distributed import device_errors
from mirl_dist.errors import UserError


def test_real_failures_of_torch_and_numpy_to_allocate_are_told_with_their_size() -> None:
    with (
        pytest.raises(UserError, match=r"found this machine out of memory, where 65536.00 GiB more were needed. Lower"),
        device_errors.out_of_memory_in_training(),
    ):
        torch.empty(2**46, dtype=torch.uint8)
    with pytest.raises(device_errors.OutOfMemory), device_errors.out_of_memory():
        np.ones(2**46, np.uint8)


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 3 has a total capacity of 44.34 GiB of which 4 MiB "
            "is free. Process 1 has",
            "found GPU 3 (A40, 44.34 GiB) out of memory, where 20.00 MiB more were needed.",
        ),
        ("CUDA error: out of memory\nCompile with", "found GPU 1 (A40) out of memory."),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "found GPU 1 (A40) out of memory.",
        ),
    ],
)
def test_a_full_gpu_is_named(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A40")
    assert device_errors.is_out_of_memory(RuntimeError(text))
    assert device_errors.describe_out_of_memory(RuntimeError(text)) == told


def test_failures_of_a_gpu_are_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    failed = device_errors.describe_gpu_failure(
        torch.AcceleratorError("CUDA error: uncorrectable ECC error\nCUDA kernel")
    )
    assert failed is not None and failed.startswith(
        "GPU 0 has failed (CUDA error: uncorrectable ECC error). Look for Xid"
    )
    network = device_errors.describe_gpu_failure(
        RuntimeError("[src.cpp:1] NCCL error in: x.cpp:9, unhandled cuda error")
    )
    assert network is not None and "(NCCL error in: x.cpp:9, unhandled cuda error)" in network
    assert device_errors.describe_gpu_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_other_errors_are_told_from_failures_by_a_torch_without_a_class_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch, "AcceleratorError")
    assert device_errors.describe_gpu_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="^shapes differ$"), device_errors.out_of_memory_in_training():
        raise RuntimeError("shapes differ")
