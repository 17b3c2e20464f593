"""MPRNet: Zamir et al., CVPR 2021 (arXiv 2102.02808), "Multi-Stage Progressive Image Restoration".

Written from the paper and from measurements of the official class (swz30/MPRNet at 43feb2a, whose code has a
non-commercial licence and was not copied); parameters have the official names. Differences from the published code:
- The one PReLU of the network is a parameter once, `shallow_feat1.1.body.1.weight`; the official state dict repeats it
  (`MPRNet.official_aliases`).
- Any image size is accepted; the published network needs multiples of 8.
- Quarters and halves of the image are computed as one batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from mirl_dist.models.base import ImageNetwork, check_sizes, too_small, upsample_bilinear

Features = Sequence[Tensor]  # of levels 1, 2, 3: at full, half and quarter resolution


def conv(before: int, after: int, kernel: int = 1) -> nn.Conv2d:
    """Build a convolution without bias that keeps the size of the image."""
    return nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)


class MeanAttention(nn.Module):
    """Scales each channel by a gate that is computed from the means of all channels: (B, C, H, W) as before."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = channels // reduction
        self.conv_du = nn.Sequential(conv(channels, inner), nn.ReLU(), conv(inner, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.conv_du(x.mean(dim=(-2, -1), keepdim=True))
        return out


class ChannelAttentionBlock(nn.Module):
    """CAB: x + attention(conv(prelu(conv(x)))): (B, C, H, W) to (B, C, H, W).

    activation: the PReLU of the network, a child of the block that `owns` it alone.
    """

    def __init__(self, channels: int, reduction: int, activation: nn.PReLU, owns: bool = False) -> None:
        super().__init__()
        self.CA = MeanAttention(channels, reduction)
        layers = {"0": conv(channels, channels, 3), "2": conv(channels, channels, 3)}
        self.body = nn.ModuleDict(layers | ({"1": activation} if owns else {}))
        self.activation = (activation,)  # in a tuple it is no child: one name for one parameter

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.CA(self.body["2"](self.activation[0](self.body["0"](x))))
        return out


class Blocks:
    """Builds the blocks of one network, which share a reduction and a PReLU."""

    def __init__(self, reduction: int) -> None:
        self.reduction, self.activation = reduction, nn.PReLU()

    def one(self, channels: int, owns: bool = False) -> ChannelAttentionBlock:
        return ChannelAttentionBlock(channels, self.reduction, self.activation, owns)

    def row(self, channels: int, count: int = 2) -> list[nn.Module]:
        return [self.one(channels) for _ in range(count)]

    def stem(self, channels: int, owns: bool = False) -> nn.Sequential:
        return nn.Sequential(conv(3, channels, 3), self.one(channels, owns))


class HalveBilinear(nn.Module):
    """Half the resolution, bilinear, and a 1x1 convolution: (B, C, H, W) to (B, C', H/2, W/2)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        # At half the resolution, bilinear interpolation is the mean of four pixels.
        self.down = nn.Sequential(nn.AvgPool2d(2), conv(before, after))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(x)
        return out


class DoubleBilinear(nn.Module):
    """Twice the resolution, bilinear, and a 1x1 convolution: (B, C, H, W) to (B, C', 2H, 2W)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up = nn.Sequential(OrderedDict({"1": conv(before, after)}))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(upsample_bilinear(x))
        return out


class StageEncoder(nn.Module):
    """Features of three levels; those of the stage before, if any, are projected and added at each level."""

    def __init__(self, widths: Sequence[int], blocks: Blocks, follows: bool) -> None:
        super().__init__()
        self.follows = follows
        for at, channels in enumerate(widths, start=1):
            self.add_module(f"encoder_level{at}", nn.Sequential(*blocks.row(channels)))
            if follows:
                self.add_module(f"csff_enc{at}", conv(channels, channels))
                self.add_module(f"csff_dec{at}", conv(channels, channels))
        self.down12, self.down23 = HalveBilinear(*widths[:2]), HalveBilinear(*widths[1:])

    def forward(self, x: Tensor, encoded: Features = (), decoded: Features = ()) -> list[Tensor]:
        features: list[Tensor] = []
        for at, down in enumerate((nn.Identity(), self.down12, self.down23)):
            x = self.get_submodule(f"encoder_level{at + 1}")(down(x))
            if self.follows:
                x = x + self.get_submodule(f"csff_enc{at + 1}")(encoded[at])
                x = x + self.get_submodule(f"csff_dec{at + 1}")(decoded[at])
            features.append(x)
        return features


class StageDecoder(nn.Module):
    """Features of three levels, from those of an encoder, lowest resolution first."""

    def __init__(self, widths: Sequence[int], blocks: Blocks) -> None:
        super().__init__()
        self.decoder_level1 = nn.Sequential(*blocks.row(widths[0]))
        self.decoder_level2 = nn.Sequential(*blocks.row(widths[1]))
        self.decoder_level3 = nn.Sequential(*blocks.row(widths[2]))
        self.skip_attn1, self.skip_attn2 = blocks.one(widths[0]), blocks.one(widths[1])
        self.up21, self.up32 = DoubleBilinear(widths[1], widths[0]), DoubleBilinear(widths[2], widths[1])

    def forward(self, encoded: Features) -> list[Tensor]:
        level3 = self.decoder_level3(encoded[2])
        level2 = self.decoder_level2(self.up32(level3) + self.skip_attn2(encoded[1]))
        level1 = self.decoder_level1(self.up21(level2) + self.skip_attn1(encoded[0]))
        return [level1, level2, level3]


class SupervisedAttention(nn.Module):
    """SAM: features and the degraded image to features for the next stage, and this stage's restored image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(channels, channels), conv(channels, 3), conv(3, channels)

    def forward(self, x: Tensor, degraded: Tensor) -> tuple[Tensor, Tensor]:
        restored = self.conv2(x) + degraded
        return self.conv1(x) * self.conv3(restored).sigmoid() + x, restored


class OriginalResolutionBlock(nn.Module):
    """ORB: channel attention blocks and a convolution, added to the input: (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int, count: int, blocks: Blocks) -> None:
        super().__init__()
        self.body = nn.Sequential(*blocks.row(channels, count), conv(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class OriginalResolutionNet(nn.Module):
    """ORSNet: full resolution throughout; each block is followed by one level of the second stage's features."""

    def __init__(self, widths: Sequence[int], extra: int, count: int, blocks: Blocks) -> None:
        super().__init__()
        first, second, third = widths
        for at in (1, 2, 3):
            self.add_module(f"orb{at}", OriginalResolutionBlock(first + extra, count, blocks))
        for part in ("enc", "dec"):
            self.add_module(f"up_{part}1", DoubleBilinear(second, first))
            self.add_module(f"up_{part}2", nn.Sequential(DoubleBilinear(third, second), DoubleBilinear(second, first)))
            for at in (1, 2, 3):
                self.add_module(f"conv_{part}{at}", conv(first, first + extra))

    def forward(self, x: Tensor, encoded: Features, decoded: Features) -> Tensor:
        for at in range(3):
            x = self.get_submodule(f"orb{at + 1}")(x)
            for part, features in (("enc", encoded), ("dec", decoded)):
                level = features[at] if at == 0 else self.get_submodule(f"up_{part}{at}")(features[at])
                x = x + self.get_submodule(f"conv_{part}{at + 1}")(level)
        return x


def _beside(x: Tensor) -> Tensor:
    """Join a batch of left halves followed by right halves: (2B, C, H, W) to (B, C, H, 2W)."""
    return rearrange(x, "(q b) c h w -> b c h (q w)", q=2)


def _below(x: Tensor) -> Tensor:
    """Join a batch of upper halves followed by lower halves: (2B, C, H, W) to (B, C, 2H, W)."""
    return rearrange(x, "(p b) c h w -> b c (p h) w", p=2)


class MPRNet(ImageNetwork):
    """Three stages, on quarters, on halves and on the whole image: 3,637,249 parameters in 262 tensors (deraining).

    width: channels of level 1 of the U-shaped stages; level_step: channels that each level adds; last_step: those that
    the last stage has more than `width`. The published networks have 40, 20, 16 (deraining), 80, 48, 32 (denoising:
    15,741,025 parameters) and 96, 48, 32 (deblurring: 20,127,073). reduction: of the channels in channel attention.
    blocks: per block of the last stage. `stages` gives the images of stages 3, 2, 1. Initial values are PyTorch's.
    Raises UserError for sizes that do not fit, naming each.
    """

    multiple = 8

    def __init__(
        self, width: int = 40, level_step: int = 20, last_step: int = 16, reduction: int = 4, blocks: int = 8
    ) -> None:
        problems = too_small(1, width=width, reduction=reduction, blocks=blocks)
        problems += too_small(0, level_step=level_step, last_step=last_step)
        if width >= 1 and reduction > width:
            problems.append(f"reduction = {reduction} leaves no channel at width = {width}")
        check_sizes("MPRNet", problems)
        super().__init__()
        widths = (width, width + level_step, width + 2 * level_step)
        build = Blocks(reduction)
        self.shallow_feat1 = build.stem(width, owns=True)
        self.shallow_feat2, self.shallow_feat3 = build.stem(width), build.stem(width)
        self.stage1_encoder, self.stage1_decoder = StageEncoder(widths, build, False), StageDecoder(widths, build)
        self.stage2_encoder, self.stage2_decoder = StageEncoder(widths, build, True), StageDecoder(widths, build)
        self.stage3_orsnet = OriginalResolutionNet(widths, last_step, blocks, build)
        self.sam12, self.sam23 = SupervisedAttention(width), SupervisedAttention(width)
        self.concat12 = conv(2 * width, width, 3)
        self.concat23 = conv(2 * width, width + last_step, 3)
        self.tail = conv(width + last_step, 3, 3)

    def restore(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        halves = rearrange(image, "b c (p h) w -> (p b) c h w", p=2)
        quarters = rearrange(halves, "b c h (q w) -> (q b) c h w", q=2)
        encoded = [_beside(level) for level in self.stage1_encoder(self.shallow_feat1(quarters))]
        decoded = self.stage1_decoder(encoded)
        attended, restored1 = self.sam12(decoded[0], halves)

        x = self.concat12(torch.cat((self.shallow_feat2(halves), attended), dim=1))
        encoded = [_below(level) for level in self.stage2_encoder(x, encoded, decoded)]
        decoded = self.stage2_decoder(encoded)
        attended, restored2 = self.sam23(decoded[0], image)

        x = self.concat23(torch.cat((self.shallow_feat3(image), attended), dim=1))
        restored3 = self.tail(self.stage3_orsnet(x, encoded, decoded)) + image
        return restored3, restored2, _below(restored1)

    def official_aliases(self) -> dict[str, str]:
        """Return the further names of the official state dict for a tensor, and its name here."""
        blocks = (name for name, module in self.named_modules() if isinstance(module, ChannelAttentionBlock))
        names = (f"{name}.body.1.weight" for name in blocks)
        return {name: "shallow_feat1.1.body.1.weight" for name in names if name != "shallow_feat1.1.body.1.weight"}
