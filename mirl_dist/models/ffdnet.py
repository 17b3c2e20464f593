"""FFDNet: Zhang et al., TIP 2018 (arXiv 1710.04026). A denoiser that is told the noise level, pixel by pixel.

Written from the paper and from measurements of the class in cszn/KAIR at fc1732f; parameters have the names of that
class. MIR-L's table counts FFDNet(width=64, layers=15): 494,540 parameters.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mirl_dist.models.base import ImageNetwork, check_sizes, too_small


class FFDNet(ImageNetwork):
    """Plain convolutions on pixels packed two by two, beside a map of the noise level; no residual.

    852,108 parameters in 24 tensors at the defaults (colour); FFDNet(width=64, layers=15, channels=1), the grey one,
    has 485,316 in 30 and restores each channel of a colour image alone.
    width: channels between the layers. layers: convolutions, at least 2. channels: 3 (colour) or 1 (grey). sigma: noise
    level that is assumed where none is given, out of 255. Initial weights are orthogonal with gain 0.2, biases 0.
    Raises UserError for sizes that do not fit, naming each.
    """

    def __init__(self, width: int = 96, layers: int = 12, channels: int = 3, sigma: float = 25.0) -> None:
        problems = too_small(1, width=width) + too_small(2, layers=layers)
        if channels not in (1, 3):
            problems.append(f"channels = {channels} (must be 3 for colour, or 1 for grey)")
        if not 0 <= sigma <= 255:
            problems.append(f"sigma = {sigma} (must be from 0 to 255)")
        check_sizes("FFDNet", problems)
        super().__init__()
        self.channels, self.sigma = channels, sigma
        widths = [4 * channels + 1, *[width] * (layers - 1), 4 * channels]
        convs = [nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths)]
        self.model = nn.Sequential(*[part for conv in convs for part in (conv, nn.ReLU())][:-1])
        for conv in convs:
            nn.init.orthogonal_(conv.weight, gain=0.2)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Return the restored image.

        noise_level: deviation of the noise in units of the image (25 / 255), float (B, 1, 1, 1) or (B, 1, H, W).
        """
        if noise_level is None:
            return super().forward(image)
        self.check_image(image)
        batch, _, height, width = image.shape
        level = noise_level.expand(batch, 1, height, width)
        return self.denoise(self.pad(torch.cat((image, level), dim=1)))[..., :height, :width]

    def pad(self, image: Tensor) -> Tensor:
        """Repeat the last row and column of odd sides, as published."""
        return F.pad(image, (0, image.shape[-1] % 2, 0, image.shape[-2] % 2), mode="replicate")

    def restore(self, image: Tensor) -> tuple[Tensor, ...]:
        level = torch.full_like(image[:, :1], self.sigma / 255)
        return (self.denoise(torch.cat((image, level), dim=1)),)

    def denoise(self, x: Tensor) -> Tensor:
        """Restore (B, 3 + 1, H, W), image and noise level, H and W even, to (B, 3, H, W)."""
        planes = rearrange(x[:, :-1], "b (k c) h w -> (b k) c h w", c=self.channels)
        level = F.avg_pool2d(x[:, -1:], 2).repeat_interleave(planes.shape[0] // x.shape[0], dim=0)
        packed = F.pixel_unshuffle(planes, 2)
        restored = F.pixel_shuffle(self.model(torch.cat((packed, level), dim=1)), 2)
        return rearrange(restored, "(b k) c h w -> b (k c) h w", b=x.shape[0])
