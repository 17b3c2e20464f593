"""Shards to batches, at any position: members are addressed by index, never by walking a tar.

A plain WebDataset reader stops at the first damaged header and says nothing; here every read checks the SHA-256
that the build wrote, sizes are held against the manifest before the first step, and the order alone says who reads
what, so no reader can run dry, read twice or wait for another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from mirl_dist.data.degrade import generator
from mirl_dist.data.manifest import (
    CLEAN,
    DEGRADED,
    MANIFEST,
    Entry,
    Manifest,
    Shard,
    read_index,
    read_manifest,
)
from mirl_dist.data.order import Order, Position, Shares, Slot
from mirl_dist.data.sample import Batch, Patch, Pixels, collate, decode, make_patch
from mirl_dist.data.workers import end_with_parent
from mirl_dist.faults import Fault


class Place(NamedTuple):
    """Where one sample lies: its shard and its entry in that shard's index."""

    shard: Shard
    entry: Entry


class Shards:
    """A folder of built shards, opened: manifest and indices read, sizes checked, bytes read on demand.

    Raises Fault for a missing folder or manifest, an index that does not fit, and a shard that is missing or has
    another size than the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            there = "holds no manifest.json" if folder.is_dir() else "does not exist"
            raise Fault(
                f"data.shards: {folder} {there}. Build shards with `mirl-dist shards build RECIPE --out {folder}`."
            )
        self.manifest: Manifest = read_manifest(path.read_bytes(), str(path))
        for shard in self.manifest.shards:
            tar = folder / shard.name
            found = tar.stat().st_size if tar.is_file() else None
            if found != shard.bytes:
                state = "is missing" if found is None else f"has {found} bytes"
                raise Fault(
                    f"{tar} {state}; the manifest says {shard.bytes} bytes. Copy it again or build the shards again."
                )

    def refuse_larger_patches(self, patch_pixels: int) -> None:
        """Raise Fault for patches that do not fit into the tiles."""
        if self.manifest.tile_pixels < patch_pixels:
            raise Fault(
                f"data.patch_pixels: found {patch_pixels}, but the tiles in {self.folder} are "
                f"{self.manifest.tile_pixels} pixels. Lower it, or build shards with larger tile_pixels.",
                everywhere=True,
            )

    def places(self, role: str) -> dict[str, list[Place]]:
        """The samples of one role by kind (role 'train') or by set (role 'evaluate'), in shard order."""
        found: dict[str, list[Place]] = {}
        for shard in self.manifest.role(role):
            path = self.folder / shard.index_name
            if not path.is_file():
                raise Fault(f"{path} is missing beside {shard.name}. Build the shards again.")
            index = read_index(path.read_bytes(), shard, str(path))
            group = shard.kind if role == "train" else shard.set
            found.setdefault(group, []).extend(Place(shard, entry) for entry in index.entries)
        return found

    def image(self, place: Place, part: str) -> Pixels:
        """One decoded member, uint8 (H, W, 3). Raises Fault, with shard and key, for bytes that were not built so."""
        at, path = place.entry.parts[part], self.folder / place.shard.name
        where = f"{path}, sample '{place.entry.key}', {part}"
        try:
            with path.open("rb") as tar:
                tar.seek(at.offset)
                data = tar.read(at.size)
        except OSError as error:
            raise Fault(f"{where} cannot be read ({error}). Check the disk, or copy the shard again.") from None
        if sha256(data).hexdigest() != at.sha256:
            raise Fault(f"{where}: the bytes are not those that were built (SHA-256 differs). Copy the shard again.")
        return decode(data, where)


class _Patches(Dataset[Any]):
    """Slot -> Patch, or the Fault that reading it met (a value, since exceptions lose their type between processes)."""

    def __init__(self, shards: Shards, order: Order, seed: int, patch_pixels: int, augment: str) -> None:
        self._shards, self._tasks = shards, order.tasks
        self._seed, self._patch, self._augment = seed, patch_pixels, augment
        self._places = shards.places("train")

    def __getitem__(self, slot: Slot) -> Patch | Fault:
        task = self._tasks[slot.task]
        place = self._places[task.kind][slot.sample]
        rng = generator("patch", self._seed, slot.round_, slot.epoch, place.entry.key, task.name, slot.copy)
        try:
            clean = self._shards.image(place, CLEAN)
            degraded = self._shards.image(place, DEGRADED) if DEGRADED in place.entry.parts else None
        except Fault as fault:
            return fault
        made = make_patch(clean, degraded, task, self._patch, self._augment, rng)
        return Patch(*made, task=slot.task, key=f"{task.name}:{place.entry.key}")


def _worker_begins(_: int) -> None:
    """In a group of its own: a launcher stops a rank's whole group, and the rank needs its batches up to the commit."""
    os.setpgrp()
    end_with_parent()


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Processes that are started inside ignore SIGTERM and SIGINT; this process's handlers come back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only there does a run train
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _collate(items: list[Patch | Fault]) -> Batch | Fault:
    for item in items:
        if isinstance(item, Fault):
            return item
    return collate([item for item in items if isinstance(item, Patch)])


class Stream:
    """The training batches of one rank: `batches(round, start, epochs)` begins at any position without replay."""

    def __init__(
        self,
        shards: Shards,
        order: Order,
        *,
        seed: int,
        patch_pixels: int,
        augment: str,
        workers: int,
        rank: int,
        shares: Shares,
        pin: bool,
    ) -> None:
        shards.refuse_larger_patches(patch_pixels)
        self._patches = _Patches(shards, order, seed, patch_pixels, augment)
        self._order, self._rank, self._shares = order, rank, shares
        self._workers, self._pin = workers, pin

    def batches(self, round_: int, start: Position, epochs: int) -> Generator[Batch, None, None]:
        """One Batch per forward pass, from `start` to the round's end; closing it ends its workers.

        Raises Fault for damaged samples.
        """
        passes = self._order.passes(round_, start, epochs, self._rank, self._shares)
        # A fork server keeps workers free of this process's threads (collectives, tracking).
        context = multiprocessing.get_context("forkserver") if self._workers else None
        if context is not None:
            context.set_forkserver_preload([__name__])  # imported once, not by every worker of every round
            with _signals_ignored():  # a stop signal goes to the whole group: the fork server must outlive it
                forkserver.ensure_running()
        loader: DataLoader[Any] = DataLoader(
            self._patches,
            batch_sampler=passes,
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self._pin,
            multiprocessing_context=context,
            generator=torch.Generator().manual_seed(0),  # seeds workers; nothing here draws from it
            worker_init_fn=_worker_begins if self._workers else None,
        )
        for item in loader:
            if isinstance(item, Fault):
                raise item
            yield item if isinstance(item, Batch) else Batch(*item)
