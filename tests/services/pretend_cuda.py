"""CUDA for a machine without: tensors that report device cuda:0 and hold their numbers in the memory of the host.

Every operation is checked as a GPU would check it: operands on different devices are refused, and operations whose
backward pass has no deterministic kernel on CUDA are written down. So is every place where the host waits for the
device. What it cannot show: numbers of CUDA kernels, streams, memory, collectives between GPUs.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
# They take indices on the host.
_MIXES_DEVICES = _MOVES | {_aten.index.Tensor, _aten._index_put_impl_.default, _aten.index_put_.default}
# The host waits for the number, or for the size of the result.
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.bincount.default,
}
_RETURNS_PLAIN = {_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default}
# From the documentation of torch.use_deterministic_algorithms; cumsum of integers is deterministic.
_NOT_DETERMINISTIC = {
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool2d_backward",
    "grid_sampler_2d_backward",
    "histc",
    "kthvalue",
    "median",
    "put_",
}


class Journal:
    """What the host did: where it waited for the device, and what is not deterministic there; counted by place."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.not_deterministic: Counter[str] = Counter()


JOURNAL = Journal()


def _place() -> str:
    """The two innermost frames of the package: 'loop.py:9 train_round < round.py:1 _train'."""
    frame, places = sys._getframe(1), []
    while frame is not None and len(places) < 2:
        path = Path(frame.f_code.co_filename)
        if "mirl_dist" in path.parts and "tests" not in path.parts:
            places.append(f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(places) or "outside"


def _wait(kind: str) -> None:
    JOURNAL.waits[f"{kind}, {_place()}"] += 1


class CudaTensor(Tensor):
    """A tensor of the pretended GPU. inner: its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype, device=GPU)  # type: ignore

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"CudaTensor({self.inner})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        _wait("tolist")
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


class PretendedCuda(TorchDispatchMode):
    """Inside this context, tensors created on device 'cuda' are pretended ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _inner(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, CudaTensor) else tensor


def _is_pinned(tensor: Tensor, *_: Any) -> bool:
    return getattr(tensor, "pinned", False)


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of tensors of the host, the GPU or both."""
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    if not on_gpu and (device is None or device.type != "cuda"):
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        created = func(*args, **kwargs | {"pin_memory": False})
        created.pinned = True
        return created
    if func in _MOVES:
        return _move(func, args, kwargs, device)
    _check(func, tensors, args)
    on_host = kwargs if device is None else kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = pytree.tree_map_only(Tensor, _inner, (args, on_host))
    result = func(*inner_args, **inner_kwargs)
    return result if func in _RETURNS_PLAIN else _wrap(func, args, kwargs, result, on_gpu)


def _check(func: Any, tensors: list[Tensor], args: Any) -> None:
    """Refuse operands on different devices; write down waits and what is not deterministic."""
    name = func._schema.name.removeprefix("aten::")
    on_host = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor) and tensor.dim() > 0]
    if on_host and len(on_host) < len(tensors) and func not in _MIXES_DEVICES:
        raise RuntimeError(f"Expected all tensors to be on the same device, in {name} at {_place()}")
    is_float_sum = name == "cumsum" and tensors[0].is_floating_point()
    if name in _NOT_DETERMINISTIC or is_float_sum:
        JOURNAL.not_deterministic[f"{name}, {_place()}"] += 1
    if func in _WAITS:
        _wait(name)
    if func is _aten.index.Tensor and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        _wait("index by a mask")


def _move(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device | None) -> Any:
    """Copy between devices or on the GPU. The host goes on only if its side is pinned and it asks to."""
    if func is _aten.copy_.default:
        target, source = args[:2]
        is_asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        host_side = source if isinstance(target, CudaTensor) else target
        if isinstance(target, CudaTensor) != isinstance(source, CudaTensor) and not (
            is_asynchronous and _is_pinned(host_side)
        ):
            _wait("copy_")
        _inner(target).copy_(_inner(source))
        return target
    source, stays = args[0], device is None or device.type == "cuda"
    if isinstance(source, CudaTensor) and not stays:
        _wait("to the host")
    if not isinstance(source, CudaTensor) and not (kwargs.get("non_blocking") and _is_pinned(source)):
        _wait("to the GPU")
    options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    copy = func(_inner(source), **options)
    return CudaTensor(copy) if stays else copy


def _wrap(func: Any, args: Any, kwargs: Any, result: Any, on_gpu: list[CudaTensor]) -> Any:
    """Return the result as tensors of the GPU: those given, where the operation has changed them in place."""
    given = {id(tensor.inner): tensor for tensor in on_gpu}
    result = pytree.tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else CudaTensor(t), result)
    if on_gpu and any(argument.alias_info is not None for argument in func._schema.arguments):
        with contextlib.suppress(Exception):  # of operations on lists, whose results are None
            return return_and_correct_aliasing(func, args, kwargs, result)
    return result


class _Event:
    """torch.cuda.Event of a device that has always finished."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("event")

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


def _module_to(self: Any, *args: Any, **kwargs: Any) -> Any:
    """nn.Module.to, which would set `data` of parameters; those of the GPU are new ones."""
    if not args or torch.device(args[0]).type != "cuda":
        return _MODULE_TO(self, *args, **kwargs)
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, CudaTensor):
                module._parameters[name] = torch.nn.Parameter(CudaTensor(parameter.detach().clone()))
    return self


_MODULE_TO = torch.nn.Module.to


def build_guard(folder: Path) -> Path:
    """Compile pretend_cuda.cpp, which takes seconds. Processes that pretend need it as LD_PRELOAD: torch asks once."""
    torch_folder = Path(torch.__file__).parent
    source, library, libraries = Path(__file__).with_suffix(".cpp"), folder / "pretend_cuda.so", torch_folder / "lib"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}", str(source)]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Make torch believe in one GPU, in this process for good."""
    nothing = ("set_device", "_lazy_init", "manual_seed", "manual_seed_all")
    answers: dict[str, Any] = {
        **{name: lambda *_: None for name in nothing},  # a function each: torch's compiler has a rule for each name
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretended GPU",
        "synchronize": lambda *_: _wait("synchronize"),
        "Event": _Event,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    Tensor.is_pinned = _is_pinned  # type: ignore[assignment, method-assign]
    Tensor.pin_memory = _pinned  # type: ignore[assignment, method-assign]
    torch.nn.Module.to = _module_to  # type: ignore[assignment, method-assign]
    torch.inference_mode = lambda *_: torch.no_grad()  # type: ignore[assignment, misc]  # it knows no such tensors
    torch.autograd.set_multithreading_enabled(False)  # type: ignore[attr-defined]  # backward in this thread
    with PretendedCuda():
        yield
