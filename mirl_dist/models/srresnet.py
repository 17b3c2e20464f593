"""SRResNet without upsampling: the plain residual network of MiOIR (Kong et al., arXiv 2401.03379).

Written from measurements of the official class (Xiangtaokong/MiOIR at 4d5f6ca); parameters have the official names.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mirl_dist.models.base import ImageNetwork, check_sizes, too_small


class PlainResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), both 3x3: (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return out


class SRResNet(ImageNetwork):
    """Residual blocks at full resolution, added to the input image. 1,222,147 parameters in 70 tensors.

    width: channels. blocks: residual blocks. Initial weights are 0.1 times Kaiming's normal ones, biases 0.
    Raises UserError for sizes below 1.
    """

    def __init__(self, width: int = 64, blocks: int = 16) -> None:
        check_sizes("SRResNet", too_small(1, width=width, blocks=blocks))
        super().__init__()
        self.conv_first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(PlainResidualBlock(width) for _ in range(blocks)))
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                module.weight.data.mul_(0.1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def restore(self, image: Tensor) -> tuple[Tensor]:
        x = self.body(F.leaky_relu(self.conv_first(image), 0.1))
        return (image + self.conv_last(F.leaky_relu(self.conv_hr(x), 0.1)),)
