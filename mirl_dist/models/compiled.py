"""Compiles a network with torch.compile for images of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl_dist.errors import UserError
from mirl_dist.models.restormer import pad_to_multiple

_CELL_PIXELS = 8


class _OnCells(nn.Module):
    """The network on cells of 8 x 8 pixels, (B, 64 C, h, w), so that the traced image sides are multiples of 8.

    Without this, the network's own padding puts remainders into the traced sizes, which torch 2.13 cannot compile
    (pytorch/pytorch issue 197716).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, cells: Tensor) -> Tensor:
        restored: Tensor = self.network(F.pixel_shuffle(cells, _CELL_PIXELS))
        return restored


class Compiled(nn.Module):
    """A network compiled at its first image, and recompiled for other sizes only if they are very small.

    Images (B, C, H, W) are padded to multiples of 8 by `pad_to_multiple`, and outputs cropped again. Weights may change
    between images. Outputs differ from the network's own by rounding. Raises UserError if compiling fails.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        try:
            self._network: Any = torch.compile(_OnCells(network), dynamic=True)
        except RuntimeError as error:  # this Python version or platform is not supported
            raise _compile_error(error) from None

    def forward(self, image: Tensor) -> Tensor:
        from torch._dynamo.decorators import maybe_mark_dynamic
        from torch._dynamo.exc import TorchDynamoException

        height, width = image.shape[-2:]
        cells = F.pixel_unshuffle(pad_to_multiple(image, _CELL_PIXELS), _CELL_PIXELS)
        maybe_mark_dynamic(cells, (2, 3))  # else a square first image specialises on height == width
        try:
            restored: Tensor = self._network(cells)
        except TorchDynamoException as error:
            raise _compile_error(error) from None
        return restored[..., :height, :width]


def _compile_error(error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"found that torch.compile fails ({reason}), where the network is compiled for scoring. "
        "Install a C++ compiler (g++), or set evaluate.compile=false."
    )
