"""Moves small values between host and device without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Return the values as a float64 tensor on the device. The host does not wait for the transfer to a GPU."""
    on_host = torch.tensor(values, dtype=torch.float64)
    # From page-locked memory, which torch reuses only after the transfer.
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


class HostCopy:
    """A copy of a small tensor on its way to the host. It is queued behind the work that computes the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            cuda: Any = torch.cuda
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._arrived = cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the copy, but not for work queued after it, and return the values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._values.tolist()
        return values
