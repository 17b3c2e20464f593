"""Restores image files with a ticket's network, one image at a time, in tiles where memory does not suffice."""

from __future__ import annotations

import contextlib
import gc
import io
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn

from mirl_dist.cli.doctor import memory
from mirl_dist.cli.doctor.machine import memory_limits
from mirl_dist.cli.evaluate import check_device, check_tiles
from mirl_dist.config.config import Config
from mirl_dist.config.schema_training import EvaluateSection
from mirl_dist.data.image_files import Decoded, ImageRefused, decode
from mirl_dist.distributed import device_errors, hardware
from mirl_dist.errors import UserError
from mirl_dist.evaluation import evaluate
from mirl_dist.observability import progress
from mirl_dist.storage import Folder, output_paths
from mirl_dist.tickets.open import network, open_ticket

AUTO, WHOLE = "auto", "none"
AUTO_TILES = (1024, 512, 256, 128)  # pixels per side, tried in this order
_RESERVE = 1.25  # times the counted bytes: the allocator and the libraries need more than the tensors


def restore_files(
    images: list[Path], reference: str, out: Path, tile: str, device: str | None, *, overwrite: bool
) -> None:
    """Restore image files to PNG files of the same stem; those that are written stay if a later one fails.

    Computes what `evaluate` computes, in the ticket's evaluate.precision. tile: 'auto' (tiles for images that do not
    fit into memory), 'none', or the side of the tiles in pixels. device: None for the config's train.device.
    Raises UserError for unusable files, and for outputs that exist, before restoring any.
    """
    _check_images(images, out)
    check_device(device)
    output_paths.check_folder(
        out, names=[f"{path.stem}.png" for path in images], overwrite=overwrite, reads=[*images, reference]
    )
    opened = open_ticket(reference)
    config, ticket = opened.config, opened.ticket()
    sides = _tile_sides(tile, config)
    place = _prepare_device(device or config.train.device)
    notes: Counter[str] = Counter()
    with progress.bar("checking images", len(images)) as advance:
        for number, path in enumerate(images):
            notes.update(_read(path).notes)
            advance(number + 1, path.name)
    for note, count in sorted(notes.items()):
        progress.say(f"{note} (images: {count})")
    hardware.keep_freed_memory()
    model, folder = network(config, opened.trained_weights()).to(place), Folder(out)
    # Counting takes seconds, and images mostly share a size.
    count_bytes = cache(partial(memory.scoring_bytes, config.model.name, config.model.sizes()))
    with progress.bar("restoring", len(images)) as advance:
        for number, path in enumerate(images):
            restored = _restore(model, path, place, sides, config.evaluate, count_bytes)
            data = io.BytesIO()
            Image.fromarray(np.round(restored * 255).astype(np.uint8)).save(data, "PNG")
            folder.put(f"{path.stem}.png", data.getvalue())
            advance(number + 1, path.name)
    progress.say(f"{len(images)} restored by round {ticket.round} into {out}")


def _prepare_device(wanted: str) -> torch.device:
    """Choose the device and switch on exact arithmetic, as Ranks does. Raises UserError if the device is missing."""
    choice = hardware.choose_device(wanted)
    if choice.fault:
        raise UserError(choice.fault)
    if choice.why_cpu:
        progress.say(choice.note())
    hardware.use_exact_arithmetic()
    return torch.device("cpu" if choice.cpu else "cuda")


def _check_images(images: list[Path], out: Path) -> None:
    """Raise UserError for images that do not exist, or of which two would be written to one file."""
    twice = [stem for stem, count in Counter(path.stem.lower() for path in images).items() if count > 1]
    if twice:
        raise UserError(f"two images are named '{twice[0]}': both would become {out / twice[0]}.png. Rename one.")
    missing = [str(path) for path in images if not path.is_file()]
    if missing:
        raise UserError(f"no image at {', '.join(missing[:5])}. Give paths of image files.")


def _tile_sides(tile: str, config: Config) -> tuple[int | None, ...]:
    """Return the tile sides to try in turn; None stands for the whole image."""
    if tile in (AUTO, WHOLE):
        return (None, *(s for s in AUTO_TILES if s > config.evaluate.tile_overlap)) if tile == AUTO else (None,)
    if not (tile.isascii() and tile.isdigit()):
        raise UserError(f"--tile: found '{tile}'. Use {AUTO}, {WHOLE} or a number of pixels.")
    check_tiles(int(tile), config.evaluate.tile_overlap)
    return (int(tile),)


def _read(path: Path) -> Decoded:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except ImageRefused as reason:
        raise UserError(f"{path} {reason}. Give an image file of 8 bits per channel.") from None


def _restore(
    model: nn.Module,
    path: Path,
    device: torch.device,
    sides: tuple[int | None, ...],
    section: EvaluateSection,
    count_bytes: Callable[[int, int], int],
) -> evaluate.Image:
    """Restore one image with the first of the tile sides that fits into memory. Raises UserError if none does."""
    pixels = _read(path).pixels
    height, width = pixels.shape[:2]
    useful = [side for side in sides if side is None or len(sides) == 1 or side < max(height, width)]
    for side in _likely_to_fit(useful, (height, width), device, count_bytes):
        if side is not None and len(sides) > 1:
            progress.say(f"{path.name} ({width}x{height}) is restored in tiles of {side} pixels: memory is short")
        with contextlib.suppress(device_errors.OutOfMemory), device_errors.out_of_memory():
            return evaluate.restore(model, pixels, device, side, section.tile_overlap, section.precision)
        gc.collect()
        hardware.return_freed_memory()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    tile = max(64, min([side // 2 for side in sides if side] or [512]))
    smaller = f"smaller tiles (--tile {tile}), " if tile < min([side for side in sides if side] or [tile + 1]) else ""
    raise UserError(
        f"{path} ({width}x{height} pixels) does not fit into the memory of this machine. Use {smaller}or free memory."
    )


def _likely_to_fit(
    sides: list[int | None], size: tuple[int, int], device: torch.device, count_bytes: Callable[[int, int], int]
) -> Iterator[int | None]:
    """Yield the tile sides whose counted memory is free, and always the last one.

    An operating system that promises more memory than it has kills a process instead of refusing; so count first.
    """
    for side in sides:
        height, width = (min(length, side or length) for length in size)
        needed = count_bytes(height, width) * _RESERVE
        if needed > _free_bytes(device):
            hardware.return_freed_memory()
        if side == sides[-1] or needed <= _free_bytes(device):
            yield side


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free for torch itself
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    used = psutil.Process().memory_info().rss
    limits = memory_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    free: int = min([psutil.virtual_memory().available, *(limit - used for limit in limits)])
    return free
