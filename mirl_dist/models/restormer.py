"""Building blocks of the Restormer family: Zamir et al., CVPR 2022 (arXiv 2111.09881), sections 3.1 and 3.2.

Written from the paper and from measurements of the official classes. Parameters have the official names, so published
weights load with `strict=True`. No convolution has a bias.

Features are (B, H, W, C): the channels of a pixel lie side by side in memory, where norms, 1x1 convolutions, attention
between channels and gates read them. Results equal the published formulation's (B, C, H, W) up to rounding.

Shape letters: B batch, C channels, H W pixels, P = H * W, N heads, D channels per head (C = N * D).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mirl_dist.models.channel_ops import cosine_scores, gated_projection, mix_values, pad_channels


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


def channels_first(x: Tensor) -> Tensor:
    """View (B, H, W, C) as (B, C, H, W), the shape that torch's convolutions take; memory stays channels last."""
    return rearrange(x, "b h w c -> b c h w")


def channels_last(x: Tensor) -> Tensor:
    """View (B, C, H, W) as (B, H, W, C)."""
    return rearrange(x, "b c h w -> b h w c")


class PixelLinear(nn.Conv2d):
    """A 1x1 convolution, computed as a linear map of each pixel: (B, H, W, C) to (B, H, W, C')."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1))


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with zero padding, over all channels or depthwise: (B, H, W, C) to (B, H, W, C')."""

    def __init__(self, channels: int, out_channels: int, *, depthwise: bool = False) -> None:
        groups = channels if depthwise else 1
        super().__init__(channels, out_channels, 3, padding=1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(super().forward(channels_first(x)))


class PixelNorm(nn.Module):
    """Layer norm over the channels of each pixel: population variance, eps 1e-5, scale and shift ("WithBias").

    (B, H, W, C) to (B, H, W, C). Section 3; parameters `body.weight` (ones) and `body.bias` (zeros).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.body(x)
        return normed


class ChannelAttention(nn.Module):
    """MDTA: attention between channels, with a cost linear in H * W. Section 3.1.

    (B, H, W, C) to (B, H, W, C); C must be a multiple of `heads`, and each head has contiguous channels. Scores are the
    cosines between queries and keys over the pixels; `temperature` (N, 1, 1), initially one, multiplies them.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = PixelLinear(channels, 3 * channels)
        self.qkv_dwconv = Conv3x3(3 * channels, 3 * channels, depthwise=True)
        self.project_out = PixelLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        qkv = rearrange(self.qkv_dwconv(self.qkv(x)), "b h w c -> b (h w) c")
        queries_keys, values = torch.split(qkv, [2 * channels, channels], dim=-1)
        scores = cosine_scores(queries_keys, self.heads) * self.temperature  # (B, N, D, D)
        out = mix_values(scores.softmax(dim=-1), values, self.project_out.weight.flatten(1))
        return out.view_as(x)


class GatedFeedForward(nn.Module):
    """GDFN: the product of two depthwise 3x3 branches, the first with exact (erf) GELU. Section 3.2.

    (B, H, W, C) to (B, H, W, C); each branch has int(expansion * C) channels, rounded down as published. While
    computing, `pad_channels` rounds them up.
    """

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(expansion * channels)
        self.project_in = PixelLinear(channels, 2 * hidden)
        self.dwconv = Conv3x3(2 * hidden, 2 * hidden, depthwise=True)
        self.project_out = PixelLinear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        # Gate and value, padded each.
        halves = (rearrange(conv.weight, "(two f) ... -> two f ...", two=2) for conv in (self.project_in, self.dwconv))
        project_in, kernels = (pad_channels(pair, dim=1).flatten(0, 1) for pair in halves)
        project_out = pad_channels(self.project_out.weight, dim=1).flatten(1)

        hidden = channels_first(F.linear(x, project_in.flatten(1)))
        hidden = F.conv2d(hidden, kernels, padding=1, groups=len(kernels))
        return gated_projection(channels_last(hidden), project_out)


class TransformerBlock(nn.Module):
    """x + MDTA(norm1(x)), then x + GDFN(norm2(x)): (B, H, W, C) to (B, H, W, C). Figure 2 of the paper."""

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
    """The stem: 3x3 convolution, (B, H, W, 3) to (B, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = Conv3x3(3, channels)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.proj(image)
        return out


class Downsample(nn.Module):
    """Halves the resolution and doubles the channels: (B, H, W, C) to (B, H/2, W/2, 2C); C, H and W even."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(Conv3x3(channels, channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(F.pixel_unshuffle(channels_first(self.body(x)), 2))


class Upsample(nn.Module):
    """Doubles the resolution and halves the channels: (B, H, W, C) to (B, 2H, 2W, C/2); C even."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(Conv3x3(channels, 2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(F.pixel_shuffle(channels_first(self.body(x)), 2))
