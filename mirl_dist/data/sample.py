"""Makes a training patch (read a crop, degrade, augment) and the `Batch` that the network receives."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from mirl_dist.config.seeding import shared_rng
from mirl_dist.config.tasks import Task
from mirl_dist.data.degradations.degrade import context_pixels, degrade_for_training
from mirl_dist.data.image_files import Box, ImageRefused
from mirl_dist.data.image_files import decode as decode_file
from mirl_dist.data.manifest import StoredImage
from mirl_dist.errors import UserError

Pixels = NDArray[np.uint8]

# Indices of the eight rotations and flips of a square (`turned_planes`); 0 is the identity.
TURNS: dict[str, tuple[int, ...]] = {
    "published": (1, 2, 3, 4, 5, 6, 7),
    "all": (0, 1, 2, 3, 4, 5, 6, 7),
    "flips": (0, 2, 4, 6),
    "none": (0,),
}


class SampleLocation(NamedTuple):
    """What a reader needs to make one patch: the sample's location on this node, and the values that seed its draws.

    task: index among the run's tasks. pass_index: number of the pass over the sample's source in the round.
    """

    path: str
    shard: str
    key: str
    height: int
    width: int
    clean: StoredImage
    degraded: StoredImage | None
    task: int
    round_: int
    pass_index: int


class Patch(NamedTuple):
    """One training pair: uint8 (3, P, P) degraded and clean, the task index, and the key for messages."""

    degraded: Pixels
    clean: Pixels
    task: int
    key: str


NumpyBatch = tuple[Pixels, Pixels, NDArray[np.int64], tuple[str, ...], int]
"""The fields of a `Batch` as NumPy arrays: between processes, each tensor would need a socket."""


class Batch(NamedTuple):
    """The patches of one forward pass.

    degraded, clean: (B, 3, P, P), uint8 from the reader, and float32 in [0, 1] after `to`. task: int64 (B,) task
    indices. skipped: how many patches replace damaged ones.
    """

    degraded: Tensor
    clean: Tensor
    task: Tensor
    keys: tuple[str, ...]
    skipped: int = 0

    @classmethod
    def of(cls, batch: NumpyBatch, pin: bool) -> Batch:
        """Wrap the arrays as tensors without a copy; pin: copy to page-locked memory for asynchronous transfers."""
        *arrays, keys, skipped = batch
        degraded, clean, task = (torch.from_numpy(array) for array in arrays)
        if pin:
            degraded, clean, task = degraded.pin_memory(), clean.pin_memory(), task.pin_memory()
        return cls(degraded, clean, task, keys, skipped)

    def to(self, device: torch.device) -> Batch:
        """Move to a device, then convert images to float32 in [0, 1]; uint8 transfers a quarter of the bytes."""

        degraded, clean, task = (x.to(device, non_blocking=True) for x in self[:3])
        return Batch(degraded.float().div_(255.0), clean.float().div_(255.0), task, self.keys, self.skipped)


def decode(data: bytes, source: str) -> Pixels:
    """Decode an image of a shard to uint8 (H, W, 3) RGB. Raises UserError naming `source` if it cannot be decoded."""
    try:
        return decode_file(data).pixels
    except ImageRefused as reason:
        raise UserError(f"{source} does not decode as an image (it {reason}). Build the shards again.") from None


def turned_planes(image: Pixels, index: int) -> Pixels:
    """Apply one of the eight rotations and flips of a square to a uint8 (H, W, 3) crop; return planes (3, H, W).

    0 identity, 2 vertical flip, 4 horizontal flip, 6 half turn; 1, 3, 5, 7 the same after a quarter turn. Transforming
    planes is twice as fast as transforming interleaved pixels.
    """
    # Plain numpy here and in the other per-patch functions: einops costs several microseconds per call.
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    if index & 1:
        planes = planes.transpose(0, 2, 1)[:, ::-1]
    if index & 2:
        planes = planes[:, ::-1]
    if index & 4:
        planes = planes[:, :, ::-1]
    return planes


def to_tensor(images: list[Pixels]) -> Tensor:
    """Stack uint8 (H, W, 3) images of equal size into a float32 (B, 3, H, W) tensor in [0, 1]."""
    return rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w").contiguous().float().div_(255.0)


def crop(location: SampleLocation, stored: StoredImage, box: Box) -> Pixels:
    """Read a crop of one image, uint8 (height, width, 3). Of a PPM, only the rows of the box are read from disk.

    Raises OSError if the file cannot be read, and UserError if the data are not the expected image.
    """
    source = f"{location.shard}, sample '{location.key}'"
    stride = 3 * location.width
    header = stored.size - location.height * stride  # of a PPM
    begin, size = (header + box.top * stride, box.height * stride) if stored.format == "ppm" else (0, stored.size)
    handle = os.open(location.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(handle, size, stored.offset + begin)
    finally:
        os.close(handle)
    if stored.format == "ppm":
        if header <= 0 or len(data) != size:
            raise UserError(f"{source}: the shard ends inside its pixels. Copy the shard again.")
        band = np.frombuffer(data, np.uint8).reshape(box.height, location.width, 3)
        return band[:, box.left : box.left + box.width]
    image = decode(data, source)
    if image.shape[:2] != (location.height, location.width):
        raise UserError(
            f"{source} has {image.shape[:2]} pixels, the index says {location.height, location.width}. Build it again."
        )
    return box.cut(image)


class PatchReader(NamedTuple):
    """Makes the seeded random patches of a run. tasks: of the run, by index. augment: a key of TURNS."""

    tasks: tuple[Task, ...]
    seed: int
    patch_pixels: int
    augment: str

    def read(self, location: SampleLocation) -> Patch:
        """Make one patch of a sample: crop, degrade (if the sample is clean only), rotate or flip.

        The crop position is uniform over the image, whose sides are at least `patch_pixels`. As in MIR-L section IV-A
        and the released code: a crop, one of TURNS[augment], and noise that is clipped and truncated. The context that
        a degradation needs around the crop is read with it and cut off afterwards. Raises what `crop` raises.
        """
        task, side, turns = self.tasks[location.task], self.patch_pixels, TURNS[self.augment]
        rng = shared_rng("patch", self.seed, location.round_, location.pass_index, task.name, location.key)
        choices = (location.height - side + 1, location.width - side + 1, len(turns))
        draws = rng.bit_generator.random_raw(3).tolist()
        top, left, turn = (draw * count >> 64 for draw, count in zip(draws, choices, strict=True))
        context = 0 if location.degraded else context_pixels(task)
        y, x = max(0, top - context), max(0, left - context)
        end_y, end_x = min(location.height, top + side + context), min(location.width, left + side + context)
        box = Box(y, x, end_y - y, end_x - x)
        clean = crop(location, location.clean, box)
        if location.degraded:
            degraded = crop(location, location.degraded, box)
        else:
            degraded = degrade_for_training(task, clean, rng)
        inner = Box(top - y, left - x, side, side)
        degraded, clean = (turned_planes(inner.cut(image), turns[turn]) for image in (degraded, clean))
        return Patch(degraded, clean, location.task, f"{task.name}:{location.key}")


def collate(patches: list[Patch], skipped: int = 0) -> NumpyBatch:
    """Collate patches of equal size into a batch, in order. Augmented patches are views; this makes their only copy."""
    shape = (len(patches), *patches[0].clean.shape)
    degraded, clean = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    for number, patch in enumerate(patches):
        degraded[number] = patch.degraded
        clean[number] = patch.clean
    task = np.array([p.task for p in patches], dtype=np.int64)
    return degraded, clean, task, tuple(p.key for p in patches), skipped
