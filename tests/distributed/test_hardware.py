"""Which device a process computes on, why it has no GPU, and how exactly it computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mirl_dist.distributed import hardware
from mirl_dist.distributed.hardware import DeviceChoice


@pytest.fixture(autouse=True)
def variables_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "DS_ACCELERATOR", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def switches() -> Iterator[None]:
    """torch's process-wide switches, as they were."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def pretend_no_gpu(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def init() -> None:
        raise RuntimeError(reason)

    pretend_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "init", init)


def test_a_torch_without_cuda_says_so() -> None:
    if torch.version.cuda is not None:
        pytest.skip("for a torch without CUDA")
    reason = f"torch {torch.__version__} is built without CUDA"
    assert hardware.choose_device("cpu") == DeviceChoice(cpu=True)
    automatic, wanted = hardware.choose_device("auto"), hardware.choose_device("cuda")
    assert automatic == DeviceChoice(True, reason) and automatic.note() == f"computes on processors: {reason}"
    assert (
        wanted.fault == (f"found device cuda where no GPU can be used: {reason}. Mend that, or choose cpu or auto.")
        and wanted.note() == ""
    )


def test_a_missing_driver_and_hidden_gpus_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver."
    pretend_no_gpu(monkeypatch, driver)
    assert hardware.choose_device("auto").why_cpu == "Found no NVIDIA driver on your system"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pretend_no_gpu(monkeypatch, "No CUDA GPUs are available")
    assert hardware.choose_device("auto").why_cpu == "No CUDA GPUs are available (CUDA_VISIBLE_DEVICES='')"


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_rank_takes_the_gpu_of_its_number_or_is_refused(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hardware.choose_device(wanted) == DeviceChoice(cpu=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert hardware.choose_device(wanted).fault.startswith("rank 2 of this node finds 2 GPUs and has none of its own.")
    assert hardware.choose_device("cpu") == DeviceChoice(cpu=True)


@pytest.mark.parametrize("precision, tf32", [("fp32", False), ("bf16", False), ("tf32", True)])
def test_products_are_shortened_under_the_name_of_tf32_alone(precision: str, tf32: bool, switches: None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not tf32
    hardware.use_exact_arithmetic(precision)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_tf32_is_refused_on_processors_and_on_gpus_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, missing = DeviceChoice(cpu=True), DeviceChoice(True, "no GPU is visible")
    assert hardware.with_precision(asked, "bf16") == asked
    text = "found train.precision tf32, but processors compute here{}, which do not have it. Use fp32."
    assert hardware.with_precision(asked, "tf32").fault == text.format("")
    assert hardware.with_precision(missing, "tf32").fault == text.format(" (no GPU is visible)")
    gpu = DeviceChoice(cpu=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla T4")
    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number, capability=capability: capability)
        fault = hardware.with_precision(gpu, "tf32").fault
        assert bool(fault) == refused
        assert not refused or "GPU 0 (Tesla T4, compute capability 7.5) does not have it" in fault
    assert hardware.with_precision(gpu._replace(fault="none of its own"), "tf32").fault == "none of its own"
