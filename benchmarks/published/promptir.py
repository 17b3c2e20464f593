"""PromptIR in the published formulation, restated from the papers and from measurements: what a user of that code runs.

Channels first, every 1x1 convolution a convolution, queries and keys normalised before their product, the mixture of
prompts by broadcasting. Names, shapes and initial values are the official ones, with the six convolutions that the
official class owns but never calls. Measured against, never imported by the package.

Where the published formulation was unknown, the faster one is used (`F.layer_norm` for norms).
Shape letters: B batch, C channels, H W pixels, N heads, L prompt components, S prompt side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def pointwise(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, bias=False)


def depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


def conv3x3(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, bias=False)


class PublishedNorm(nn.Module):
    """Layer norm over channels: pixels to rows, norm, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        normed = self.body(rearrange(x, "b c h w -> b (h w) c"))
        return rearrange(normed, "b (h w) c -> b c h w", h=height, w=width)


class PublishedAttention(nn.Module):
    """MDTA."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.qkv_dwconv = pointwise(channels, 3 * channels), depthwise(3 * channels)
        self.project_out = pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (rearrange(part, "b (n d) h w -> b n d (h w)", n=self.heads) for part in qkv)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixed = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1) @ v
        out: Tensor = self.project_out(rearrange(mixed, "b n d (h w) -> b (n d) h w", h=height, w=width))
        return out


class PublishedFeedForward(nn.Module):
    """GDFN."""

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in, self.dwconv = pointwise(channels, 2 * hidden), depthwise(2 * hidden)
        self.project_out = pointwise(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        out: Tensor = self.project_out(F.gelu(gate) * value)
        return out


class PublishedBlock(nn.Module):
    """x + MDTA(norm1(x)), then x + GDFN(norm2(x))."""

    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1, self.attn = PublishedNorm(channels), PublishedAttention(channels, heads)
        self.norm2, self.ffn = PublishedNorm(channels), PublishedFeedForward(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class PublishedPrompt(nn.Module):
    """The mixture of L prompt components, weighted by the features' mean, resized to their size."""

    def __init__(self, features: int, channels: int, length: int, side: int) -> None:
        super().__init__()
        self.prompt_param = nn.Parameter(torch.rand(1, length, channels, side, side))
        self.linear_layer, self.conv3x3 = nn.Linear(features, length), conv3x3(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        shares = F.softmax(self.linear_layer(features.mean(dim=(-2, -1))), dim=1)
        components = self.prompt_param.repeat(len(features), 1, 1, 1, 1)
        mixture = (shares[..., None, None, None] * components).sum(dim=1)
        out: Tensor = self.conv3x3(F.interpolate(mixture, features.shape[-2:], mode="bilinear"))
        return out


class PublishedStem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = conv3x3(3, channels)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.proj(image)
        return out


def down(channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=nn.Sequential(conv3x3(channels, channels // 2), nn.PixelUnshuffle(2))))


def up(channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=nn.Sequential(conv3x3(channels, 2 * channels), nn.PixelShuffle(2))))


class PublishedPromptIR(nn.Module):
    """The whole network: float (B, 3, H, W) in and out, H and W multiples of 8. Sizes are those of `PromptIR`."""

    def __init__(
        self,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion: float = 2.66,
        prompt_length: int = 5,
        prompt_dims: Sequence[int] = (64, 128, 320),
        prompt_sizes: Sequence[int] = (64, 32, 16),
        prompt_heads: int = 4,
    ) -> None:
        super().__init__()
        c1, c2, c3, c4 = dim, 2 * dim, 4 * dim, 8 * dim
        p1, p2, p3 = prompt_dims

        def row(channels: int, at: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(PublishedBlock(channels, heads[at], ffn_expansion) for _ in range(count)))

        def prompt(features: int, at: int) -> PublishedPrompt:
            return PublishedPrompt(features, prompt_dims[at], prompt_length, prompt_sizes[at])

        def read(channels: int) -> PublishedBlock:
            return PublishedBlock(channels, prompt_heads, ffn_expansion)

        self.patch_embed = PublishedStem(c1)
        self.prompt1, self.prompt2, self.prompt3 = prompt(c2, 0), prompt(c3, 1), prompt(c4, 2)
        self.chnl_reduce1, self.chnl_reduce2, self.chnl_reduce3 = (
            pointwise(p1, p1),
            pointwise(p2, p2),
            pointwise(p3, 256),
        )
        self.reduce_noise_channel_1 = pointwise(c1 + p1, c1)
        self.reduce_noise_channel_2 = pointwise(c2 + p2, c2)
        self.reduce_noise_channel_3 = pointwise(c3 + 256, c3)
        self.encoder_level1, self.down1_2 = row(c1, 0, blocks[0]), down(c1)
        self.encoder_level2, self.down2_3 = row(c2, 1, blocks[1]), down(c2)
        self.encoder_level3, self.down3_4 = row(c3, 2, blocks[2]), down(c3)
        self.latent = row(c4, 3, blocks[3])
        self.noise_level3, self.reduce_noise_level3 = read(c4 + p3), pointwise(c4 + p3, c3)
        self.up4_3, self.reduce_chan_level3 = up(c3), pointwise(c2 + c3, c3)
        self.decoder_level3 = row(c3, 2, blocks[2])
        self.noise_level2, self.reduce_noise_level2 = read(c3 + p2), pointwise(c3 + p2, c3)
        self.up3_2, self.reduce_chan_level2 = up(c3), pointwise(c2 + c2, c2)
        self.decoder_level2 = row(c2, 1, blocks[1])
        self.noise_level1, self.reduce_noise_level1 = read(c2 + p1), pointwise(c2 + p1, c2)
        self.up2_1, self.decoder_level1 = up(c2), row(c2, 0, blocks[0])
        self.refinement, self.output = row(c2, 0, refinement_blocks), conv3x3(c2, 3)

    def forward(self, image: Tensor) -> Tensor:
        encoded1 = self.encoder_level1(self.patch_embed(image))
        encoded2 = self.encoder_level2(self.down1_2(encoded1))
        encoded3 = self.encoder_level3(self.down2_3(encoded2))
        x = self.latent(self.down3_4(encoded3))
        x = self.reduce_noise_level3(self.noise_level3(torch.cat((x, self.prompt3(x)), 1)))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat((self.up4_3(x), encoded3), 1)))
        x = self.reduce_noise_level2(self.noise_level2(torch.cat((x, self.prompt2(x)), 1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat((self.up3_2(x), encoded2), 1)))
        x = self.reduce_noise_level1(self.noise_level1(torch.cat((x, self.prompt1(x)), 1)))
        x = self.decoder_level1(torch.cat((self.up2_1(x), encoded1), 1))
        out: Tensor = self.output(self.refinement(x)) + image
        return out
