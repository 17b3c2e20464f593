"""Compiles networks with torch.compile: whole ones for images of any size, and their blocks for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl_dist.errors import UserError
from mirl_dist.models.restormer import TransformerBlock, pad_to_multiple

_CELL_PIXELS = 8
_MOST_SHAPES = 64
"""Limit on compilations of the code of a block: one per width, resolution and precision. torch's default is 8."""


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
            raise _scoring_error(error) from None

    def forward(self, image: Tensor) -> Tensor:
        from torch._dynamo.decorators import maybe_mark_dynamic
        from torch._dynamo.exc import TorchDynamoException

        height, width = image.shape[-2:]
        cells = F.pixel_unshuffle(pad_to_multiple(image, _CELL_PIXELS), _CELL_PIXELS)
        maybe_mark_dynamic(cells, (2, 3))  # else a square first image specialises on height == width
        try:
            restored: Tensor = self._network(cells)
        except TorchDynamoException as error:
            raise _scoring_error(error) from None
        return restored[..., :height, :width]


def compile_blocks(network: nn.Module, backend: Any = "inductor") -> None:
    """Compile each transformer block of a network in place, at its first input of each shape.

    Blocks of equal width and resolution share a compilation. Names of weights stay as they are. Compile before DDP
    wraps the network. backend: of torch.compile. Errors of a compilation: see `compiles_for_training`.
    """
    from torch._dynamo import config
    from torch._inductor import config as inductor

    # The name that torch before 2.7 knows too; now an alias of recompile_limit.
    config.cache_size_limit = max(config.cache_size_limit, _MOST_SHAPES)
    inductor.shape_padding = False  # whether a product is padded would be timed, and each start could round otherwise
    config.optimize_ddp = False  # else dynamo would cut a block inside DDP where DDP's buckets end
    for module in network.modules():
        if isinstance(module, TransformerBlock):
            module.compile(fullgraph=True, dynamic=False, backend=backend)


@contextmanager
def compiles_for_training() -> Iterator[None]:
    """Raise UserError in place of an error of torch.compile."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise _compile_error(error, "blocks are compiled for training", "train.compile") from None


def check_compiler() -> None:
    """Raise UserError if there is no C++ compiler, which torch.compile needs, before anything is compiled."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise _compile_error(error, "blocks are compiled for training", "train.compile") from None


def _scoring_error(error: Exception) -> UserError:
    return _compile_error(error, "the network is compiled for scoring", "evaluate.compile")


def _compile_error(error: Exception, where: str, key: str) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"found that torch.compile fails ({reason}), where {where}. Install a C++ compiler (g++), or set {key}=false."
    )
