"""PromptIR: Potlapalli et al., NeurIPS 2023 (arXiv 2306.13090), also the dense network that MIR-L prunes.

Written from the paper and from measurements of the official class (va1shn9v/PromptIR at 106159a, whose code has a
non-commercial licence and was not copied). Outputs and gradients equal those of that class up to rounding; parameters
have the official names.

Differences from the published code:
- Six 1x1 convolutions that the published class owns but never calls are absent (`official_only_shapes`): 215,296 of
  35,592,263 parameters at the default sizes. MIR-L's code leaves them at their initial values but counts them as
  prunable, so its global threshold and its totals differ slightly.
- Any image size from 1x1 is accepted; the published network needs multiples of 8.
- All widths follow `dim` and `prompt_dims`, and `prompt_heads` is a parameter; the defaults are the published values.
- The published option `decoder=False` fails (widths do not match) and is omitted. Norms are always "WithBias".
- The mixture of prompt components is one matrix product.

Shape letters: B batch, C channels, H W pixels, L prompt components, S prompt side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from mirl_dist.errors import UserError
from mirl_dist.models.restormer import (
    Conv3x3,
    Downsample,
    PatchEmbed,
    PixelLinear,
    TransformerBlock,
    Upsample,
    channels_first,
    channels_last,
    level,
    pad_to_multiple,
)


class PromptBlock(nn.Module):
    """Prompt generation: a mixture of learnt components, weighted by the image's features. Section 3.1.1.

    Features (B, H, W, C) to a prompt (B, H, W, channels). The mean over pixels gives softmax weights of the components
    (1, L, channels, S, S), which are initially uniform in [0, 1). The mixture is resized bilinearly to (H, W)
    (align_corners=False, no antialiasing) and passed through a 3x3 convolution.
    """

    def __init__(self, feature_channels: int, channels: int, length: int, side: int) -> None:
        super().__init__()
        self.prompt_param = nn.Parameter(torch.rand(1, length, channels, side, side))
        self.linear_layer = nn.Linear(feature_channels, length)
        self.conv3x3 = Conv3x3(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        shares = self.linear_layer(features.mean(dim=(1, 2))).softmax(dim=1)  # (B, L)
        components = rearrange(self.prompt_param, "1 l c h w -> l (h w c)")
        side = self.prompt_param.shape[-1]
        mixture = rearrange(shares @ components, "b (h w c) -> b h w c", h=side, w=side)
        prompt: Tensor = self.conv3x3(resize_bilinear(mixture, *features.shape[1:3]))
        return prompt


def resize_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Resize (B, H, W, C) to (B, height, width, C) as F.interpolate does, without align_corners and antialiasing.

    Computed as two small matrix products, which are deterministic on every device and which torch.compile can trace.
    """
    rows, columns = _interpolation(x.shape[1], height, x), _interpolation(x.shape[2], width, x)
    tall = rearrange(rows @ rearrange(x, "b h w c -> b h (w c)"), "b y (w c) -> b y w c", c=x.shape[-1])
    return columns @ tall


def _interpolation(size: int, to: int, like: Tensor) -> Tensor:
    """Return the matrix (to, size) that interpolates a line linearly between pixel centres, repeating its ends."""
    pixels, wanted = (torch.arange(n, device=like.device, dtype=torch.float64) for n in (size, to))
    positions = ((wanted + 0.5) * (size / to) - 0.5).clamp(0, size - 1)
    weights = (1 - (positions.unsqueeze(1) - pixels).abs()).clamp_min(0)
    return weights.to(like.dtype)


class PromptIR(nn.Module):
    """Image restoration network: a four-level Restormer whose decoder is conditioned on learnt prompts.

    Input and output: float (B, 3, H, W), nominally in [0, 1] (the output is not clipped), any H, W >= 1; padded
    internally to multiples of 8 and cropped again. 35,376,967 parameters in 542 tensors at the defaults.
    Initial values are PyTorch's defaults; temperatures 1, norm scales 1 and shifts 0, prompts uniform in [0, 1).

    dim: channels of level 1, even; levels have dim, 2 dim, 4 dim, 8 dim. blocks, heads: per level, highest resolution
    first (the decoder repeats levels 3, 2, 1). refinement_blocks: at full resolution after the decoder.
    ffn_expansion: ratio of hidden to input channels. prompt_length: components per prompt.
    prompt_dims, prompt_sizes: channels and side of prompts 1, 2, 3, which are computed from features with 2 dim, 4 dim,
    8 dim channels. prompt_heads: heads of the transformer blocks on the prompts.
    Raises UserError for inconsistent sizes, naming each wrong number, and for an input of another shape.
    Source: section 3 and the official class; differences are listed in the module docstring.
    """

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
        scalars = {"dim": dim, "prompt_length": prompt_length, "prompt_heads": prompt_heads}
        rows = {"blocks": blocks, "heads": heads, "prompt_dims": prompt_dims, "prompt_sizes": prompt_sizes}
        _check_sizes(scalars, rows, refinement_blocks, ffn_expansion)
        super().__init__()
        c1, c2, c3, c4 = dim, 2 * dim, 4 * dim, 8 * dim

        def row(channels: int, at: int, count: int) -> nn.Sequential:
            return level(channels, heads[at], ffn_expansion, count)

        def prompt_stage(at: int, channels: int, out: int) -> tuple[PromptBlock, TransformerBlock, PixelLinear]:
            joined = channels + prompt_dims[at]
            # This order determines the random initial weights.
            prompt = PromptBlock(channels, prompt_dims[at], prompt_length, prompt_sizes[at])
            block = TransformerBlock(joined, prompt_heads, ffn_expansion)
            return prompt, block, PixelLinear(joined, out)

        self.patch_embed = PatchEmbed(c1)
        self.encoder_level1, self.down1_2 = row(c1, 0, blocks[0]), Downsample(c1)
        self.encoder_level2, self.down2_3 = row(c2, 1, blocks[1]), Downsample(c2)
        self.encoder_level3, self.down3_4 = row(c3, 2, blocks[2]), Downsample(c3)
        self.latent = row(c4, 3, blocks[3])

        self.prompt3, self.noise_level3, self.reduce_noise_level3 = prompt_stage(2, c4, c3)
        self.up4_3, self.reduce_chan_level3 = Upsample(c3), PixelLinear(c2 + c3, c3)
        self.decoder_level3 = row(c3, 2, blocks[2])

        self.prompt2, self.noise_level2, self.reduce_noise_level2 = prompt_stage(1, c3, c3)
        self.up3_2, self.reduce_chan_level2 = Upsample(c3), PixelLinear(c2 + c2, c2)
        self.decoder_level2 = row(c2, 1, blocks[1])

        self.prompt1, self.noise_level1, self.reduce_noise_level1 = prompt_stage(0, c2, c2)
        self.up2_1, self.decoder_level1 = Upsample(c2), row(c2, 0, blocks[0])
        self.refinement, self.output = row(c2, 0, refinement_blocks), Conv3x3(c2, 3)

    def official_only_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors that the official class owns but never uses.

        They follow this network's sizes; 256 channels are fixed, as published.
        """
        c1, c2, c3 = (self.patch_embed.proj.out_channels * 2**at for at in range(3))
        p1, p2, p3 = (block.conv3x3.out_channels for block in (self.prompt1, self.prompt2, self.prompt3))
        return {
            "chnl_reduce1.weight": (p1, p1, 1, 1),
            "chnl_reduce2.weight": (p2, p2, 1, 1),
            "chnl_reduce3.weight": (256, p3, 1, 1),
            "reduce_noise_channel_1.weight": (c1, c1 + p1, 1, 1),
            "reduce_noise_channel_2.weight": (c2, c2 + p2, 1, 1),
            "reduce_noise_channel_3.weight": (c3, c3 + 256, 1, 1),
        }

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise UserError(
                f"found an input of shape {tuple(image.shape)}, where PromptIR takes images of shape "
                "(B, 3, H, W), none of them 0. Give colour images: batch, channels, height, width."
            )
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, 8)
        correction = channels_first(self._correction(channels_last(padded).contiguous()))
        return (correction + padded)[..., :height, :width]

    def _correction(self, image: Tensor) -> Tensor:
        """Return the residual to add to the image: (B, H, W, 3) to (B, H, W, 3), H and W multiples of 8."""
        encoded1 = self.encoder_level1(self.patch_embed(image))  # (B, H, W, dim)
        encoded2 = self.encoder_level2(self.down1_2(encoded1))  # (B, H/2, W/2, 2 dim)
        encoded3 = self.encoder_level3(self.down2_3(encoded2))  # (B, H/4, W/4, 4 dim)
        x = self.latent(self.down3_4(encoded3))  # (B, H/8, W/8, 8 dim)

        x = self.reduce_noise_level3(self.noise_level3(torch.cat((x, self.prompt3(x)), dim=-1)))
        x = self.reduce_chan_level3(torch.cat((self.up4_3(x), encoded3), dim=-1))
        x = self.decoder_level3(x)

        x = self.reduce_noise_level2(self.noise_level2(torch.cat((x, self.prompt2(x)), dim=-1)))
        x = self.reduce_chan_level2(torch.cat((self.up3_2(x), encoded2), dim=-1))
        x = self.decoder_level2(x)

        x = self.reduce_noise_level1(self.noise_level1(torch.cat((x, self.prompt1(x)), dim=-1)))
        x = self.decoder_level1(torch.cat((self.up2_1(x), encoded1), dim=-1))
        correction: Tensor = self.output(self.refinement(x))
        return correction


def _check_sizes(
    scalars: dict[str, int], rows: dict[str, Sequence[int]], refinement_blocks: int, ffn_expansion: float
) -> None:
    """Raise a UserError that lists all problems with PromptIR's sizes."""
    wanted = {"blocks": 4, "heads": 4, "prompt_dims": 3, "prompt_sizes": 3}
    bad = [f"{key} = {value} (must be >= 1)" for key, value in scalars.items() if value < 1]
    for key, row in rows.items():
        if len(row) != wanted[key]:
            bad.append(f"{key} = {list(row)} has {len(row)} numbers (must be {wanted[key]})")
        elif min(row) < 1:
            bad.append(f"{key} = {list(row)} (all must be >= 1)")
    if refinement_blocks < 0:
        bad.append(f"refinement_blocks = {refinement_blocks} (must be >= 0)")
    dim, prompt_heads = scalars["dim"], scalars["prompt_heads"]
    if dim % 2:
        bad.append(f"dim = {dim} is odd (must be even: a step down halves it, then packs four pixels into one)")
    if dim >= 1 and int(ffn_expansion * dim) < 1:
        bad.append(f"ffn_expansion = {ffn_expansion} leaves no hidden channel at dim = {dim}")
    if not bad:
        for at, count in enumerate(rows["heads"]):
            if dim * 2**at % count:
                bad.append(f"level {at + 1} has {dim * 2**at} channels, which heads[{at}] = {count} does not divide")
        for at, extra in enumerate(rows["prompt_dims"]):
            width = dim * 2 ** (at + 1) + extra
            if width % prompt_heads:
                bad.append(
                    f"prompt {at + 1} is read with {dim * 2 ** (at + 1)} + {extra} = {width} channels, "
                    f"which prompt_heads = {prompt_heads} does not divide"
                )
    if bad:
        raise UserError(
            f"found sizes that do not fit: {'; '.join(bad)}, where PromptIR is built. "
            "Change these numbers; the published ones are the defaults."
        )
