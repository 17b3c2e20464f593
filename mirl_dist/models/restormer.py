"""Building blocks of the Restormer family: Zamir et al., CVPR 2022 (arXiv 2111.09881), sections 3.1 and 3.2.

Written from the paper and from measurements of the official classes. Parameters have the official names, so published
weights load with `strict=True`. No convolution has a bias.

Shape letters: B batch, C channels, H W pixels, N heads, D channels per head (C = N * D).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad an image at the bottom and right until both sides are multiples of `multiple`.

    image: (B, C, H, W), H and W >= 1. Pads by reflection without repeating the border, at most side - 1 pixels, and
    beyond that by replication. Returns the image itself if it needs no padding.
    """
    height, width = image.shape[-2:]
    down, right = -height % multiple, -width % multiple
    if not (down or right):
        return image
    mirrored_down, mirrored_right = min(down, height - 1), min(right, width - 1)
    image = F.pad(image, (0, mirrored_right, 0, mirrored_down), mode="reflect")
    return F.pad(image, (0, right - mirrored_right, 0, down - mirrored_down), mode="replicate")


class PixelNorm(nn.Module):
    """Layer norm over the channels of each pixel: population variance, eps 1e-5, scale and shift ("WithBias").

    (B, C, H, W) to (B, C, H, W). Section 3; parameters `body.weight` (ones) and `body.bias` (zeros).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.body(rearrange(x, "b c h w -> b h w c"))
        return rearrange(normed, "b h w c -> b c h w")


class ChannelAttention(nn.Module):
    """MDTA: attention between channels, with a cost linear in H * W. Section 3.1.

    (B, C, H, W) to (B, C, H, W); C must be a multiple of `heads`, and each head has contiguous channels. Queries and
    keys are normalised to unit length over the pixels (eps 1e-12); `temperature` (N, 1, 1), initially one, multiplies
    the scores.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv: Tensor = self.qkv_dwconv(self.qkv(x))
        # unbind(1): with `three` as the first axis, backward would copy the gradient of the batch once more
        q, k, v = rearrange(qkv, "b (three n d) h w -> b three n d (h w)", three=3, n=self.heads).unbind(1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        mixed = scores.softmax(dim=-1) @ v
        out: Tensor = self.project_out(rearrange(mixed, "b n d (h w) -> b (n d) h w", h=height, w=width))
        return out


class GatedFeedForward(nn.Module):
    """GDFN: the product of two depthwise 3x3 branches, the first with exact (erf) GELU. Section 3.2.

    (B, C, H, W) to (B, C, H, W); each branch has int(expansion * C) channels, rounded down as published.
    """

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(expansion * channels)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        out: Tensor = self.project_out(F.gelu(gate) * value)
        return out


class TransformerBlock(nn.Module):
    """x + MDTA(norm1(x)), then x + GDFN(norm2(x)): (B, C, H, W) to (B, C, H, W). Figure 2 of the paper."""

    def __init__(self, channels: int, heads: int, ffn_expansion: float) -> None:
        super().__init__()
        self.norm1 = PixelNorm(channels)
        self.attn = ChannelAttention(channels, heads)
        self.norm2 = PixelNorm(channels)
        self.ffn = GatedFeedForward(channels, ffn_expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


def level(channels: int, heads: int, ffn_expansion: float, blocks: int) -> nn.Sequential:
    """Build a sequence of transformer blocks of equal width, named 0, 1, ... as in official checkpoints."""
    return nn.Sequential(*(TransformerBlock(channels, heads, ffn_expansion) for _ in range(blocks)))


class PatchEmbed(nn.Module):
    """The stem: 3x3 convolution, (B, 3, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 3, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.proj(image)
        return out


class Downsample(nn.Sequential):
    """Halves the resolution and doubles the channels: (B, C, H, W) to (B, 2C, H/2, W/2); C, H and W even."""

    def __init__(self, channels: int) -> None:
        conv = nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False)
        super().__init__(OrderedDict(body=nn.Sequential(conv, nn.PixelUnshuffle(2))))


class Upsample(nn.Sequential):
    """Doubles the resolution and halves the channels: (B, C, H, W) to (B, C/2, 2H, 2W); C even."""

    def __init__(self, channels: int) -> None:
        conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        super().__init__(OrderedDict(body=nn.Sequential(conv, nn.PixelShuffle(2))))
