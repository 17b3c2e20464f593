"""TransWeather: Valanarasu et al., CVPR 2022 (arXiv 2111.14813), for rain, snow and haze with one decoder.

Written from the paper and from measurements of the official class (jeya-maria-jose/TransWeather at 54c4e69); parameters
have the official names. Differences from the published code:
- Two modules that the published class owns but never uses are absent (`official_only_shapes`): 296,667 of 38,052,078
  parameters. Art's copy of the network lacks them too.
- Any image size is accepted, padded to multiples of 64 as Art does.
- Stochastic depth in training (rates up to 0.1) is left out: a step draws no random numbers.

Shape letters: B batch, C channels, H W pixels, N heads, D channels per head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mirl_dist.models.base import ImageNetwork, bad_rows, check_sizes, too_small, undivided


class OverlapPatchEmbed(nn.Module):
    """A strided convolution with overlapping windows, and layer norm: (B, C, H, W) to (B, H/s, W/s, C'), rounded up."""

    def __init__(self, before: int, after: int, kernel: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.proj = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(after)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(rearrange(self.proj(x), "b c h w -> b h w c"))
        return out


class ReducedAttention(nn.Module):
    """Attention to a map that is `reduction` times smaller: (B, H, W, C) to (B, H, W, C).

    queries: if not 0, the queries are that many learnt ones, each used by an equal run of pixels, not the features.
    """

    def __init__(self, channels: int, heads: int, reduction: int, queries: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.task_query = nn.Parameter(torch.randn(1, queries, channels)) if queries else None
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        context = x
        if self.reduction > 1:
            context = self.norm(rearrange(self.sr(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c"))
        if self.task_query is None:
            queries = self.q(x.flatten(1, 2))
        else:
            numbers = torch.arange(self.task_query.shape[1], dtype=torch.float32, device=x.device)
            nearest = F.interpolate(numbers[None, None], height * width, mode="nearest")[0, 0].long()
            queries = self.q(self.task_query).index_select(1, nearest)
        q = rearrange(queries, "b t (n d) -> b n t d", n=self.heads)
        k, v = rearrange(self.kv(context), "b h w (two n d) -> two b n (h w) d", two=2, n=self.heads)
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        out: Tensor = self.proj(rearrange(mixed, "b n (h w) d -> b h w (n d)", h=height))
        return out


class DepthwiseMlp(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, linear: (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = ratio * channels
        conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = nn.Sequential(OrderedDict(dwconv=conv))
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(rearrange(self.fc1(x), "b h w c -> b c h w"))
        out: Tensor = self.fc2(F.gelu(rearrange(x, "b c h w -> b h w c")))
        return out


class PyramidBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)): (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, channels: int, heads: int, reduction: int, ratio: int, queries: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = ReducedAttention(channels, heads, reduction, queries)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = DepthwiseMlp(channels, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PyramidEncoder(nn.Module):
    """Four stages at 1/4, 1/8, 1/16, 1/32 of the image; between two, a second path embeds the patches once more."""

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        heads: Sequence[int],
        patch_heads: Sequence[int],
        reductions: Sequence[int],
        ratio: int,
    ) -> None:
        super().__init__()
        for at, (before, after) in enumerate(pairwise((3, *widths))):
            stage = [PyramidBlock(after, heads[at], reductions[at], ratio) for _ in range(blocks[at])]
            embed = OverlapPatchEmbed(before, after) if at else OverlapPatchEmbed(before, after, 7, 4)
            self.add_module(f"patch_embed{at + 1}", embed)
            self.add_module(f"block{at + 1}", nn.Sequential(*stage))
            self.add_module(f"norm{at + 1}", nn.LayerNorm(after, eps=1e-6))
        for at, (before, after) in enumerate(pairwise(widths)):
            patch_block = PyramidBlock(after, patch_heads[at], reductions[at], ratio)
            self.add_module(f"mini_patch_embed{at + 1}", OverlapPatchEmbed(before, after))
            self.add_module(f"patch_block{at + 1}", nn.Sequential(patch_block))
            self.add_module(f"pnorm{at + 1}", nn.LayerNorm(after, eps=1e-6))

    def forward(self, x: Tensor) -> list[Tensor]:
        def run(x: Tensor, *names: str) -> Tensor:
            for name in names:
                x = self.get_submodule(name)(x)
            return x

        features: list[Tensor] = []
        patches: Tensor | None = None
        for at in range(1, 5):
            x = run(x, f"patch_embed{at}")
            x = x if patches is None else x + patches
            if at < 4:
                whole = rearrange(x, "b h w c -> b c h w")
                patches = run(whole, f"mini_patch_embed{at}", f"patch_block{at}", f"pnorm{at}")
            x = rearrange(run(x, f"block{at}", f"norm{at}"), "b h w c -> b c h w")
            features.append(x)
        return features


class TaskDecoder(nn.Module):
    """Blocks with learnt queries, at 1/64 of the image: (B, C, H, W) to (B, C, H/2, W/2), rounded up."""

    def __init__(self, channels: int, blocks: int, heads: int, ratio: int, queries: int) -> None:
        super().__init__()
        self.patch_embed1 = OverlapPatchEmbed(channels, channels)
        self.block1 = nn.Sequential(*(PyramidBlock(channels, heads, 1, ratio, queries) for _ in range(blocks)))
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm1(self.block1(self.patch_embed1(x)))
        return rearrange(normed, "b h w c -> b c h w")


class TailConv(nn.Module):
    """A convolution under the official name of its wrapper, `conv2d`."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(before, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2d(x)
        return out


class TailUpsample(nn.Module):
    """Doubles the sides by a transposed convolution: (B, C, H, W) to (B, C', 2H, 2W)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv2d = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2d(x)
        return out


class TailBlock(nn.Module):
    """x + 0.1 conv(relu(conv(x))), both 3x3: (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = TailConv(channels, channels)
        self.conv2 = TailConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + 0.1 * self.conv2(F.relu(self.conv1(x)))
        return out


class ConvTail(nn.Module):
    """Transposed convolutions back to full resolution; the encoder's features are added on the way."""

    def __init__(self, widths: Sequence[int], tail_widths: Sequence[int]) -> None:
        super().__init__()
        # From 1/64 to 1/32 with equal width, then down the encoder's widths, then those of the tail.
        steps = pairwise((widths[3], *reversed(widths), *tail_widths))
        for scale, (before, after) in zip((32, 16, 8, 4, 2, 1), steps, strict=True):
            self.add_module(f"convd{scale}x", TailUpsample(before, after))
        for at, channels in enumerate((tail_widths[0], *widths[:3])):
            self.add_module(f"dense_{at + 1}", nn.Sequential(TailBlock(channels)))

    def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
        for scale, dense, skip in zip((32, 16, 8, 4), (None, 4, 3, 2), reversed(features), strict=True):
            # A map with an odd side comes back one row or column larger.
            x = self.get_submodule(f"convd{scale}x")(x)[..., : skip.shape[-2], : skip.shape[-1]]
            x = x if dense is None else self.get_submodule(f"dense_{dense}")(x)
            x = x + skip
        x = self.get_submodule("dense_1")(self.get_submodule("convd2x")(x))
        out: Tensor = self.get_submodule("convd1x")(x)
        return out


class TransWeather(ImageNetwork):
    """Pyramid transformer with a convolutional tail, and tanh, no residual. 37,755,411 parameters in 341 tensors.

    Takes [0, 1] (the published range [-1, 1] is made inside) and gives images in [0, 1] where it is well trained.
    widths, blocks, heads, reductions (how many times smaller the attended map is, per side): per stage of the encoder,
    highest resolution first. patch_heads: of the second path into stages 2, 3, 4. ffn_ratio: of hidden to input
    channels. decoder_blocks, decoder_heads, decoder_ffn_ratio; queries: learnt ones per decoder block, initially
    normal. tail_widths: at 1/2 and at full resolution. Other initial values are PyTorch's.
    Raises UserError for sizes that do not fit, naming each.
    """

    multiple = 64

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 320, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 4, 4),
        patch_heads: Sequence[int] = (1, 2, 2),
        reductions: Sequence[int] = (4, 2, 2, 1),
        ffn_ratio: int = 2,
        decoder_blocks: int = 3,
        decoder_heads: int = 8,
        decoder_ffn_ratio: int = 4,
        queries: int = 48,
        tail_widths: Sequence[int] = (16, 8),
    ) -> None:
        problems = too_small(1, ffn_ratio=ffn_ratio, decoder_blocks=decoder_blocks, decoder_heads=decoder_heads)
        problems += too_small(1, decoder_ffn_ratio=decoder_ffn_ratio, queries=queries)
        problems += bad_rows(4, widths=widths, blocks=blocks, heads=heads, reductions=reductions)
        problems += bad_rows(3, patch_heads=patch_heads) + bad_rows(2, tail_widths=tail_widths)
        if not problems:
            problems += undivided("stage", widths, "heads", heads)
            problems += undivided("second path", widths[1:], "patch_heads", patch_heads)
            if widths[3] % decoder_heads:
                problems.append(f"decoder_heads = {decoder_heads} does not divide its {widths[3]} channels")
            largest = (8, 4, 2, 2)
            if any(reduction > most for reduction, most in zip(reductions, largest, strict=True)):
                problems.append(f"reductions = {list(reductions)} (must be at most {list(largest)})")
        check_sizes("TransWeather", problems)
        super().__init__()
        self.Tenc = PyramidEncoder(widths, blocks, heads, patch_heads, reductions, ffn_ratio)
        self.Tdec = TaskDecoder(widths[3], decoder_blocks, decoder_heads, decoder_ffn_ratio, queries)
        self.convtail = ConvTail(widths, tail_widths)
        self.clean = TailConv(tail_widths[1], 3)

    def restore(self, image: Tensor) -> tuple[Tensor]:
        features = self.Tenc(2 * image - 1)
        return (torch.tanh(self.clean(self.convtail(self.Tdec(features[-1]), features))),)

    def official_only_shapes(self) -> dict[str, tuple[int, ...]]:
        first, last = (self.Tenc.get_parameter(f"norm{stage}.weight").numel() for stage in (1, 4))
        return {
            "Tenc.mini_patch_embed4.proj.weight": (last, first, 3, 3),
            "Tenc.mini_patch_embed4.proj.bias": (last,),
            "Tenc.mini_patch_embed4.norm.weight": (last,),
            "Tenc.mini_patch_embed4.norm.bias": (last,),
            "convtail.conv_output.conv2d.weight": (3, self.clean.conv2d.in_channels, 3, 3),
            "convtail.conv_output.conv2d.bias": (3,),
        }
