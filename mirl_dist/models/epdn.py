"""EPDN's generator: Qu et al., CVPR 2019, "Enhanced Pix2pix Dehazing Network".

Written from the paper and from measurements of the official class (ErinChen1/EPDN at 0941038); parameters have the
official names. Two affine norms that the class owns but never uses are absent (`official_only_shapes`). The published
network needs sides that are multiples of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirl_dist.models.base import ImageNetwork, check_sizes, pad_reflect, too_small, upsample_nearest
from mirl_dist.models.restormer import pad_to_multiple

POOLS = (32, 16, 8, 4)


class ReflectionPad(nn.Module):
    """Pads all sides by reflection."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        return pad_reflect(x, self.pixels)


def padded_conv(before: int, after: int, kernel: int) -> list[nn.Module]:
    """Build a convolution with reflection padding that keeps the size of the image: two modules."""
    return [ReflectionPad(kernel // 2), nn.Conv2d(before, after, kernel)]


def normed(layer: nn.Module, channels: int) -> list[nn.Module]:
    """Build a layer with instance norm and ReLU: three modules."""
    return [layer, nn.InstanceNorm2d(channels), nn.ReLU()]


def down(channels: int) -> list[nn.Module]:
    """Build half the resolution with twice the channels: three modules."""
    return normed(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), 2 * channels)


def up(channels: int) -> list[nn.Module]:
    """Build twice the resolution with half the channels: three modules."""
    half = channels // 2
    return normed(nn.ConvTranspose2d(channels, half, 3, stride=2, padding=1, output_padding=1), half)


class ReflectedResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), with reflection padding: (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (padded_conv(channels, channels, 3) for _ in range(2))
        norms = [nn.InstanceNorm2d(channels), nn.ReLU()]
        self.conv_block = nn.Sequential(*first, *norms, *second, nn.InstanceNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_block(x)
        return out


class PyramidEnhancer(nn.Module):
    """Adds the context of four coarser grids: two images (B, 6, H, W) to one (B, 3, H, W), sides multiples of 32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.refine1 = nn.Conv2d(6, channels, 3, padding=1)
        self.refine2 = nn.Conv2d(channels, channels, 3, padding=1)
        for at, _ in enumerate(POOLS, start=1):
            self.add_module(f"conv10{at}0", nn.Conv2d(channels, 1, 1))
        self.refine3 = nn.Conv2d(channels + len(POOLS), 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.refine2(F.leaky_relu(self.refine1(images), 0.2)), 0.2)
        grids = []
        for at, side in enumerate(POOLS, start=1):
            grid = self.get_submodule(f"conv10{at}0")(F.avg_pool2d(x, side))
            grids.append(upsample_nearest(F.leaky_relu(grid, 0.2), side))
        return torch.tanh(self.refine3(torch.cat((*grids, x), dim=1)))


class EPDN(ImageNetwork):
    """A generator of two resolutions (pix2pixHD's) and two enhancers after it. 17,378,849 parameters in 78 tensors.

    width: channels of the local branch; the global one, at half the resolution, has twice as many. downs: steps down of
    the global branch. blocks, local_blocks: residual blocks of the two branches. enhancer_width: channels of the
    enhancers. Takes and gives [0, 1]; the published range [-1, 1] is made inside. `stages` gives the dehazed image, and
    the generator's. Initial values are PyTorch's. Raises UserError for sizes that do not fit, naming each.
    """

    def __init__(
        self, width: int = 16, downs: int = 4, blocks: int = 3, local_blocks: int = 3, enhancer_width: int = 20
    ) -> None:
        problems = too_small(1, width=width, downs=downs, blocks=blocks, local_blocks=local_blocks)
        check_sizes("EPDN", problems + too_small(1, enhancer_width=enhancer_width))
        super().__init__()
        self.multiple = max(POOLS[0], 2 ** (downs + 1))
        self.smallest = 2 ** (downs + 2)  # reflection at the bottom needs two pixels
        wide = 2 * width
        widths = [wide * 2**at for at in range(downs + 1)]
        steps_down = [module for channels in widths[:-1] for module in down(channels)]
        steps_up = [module for channels in reversed(widths[1:]) for module in up(channels)]
        residual = [ReflectedResidualBlock(widths[-1]) for _ in range(blocks)]
        pad, conv = padded_conv(3, wide, 7)
        self.downsample = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
        self.model = nn.Sequential(pad, *normed(conv, wide), *steps_down, *residual, *steps_up)
        pad, conv = padded_conv(3, width, 7)
        self.model1_1 = nn.Sequential(pad, *normed(conv, width), *down(width))
        local = [ReflectedResidualBlock(wide) for _ in range(local_blocks)]
        self.model1_2 = nn.Sequential(*local, *up(wide), *padded_conv(width, 3, 7), nn.Tanh())
        self.dehaze, self.dehaze2 = PyramidEnhancer(enhancer_width), PyramidEnhancer(enhancer_width)

    def pad(self, image: Tensor) -> Tensor:
        padded = pad_to_multiple(image, self.multiple)
        return padded if min(padded.shape[-2:]) >= self.smallest else pad_to_multiple(image, self.smallest)

    def restore(self, image: Tensor) -> tuple[Tensor, Tensor]:
        hazy = 2 * image - 1
        generated = self.model1_2(self.model(self.downsample(hazy)) + self.model1_1(hazy))
        once = self.dehaze(torch.cat((generated, hazy), dim=1))
        twice = self.dehaze2(torch.cat((generated, once), dim=1))
        return (twice + 1) / 2, (generated + 1) / 2

    def official_only_shapes(self) -> dict[str, tuple[int, ...]]:
        names = (f"{part}.batch1.{kind}" for part in ("dehaze", "dehaze2") for kind in ("weight", "bias"))
        return dict.fromkeys(names, (100,))


def discriminator_parameters(width: int = 64, layers: int = 3, scales: int = 2) -> int:
    """Count the parameters of EPDN's discriminator, which training alone uses: 5,535,618, and so 22.9 million in all.

    Each scale has 4x4 convolutions with bias: from both images to `width` channels, then `layers` that double them up
    to eight times, then one to a single channel.
    """
    widths = [6, *(min(width << at, 8 * width) for at in range(layers + 1)), 1]
    return scales * sum(16 * before * after + after for before, after in zip(widths[:-1], widths[1:], strict=True))
