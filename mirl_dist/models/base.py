"""What all networks share: any image size in and out, checks of sizes, and resizing with a deterministic backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mirl_dist.errors import UserError
from mirl_dist.models.restormer import pad_to_multiple


class ImageNetwork(nn.Module, ABC):
    """Base of the networks: float (B, 3, H, W), nominally in [0, 1], in and out, any H, W >= 1.

    A subclass sets `multiple`, what its sides must be multiples of, and defines `restore`.
    """

    multiple = 1

    def forward(self, image: Tensor) -> Tensor:
        """Return the restored image, which is not clipped. Raises UserError for an input of another shape."""
        return self.stages(image)[0]

    def stages(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return all images that the published network is trained on, each (B, 3, H, W): the restored one first."""
        self.check_image(image)
        height, width = image.shape[-2:]
        return tuple(stage[..., :height, :width] for stage in self.restore(self.pad(image)))

    def check_image(self, image: Tensor) -> None:
        """Raise a UserError for an input that is no batch of colour images."""
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise UserError(
                f"found an input of shape {tuple(image.shape)}, where {type(self).__name__} takes images of shape "
                "(B, 3, H, W), none of them 0. Give colour images: batch, channels, height, width."
            )

    def pad(self, image: Tensor) -> Tensor:
        """Pad an image at the bottom and right to the sides that `restore` takes."""
        return pad_to_multiple(image, self.multiple)

    @abstractmethod
    def restore(self, image: Tensor) -> tuple[Tensor, ...]:
        """Run the published network on an image whose sides fit; see `stages`."""

    def official_only_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors that the official class owns but never uses."""
        return {}


def check_sizes(network: str, problems: Iterable[str]) -> None:
    """Raise a UserError that lists all problems with the sizes of a network, if there are any."""
    if listed := "; ".join(problems):
        raise UserError(
            f"found sizes that do not fit: {listed}, where {network} is built. "
            "Change these numbers; the published ones are the defaults."
        )


def too_small(least: int, **sizes: int) -> list[str]:
    """Describe the sizes that are below `least`."""
    return [f"{key} = {size} (must be >= {least})" for key, size in sizes.items() if size < least]


def bad_rows(count: int, **rows: Sequence[int]) -> list[str]:
    """Describe the sizes per level that are not `count` numbers >= 1."""
    problems = []
    for key, row in rows.items():
        if len(row) != count:
            problems.append(f"{key} = {list(row)} has {len(row)} numbers (must be {count})")
        elif min(row) < 1:
            problems.append(f"{key} = {list(row)} (all must be >= 1)")
    return problems


def undivided(what: str, channels: Sequence[int], key: str, divisors: Sequence[int]) -> list[str]:
    """Describe the levels whose channels the number under `key` does not divide, e.g. attention heads."""
    return [
        f"{what} {at + 1} has {size} channels, which {key}[{at}] = {divisor} does not divide"
        for at, (size, divisor) in enumerate(zip(channels, divisors, strict=True))
        if size % divisor
    ]


def upsample_nearest(x: Tensor, factor: int) -> Tensor:
    """Repeat each pixel `factor` times in both directions."""
    return repeat(x, "b c h w -> b c (h y) (w x)", y=factor, x=factor)


def upsample_bilinear(x: Tensor) -> Tensor:
    """Double both sides by bilinear interpolation (align_corners=False), whose backward is deterministic on a GPU."""
    return _double(_double(x.mT).mT)


def _double(x: Tensor) -> Tensor:
    """Double the last axis: each new value is 3/4 of the nearest old one and 1/4 of the next; borders repeat."""
    before = torch.cat((x[..., :1], x[..., :-1]), dim=-1)
    after = torch.cat((x[..., 1:], x[..., -1:]), dim=-1)
    pairs = torch.stack((0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after), dim=-1)
    return rearrange(pairs, "... w two -> ... (w two)")


def pad_reflect(x: Tensor, pixels: int) -> Tensor:
    """Pad all four sides by reflection without repeating the border; the backward is deterministic on a GPU."""
    for axis in (-2, -1):
        side = x.shape[axis]
        before, after = x.narrow(axis, 1, pixels).flip(axis), x.narrow(axis, side - 1 - pixels, pixels).flip(axis)
        x = torch.cat((before, x, after), dim=axis)
    return x
