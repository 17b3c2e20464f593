"""What one training sample is: decode, crop, turn or flip, degrade; and the `Batch` that the network sees."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mirl_dist.data import degrade
from mirl_dist.data.source_image import DAMAGE
from mirl_dist.faults import Fault

Pixels = NDArray[np.uint8]

# Indices into the eight turns and flips of a square; 0 leaves the image as it is.
TURNS: dict[str, tuple[int, ...]] = {
    "published": (1, 2, 3, 4, 5, 6, 7),
    "all": (0, 1, 2, 3, 4, 5, 6, 7),
    "flips": (0, 2, 4, 6),
    "none": (0,),
}


class Task(NamedTuple):
    """One degradation to undo. kind: which samples it reads; sigma_255: noise added on reading, 0 for pairs."""

    name: str
    kind: str
    sigma_255: int

    @classmethod
    def of(cls, name: str) -> Task:
        """'denoise_25' -> noise of sigma 25 on clean samples; 'derain', 'dehaze' -> stored pairs."""
        kind, _, level = name.partition("_")
        return cls(name, kind, int(level) if level else 0)


class Patch(NamedTuple):
    """One finished sample: uint8 (P, P, 3) degraded and clean, the index of its task, and its key for messages."""

    degraded: Pixels
    clean: Pixels
    task: int
    key: str


class Batch(NamedTuple):
    """Samples for one forward pass: float32 (B, 3, P, P) in [0, 1], int64 (B,) task indices, B keys."""

    degraded: Tensor
    clean: Tensor
    task: Tensor
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return Batch(move(self.degraded), move(self.clean), move(self.task), self.keys)


def decode(data: bytes, where: str, remedy: str = "Build the shards again.") -> Pixels:
    """PNG, JPEG or BMP bytes to uint8 (H, W, 3) RGB. Raises Fault naming `where` for bytes that are no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, *DAMAGE) as error:
        raise Fault(f"{where} does not decode as an image ({error}). {remedy}") from None


def turn(image: Pixels, index: int) -> Pixels:
    """One of the eight turns and flips: index // 2 quarter turns (0, 2: none and half), odd or high ones mirrored.

    0 identity, 2 up-down, 4 left-right, 6 half turn; 1, 3, 5, 7 the same after a quarter turn.
    """
    if index & 1:
        image = np.rot90(image)
    if index & 2:
        image = image[::-1]
    if index & 4:
        image = image[:, ::-1]
    return image


def to_tensor(images: list[Pixels]) -> Tensor:
    """uint8 (H, W, 3) images of one size to float32 (B, 3, H, W) in [0, 1]."""
    stacked = torch.from_numpy(np.stack(images))
    return stacked.permute(0, 3, 1, 2).contiguous().float().div_(255.0)


def make_patch(
    clean: Pixels,
    degraded: Pixels | None,
    task: Task,
    patch_pixels: int,
    augment: str,
    rng: np.random.Generator,
) -> tuple[Pixels, Pixels]:
    """One seeded random crop, turned or flipped, as (degraded, clean), both uint8 (P, P, 3).

    clean, degraded: uint8 (H, W, 3) of one size, H, W >= P; degraded None: noise of the task's sigma is added.
    MIR-L section IV-A and the released code: crop, then one of TURNS[augment], then noise, clipped and truncated.
    """
    top = int(rng.integers(clean.shape[0] - patch_pixels + 1))
    left = int(rng.integers(clean.shape[1] - patch_pixels + 1))
    index = int(rng.choice(TURNS[augment]))

    def cut(image: Pixels) -> Pixels:
        return np.ascontiguousarray(turn(image[top : top + patch_pixels, left : left + patch_pixels], index))

    target = cut(clean)
    if degraded is None:
        return degrade.gaussian_noise(target, task.sigma_255, rng), target
    return cut(degraded), target


def collate(patches: list[Patch]) -> Batch:
    """Patches of one size to a Batch, in their order."""
    return Batch(
        to_tensor([p.degraded for p in patches]),
        to_tensor([p.clean for p in patches]),
        torch.tensor([p.task for p in patches], dtype=torch.int64),
        tuple(p.key for p in patches),
    )
