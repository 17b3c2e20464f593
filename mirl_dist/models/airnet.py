"""AirNet: Li et al., CVPR 2022, "All-in-One Image Restoration for Unknown Corruption".

Written from the paper and from measurements of the official class (XLearning-SCU/2022-CVPR-AirNet at bedea82);
parameters and buffers have the official names. The deformable convolution is a gather and a matrix product.

Shape letters: B batch, C channels, H W pixels, K keys in the queue.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mirl_dist.models.base import ImageNetwork, check_sizes, too_small

SLOPE = 0.1  # of all leaky ReLUs


class NormedResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 shortcut: (B, C, H, W) to (B, C', H/stride, W/stride)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.backbone(x) + self.shortcut(x), SLOPE)


class DegradationEncoder(nn.Module):
    """An image to its embedding (B, 4 width), and to a map (B, width, H, W) that the restoration is guided by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.E_pre = NormedResidualBlock(3, width, 1)
        self.E = nn.Sequential(NormedResidualBlock(width, 2 * width, 2), NormedResidualBlock(2 * width, 4 * width, 2))
        self.mlp = nn.Sequential(nn.Linear(4 * width, 4 * width), nn.LeakyReLU(SLOPE), nn.Linear(4 * width, 4 * width))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        guide = self.E_pre(image)
        return self.mlp(self.E(guide).mean(dim=(-2, -1))), guide


class MomentumContrast(nn.Module):
    """The encoder that trains, its slow copy without gradient, and a queue of the copy's latest embeddings (C, K)."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, width: int, queue: int, momentum: float, temperature: float) -> None:
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.encoder_q = DegradationEncoder(width)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(4 * width, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, 1 + K) of query crops, the first that of the same image's key, and their guide maps.

        Updates the slow copy and the queue. The target of the cross entropy is 0 everywhere.
        """
        embedding, guide = self.encoder_q(query)
        embedding = F.normalize(embedding, dim=1)
        with torch.no_grad():
            for slow, fast in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.momentum)
            keys = F.normalize(self.encoder_k(key)[0], dim=1)
        positive = (embedding * keys).sum(dim=1, keepdim=True)
        logits = torch.cat((positive, embedding @ self.queue.clone()), dim=1) / self.temperature
        with torch.no_grad():
            count, room = keys.shape[0], self.queue.shape[1]
            places = (self.queue_ptr + torch.arange(count, device=keys.device)) % room
            self.queue.index_copy_(1, places, keys.T.to(self.queue.dtype))
            self.queue_ptr.copy_((self.queue_ptr + count) % room)
        return logits, guide


def deformable_convolution(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Convolve 3x3 at moved positions (DCNv2): (B, C, H, W) to (B, C', H, W).

    offset: (B, 9, 2, H, W), rows and columns to add to the position of each of the nine pixels, in reading order.
    mask: (B, 9, H, W), factors. weight: (C', C, 3, 3). Interpolates bilinearly; the image is 0 outside.
    """
    batch, _, height, width = x.shape
    number = torch.arange(9, device=x.device)[:, None, None]
    row = torch.arange(height, device=x.device)[:, None] + number // 3 - 1 + offset[:, :, 0]
    column = torch.arange(width, device=x.device) + number % 3 - 1 + offset[:, :, 1]
    top, left = row.floor(), column.floor()
    pixels = rearrange(x, "b c h w -> (b h w) c")
    start = torch.arange(batch, device=x.device)[:, None, None, None] * (height * width)
    patches = torch.zeros((), dtype=x.dtype, device=x.device)
    for at_row in (top, top + 1):
        for at_column in (left, left + 1):
            share = (1 - (row - at_row).abs()) * (1 - (column - at_column).abs()) * mask
            inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            place = start + at_row.clamp(0, height - 1).long() * width + at_column.clamp(0, width - 1).long()
            values = pixels.index_select(0, place.flatten()).view(*place.shape, -1)
            patches = patches + values * (share * inside)[..., None].to(x.dtype)
    product = rearrange(patches, "b k h w c -> b h w (k c)") @ rearrange(weight, "o c y x -> (y x c) o")
    return rearrange(product, "b h w o -> b o h w")


class GuidedDeformableConv(nn.Module):
    """A deformable convolution whose offsets and factors follow from the features and the guide map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        bound = (9 * channels) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.conv_offset_mask = nn.Conv2d(2 * channels, 27, 3, padding=1)
        nn.init.zeros_(self.conv_offset_mask.weight)
        nn.init.zeros_(self.conv_offset_mask.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        moved: Tensor = self.conv_offset_mask(torch.cat((x, guide), dim=1))
        moved = moved.to(torch.promote_types(moved.dtype, torch.float32))  # bfloat16 has no positions beyond 256
        offset = rearrange(moved[:, :18], "b (k two) h w -> b k two h w", two=2)
        inputs = (x, offset, moved[:, 18:].sigmoid(), self.weight)
        if not torch.is_grad_enabled():
            return deformable_convolution(*inputs)
        # The gathered pixels are 36 times as large as the features: backward gathers them again.
        out: Tensor = checkpoint(deformable_convolution, *inputs, use_reentrant=False, preserve_rng_state=False)
        return out


class FeatureTransform(nn.Module):
    """x * gamma + beta, both computed from the guide map at each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def mix() -> nn.Sequential:
            first, second = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
            return nn.Sequential(first, nn.LeakyReLU(SLOPE), second)

        self.conv_gamma, self.conv_beta = mix(), mix()

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        out: Tensor = x * self.conv_gamma(guide) + self.conv_beta(guide)
        return out


class GuidedModule(nn.Module):
    """DGM: x plus its deformable convolution plus its feature transform."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dcn = GuidedDeformableConv(channels)
        self.sft = FeatureTransform(channels)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        out: Tensor = x + self.dcn(x, guide) + self.sft(x, guide)
        return out


class GuidedBlock(nn.Module):
    """DGB: two guided modules, each followed by a 3x3 convolution, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dgm1, self.dgm2 = GuidedModule(channels), GuidedModule(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        inner = F.leaky_relu(self.conv1(F.leaky_relu(self.dgm1(x, guide), SLOPE)), SLOPE)
        out: Tensor = x + self.conv2(F.leaky_relu(self.dgm2(inner, guide), SLOPE))
        return out


class GuidedGroup(nn.Module):
    """Parts that take the guide map, and a 3x3 convolution at the end, added to the input."""

    def __init__(self, channels: int, parts: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.ModuleList([*parts, nn.Conv2d(channels, channels, 3, padding=1)])

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        *parts, last = self.body
        inner = x
        for part in parts:
            inner = part(inner, guide)
        out: Tensor = x + last(inner)
        return out


class GuidedRestorer(GuidedGroup):
    """Groups of guided blocks between two 3x3 convolutions; no residual to the image."""

    def __init__(self, channels: int, groups: int, blocks: int) -> None:
        rows = [[GuidedBlock(channels) for _ in range(blocks)] for _ in range(groups)]
        super().__init__(channels, [GuidedGroup(channels, list(row)) for row in rows])
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1))
        self.tail = nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        out: Tensor = self.tail(super().forward(self.head(x), guide))
        return out


class AirNet(ImageNetwork):
    """A restorer guided by a map from a contrastively trained encoder. 8,930,313 parameters in 528 tensors.

    7,610,377 of them train; the others are the encoder's slow copy. `forward` uses 6,329,609: the restorer and the
    first block of the encoder; the rest of the encoder learns by `contrast` alone. The encoder has batch norms and a
    queue: buffers that training changes.
    width: channels. groups, blocks: of the restorer, and per group. queue: embeddings in the queue, published as 256
    times the number of tasks in shape (256, 256 * tasks). momentum, temperature: of the contrastive encoder.
    Initial values are PyTorch's; offsets of deformable convolutions 0, their factors 1/2.
    Raises UserError for sizes that do not fit, naming each.
    """

    def __init__(
        self,
        width: int = 64,
        groups: int = 5,
        blocks: int = 5,
        queue: int = 1280,
        momentum: float = 0.999,
        temperature: float = 0.07,
    ) -> None:
        problems = too_small(1, width=width, groups=groups, blocks=blocks, queue=queue)
        if not 0 <= momentum <= 1:
            problems.append(f"momentum = {momentum} (must be from 0 to 1)")
        if not temperature > 0:
            problems.append(f"temperature = {temperature} (must be > 0)")
        check_sizes("AirNet", problems)
        super().__init__()
        self.R = GuidedRestorer(width, groups, blocks)
        contrast = MomentumContrast(width, queue, momentum, temperature)
        self.E = nn.Sequential(OrderedDict(E=contrast))

    def restore(self, image: Tensor) -> tuple[Tensor]:
        guide = self.get_submodule("E.E.encoder_q.E_pre")(image)
        return (self.R(image, guide),)

    def contrast(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return restored query crops and contrastive logits; query and key are crops of the same images in [0, 1].

        See `MomentumContrast.forward`; the paper's loss is L1 + 0.1 * cross entropy of the logits with class 0.
        """
        logits, guide = self.get_submodule("E.E")(query, key)
        return self.R(query, guide), logits
