"""Uformer: Wang et al., CVPR 2022 (arXiv 2106.03106), in the form and size that MiOIR trains (Uformer-B).

Written from the paper and from measurements of the class in Xiangtaokong/MiOIR at 4d5f6ca; parameters have the official
names. Differences from the published code:
- Any image size is accepted; the published class takes squares alone, whose side is a multiple of 128.
- Stochastic depth in training (rates up to 0.1) is left out: a step draws no random numbers.
- The index of relative positions is no buffer: see `Uformer.official_constants`.

Shape letters: B batch, C channels, H W pixels, N heads, D channels per head, S side of a window, T = S * S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mirl_dist.models.base import ImageNetwork, bad_rows, check_sizes, too_small, undivided


class SplitProjection(nn.Module):
    """Linear projections of tokens to queries, and to keys and values together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, 2 * channels)


class WindowAttention(nn.Module):
    """Attention within windows, with a learnt bias per head and relative position: (B, T, C) to (B, T, C).

    mask: (windows, T, T), added to the scores of each image's windows; B is images times windows, images first.
    """

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = SplitProjection(channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q = rearrange(self.qkv.to_q(x), "b t (n d) -> b n t d", n=self.heads)
        k, v = rearrange(self.qkv.to_kv(x), "b t (two n d) -> two b n t d", two=2, n=self.heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + self._position_bias()
        if mask is not None:
            windows = rearrange(scores, "(b w) n t u -> b w n t u", w=mask.shape[0])
            scores = rearrange(windows + mask[:, None], "b w n t u -> (b w) n t u")
        out: Tensor = self.proj(rearrange(scores.softmax(dim=-1) @ v, "b n t d -> b t (n d)"))
        return out

    def _position_bias(self) -> Tensor:
        """Return (N, T, T), whose entry for two pixels depends on the difference of their rows and of their columns."""
        side = 2 * self.window - 1
        table = rearrange(self.relative_position_bias_table, "(y x) n -> n y x", y=side)
        # Entry (n, i, j, a, b) is table (n, i + a, j + b); a = S - 1 - k for the key's row k, and so for columns.
        shifted = table.unfold(1, self.window, 1).unfold(2, self.window, 1).flip(-2, -1)
        return rearrange(shifted, "n i j k l -> n (i j) (k l)")


class LocalFeedForward(nn.Module):
    """LeFF: a feed-forward of four times the width with a depthwise 3x3 convolution: (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = ratio * channels
        self.linear1 = nn.Sequential(nn.Linear(channels, hidden))
        self.dwconv = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.linear2 = nn.Sequential(nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(F.gelu(self.linear1(x)), "b h w c -> b c h w")
        out: Tensor = self.linear2(rearrange(F.gelu(self.dwconv(x)), "b c h w -> b h w c"))
        return out


class WindowBlock(nn.Module):
    """x + attention(norm1(x)), then x + feed-forward(norm2(x)): (B, H, W, C) to (B, H, W, C).

    shift: pixels by which the windows are moved; those that then wrap around are masked apart by -100.
    modulated: add a learnt vector per position in the window to each token before attention.
    """

    def __init__(self, channels: int, heads: int, window: int, shift: int, ratio: int, modulated: bool) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.modulator = nn.Embedding(window * window, channels) if modulated else None
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = LocalFeedForward(channels, ratio)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rolled = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        windows = rearrange(rolled, "b (y i) (x j) c -> (b y x) (i j) c", i=self.window, j=self.window)
        if self.modulator is not None:
            windows = windows + self.modulator.weight
        attended = self.attn(windows, self._mask(height, width, x.device) if self.shift else None)
        grid = {"y": height // self.window, "i": self.window, "x": width // self.window}
        rolled = rearrange(attended, "(b y x) (i j) c -> b (y i) (x j) c", **grid)
        x = x + rolled.roll((self.shift, self.shift), (1, 2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return (windows, T, T): -100 between pixels of a window that were no neighbours before the roll, else 0."""

        def wrapped(side: int) -> Tensor:
            return torch.arange(side, device=device) >= side - self.shift

        region = 2 * wrapped(height)[:, None] + wrapped(width)[None, :]
        windows = rearrange(region, "(y i) (x j) -> (y x) (i j)", i=self.window, j=self.window)
        return -100.0 * (windows[:, :, None] != windows[:, None, :])


class WindowLevel(nn.Module):
    """Blocks of equal width, every second one with shifted windows: (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, window: int, blocks: int, ratio: int, modulated: bool) -> None:
        super().__init__()
        shifts = [at % 2 * (window // 2) for at in range(blocks)]
        self.blocks = nn.Sequential(*(WindowBlock(channels, heads, window, s, ratio, modulated) for s in shifts))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(rearrange(x, "b c h w -> b h w c"))
        return rearrange(out, "b h w c -> b c h w")


class NamedLayer(nn.Sequential):
    """A layer under the official name of its wrapper, e.g. `conv.0.weight`."""

    def __init__(self, name: str, *layers: nn.Module) -> None:
        super().__init__()
        self.add_module(name, nn.Sequential(*layers))


class Uformer(ImageNetwork):
    """U-shaped transformer of windows, added to the input image. 50,880,946 parameters in 719 tensors.

    width: channels of level 1; the next levels double them. encoder_blocks, encoder_heads: per level, highest
    resolution first. bottleneck_blocks, bottleneck_heads: at the lowest resolution. decoder_blocks, decoder_heads: per
    level, lowest resolution first; all levels have twice the encoder's channels. window: its side, even. ffn_ratio: of
    hidden to input channels. Sides are padded to multiples of window * 2**levels. Initial values are PyTorch's; tables
    of positions normal with deviation 0.02. Raises UserError for sizes that do not fit, naming each.
    """

    def __init__(
        self,
        width: int = 32,
        encoder_blocks: Sequence[int] = (1, 2, 8, 8),
        encoder_heads: Sequence[int] = (1, 2, 4, 8),
        bottleneck_blocks: int = 2,
        bottleneck_heads: int = 16,
        decoder_blocks: Sequence[int] = (8, 8, 2, 1),
        decoder_heads: Sequence[int] = (16, 8, 4, 2),
        window: int = 8,
        ffn_ratio: int = 4,
    ) -> None:
        levels = max(1, len(encoder_blocks))
        wide = [width * 2**at for at in range(levels + 1)]
        scalars = {"width": width, "bottleneck_blocks": bottleneck_blocks, "bottleneck_heads": bottleneck_heads}
        rows = {"encoder_blocks": encoder_blocks, "encoder_heads": encoder_heads}
        rows |= {"decoder_blocks": decoder_blocks, "decoder_heads": decoder_heads}
        problems = too_small(1, **scalars, ffn_ratio=ffn_ratio) + bad_rows(levels, **rows)
        if window < 2 or window % 2:
            problems.append(f"window = {window} (must be even and >= 2)")
        if not problems:
            problems += undivided("encoder level", wide[:-1], "encoder_heads", encoder_heads)
            problems += undivided("decoder level", wide[:0:-1], "decoder_heads", decoder_heads)
            if wide[-1] % bottleneck_heads:
                problems.append(f"bottleneck_heads = {bottleneck_heads} does not divide its {wide[-1]} channels")
        check_sizes("Uformer", problems)
        super().__init__()
        self.multiple, self.levels = window * 2**levels, levels
        self.input_proj = NamedLayer("proj", nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU())
        for at in range(levels):
            blocks = WindowLevel(wide[at], encoder_heads[at], window, encoder_blocks[at], ffn_ratio, False)
            down = NamedLayer("conv", nn.Conv2d(wide[at], wide[at + 1], 4, stride=2, padding=1))
            self.add_module(f"encoderlayer_{at}", blocks)
            self.add_module(f"dowsample_{at}", down)  # spelt as in the official class
        self.conv = WindowLevel(wide[-1], bottleneck_heads, window, bottleneck_blocks, ffn_ratio, False)
        for at in range(levels):
            channels = wide[levels - at]
            before = channels if at == 0 else 2 * channels
            up = NamedLayer("deconv", nn.ConvTranspose2d(before, channels // 2, 2, stride=2))
            blocks = WindowLevel(channels, decoder_heads[at], window, decoder_blocks[at], ffn_ratio, True)
            self.add_module(f"upsample_{at}", up)
            self.add_module(f"decoderlayer_{at}", blocks)
        self.output_proj = NamedLayer("proj", nn.Conv2d(2 * width, 3, 3, padding=1))

    def restore(self, image: Tensor) -> tuple[Tensor]:
        x, skips = self.input_proj(image), []
        for at in range(self.levels):
            skips.append(self.get_submodule(f"encoderlayer_{at}")(x))
            x = self.get_submodule(f"dowsample_{at}")(skips[-1])
        x = self.conv(x)
        for at in range(self.levels):
            x = torch.cat((self.get_submodule(f"upsample_{at}")(x), skips.pop()), dim=1)
            x = self.get_submodule(f"decoderlayer_{at}")(x)
        return (image + self.output_proj(x),)

    def official_constants(self) -> dict[str, Tensor]:
        """Return the buffers of the official class, which follow from the sizes: int64 (T, T), an index per block."""
        constants = {}
        for name, module in self.named_modules():
            if isinstance(module, WindowAttention):
                pixel, side = torch.arange(module.window**2), 2 * module.window - 1
                row, column = pixel // module.window, pixel % module.window
                down, right = (at[:, None] - at + module.window - 1 for at in (row, column))
                constants[f"{name}.relative_position_index"] = down * side + right
        return constants
