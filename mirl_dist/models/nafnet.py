"""NAFNet: Chen et al., ECCV 2022 (arXiv 2204.04676), "Simple Baselines for Image Restoration".

Written from the paper, section 4 and figures 3 and 4; parameters have the names of published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from mirl_dist.models.base import ImageNetwork, bad_rows, check_sizes, too_small


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel, eps 1e-6: (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


def simple_gate(x: Tensor) -> Tensor:
    """Return the product of both halves of the channels: (B, 2C, H, W) to (B, C, H, W)."""
    first, second = x.chunk(2, dim=1)
    return first * second


class NafBlock(nn.Module):
    """x + beta * mix(norm1(x)), then x + gamma * feed(norm2(x)), without nonlinear activations: (B, C, H, W) as before.

    `mix` has a depthwise 3x3 convolution, a gate, and channel attention (`sca`) by the mean over pixels; `feed` a gate
    alone. beta and gamma (1, C, 1, 1) are initially zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.conv1 = nn.Conv2d(channels, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.conv4 = nn.Conv2d(channels, wide, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mixed = simple_gate(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.beta * self.conv3(mixed * self.sca(mixed))
        out: Tensor = x + self.gamma * self.conv5(simple_gate(self.conv4(self.norm2(x))))
        return out


class NAFNet(ImageNetwork):
    """U-shaped network of NAFNet blocks, added to the input image. 29,159,715 parameters at the defaults.

    width: channels at full resolution; each level below doubles them. encoder_blocks: per level, highest resolution
    first. middle_blocks: at the lowest resolution. decoder_blocks: per level, lowest resolution first. The defaults
    are the paper's denoiser; its deblurring network has (1, 1, 1, 28), 1 and (1, 1, 1, 1): 17,111,907 parameters.
    Sides are padded to multiples of 2**levels. Initial values are PyTorch's. Raises UserError for sizes that do not
    fit, naming each.
    """

    def __init__(
        self,
        width: int = 32,
        encoder_blocks: Sequence[int] = (2, 2, 4, 8),
        middle_blocks: int = 12,
        decoder_blocks: Sequence[int] = (2, 2, 2, 2),
    ) -> None:
        levels = max(1, len(encoder_blocks))
        rows = {"encoder_blocks": encoder_blocks, "decoder_blocks": decoder_blocks}
        check_sizes("NAFNet", too_small(1, width=width, middle_blocks=middle_blocks) + bad_rows(levels, **rows))
        super().__init__()
        self.multiple = 2**levels
        widths = [width * 2**at for at in range(levels + 1)]

        def row(channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(NafBlock(channels) for _ in range(count)))

        def up(channels: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.PixelShuffle(2))

        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.encoders = nn.ModuleList(map(row, widths, encoder_blocks))
        self.downs = nn.ModuleList(nn.Conv2d(channels, 2 * channels, 2, stride=2) for channels in widths[:-1])
        self.middle_blks = row(widths[-1], middle_blocks)
        self.ups = nn.ModuleList(map(up, reversed(widths[1:])))
        self.decoders = nn.ModuleList(map(row, reversed(widths[:-1]), decoder_blocks))
        self.ending = nn.Conv2d(width, 3, 3, padding=1)

    def restore(self, image: Tensor) -> tuple[Tensor]:
        x, skips = self.intro(image), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.middle_blks(x)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(up(x) + skips.pop())
        return (image + self.ending(x),)
