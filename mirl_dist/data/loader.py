"""Shards to batches, at any position: whose turn it is says the order, where it lies the supply, and nobody waits.

A plain WebDataset reader stops at the first damaged header and says nothing; here samples are addressed by index inside
shards that were verified, so no reader can run dry, read twice, or wait for another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing import forkserver
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from mirl_dist.config.tasks import Task
from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import CLEAN, DEGRADED, SampleEntry, Shard
from mirl_dist.data.parallel import end_with_parent
from mirl_dist.data.prefetch import PrefetchWindow
from mirl_dist.data.sample import Batch, Member, NumpyBatch, Patch, SampleLocation, collate, make_patch
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, Position, Slot
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.errors import Stopped, UserError

_PREFETCH = 2  # batches that a loader process makes ahead


def passes_behind(workers: int) -> int:
    """Forward passes that may have been handed out and are still being read by loader processes."""
    return _PREFETCH * workers + 2


class _ReadRequest(NamedTuple):
    """A read, the slot that it is for, and whether it stands in for a damaged sample."""

    location: SampleLocation
    slot: Slot
    stands_in: bool


class _FailedRead(NamedTuple):
    """A read that came to nothing, and why. passing: the system was at fault, not the bytes."""

    request: _ReadRequest
    problem: str
    passing: bool


class _PatchDataset(Dataset[Any]):
    """_Asked -> (itself, Patch), or _Failed: a value, since exceptions lose their type between processes."""

    def __init__(self, tasks: Sequence[Task], seed: int, patch_pixels: int, augment: str) -> None:
        self._tasks, self._seed, self._patch, self._augment = tuple(tasks), seed, patch_pixels, augment

    def __getitem__(self, asked: _ReadRequest) -> tuple[_ReadRequest, Patch] | _FailedRead:
        task = self._tasks[asked.location.task]
        try:
            return asked, make_patch(asked.location, task, self._seed, self._patch, self._augment)
        except UserError as fault:
            return _FailedRead(asked, str(fault), passing=False)
        except OSError as error:
            return _FailedRead(
                asked, f"{asked.location.shard}, sample '{asked.location.key}' cannot be read: {error}", passing=True
            )


def _collate(
    items: list[tuple[_ReadRequest, Patch] | _FailedRead],
) -> NumpyBatch | list[tuple[_ReadRequest, Patch] | _FailedRead]:
    """A stack; items that met damage go back as they are, to be replaced by the process that knows all shards."""
    made = [item for item in items if not isinstance(item, _FailedRead)]
    if len(made) < len(items):
        return items
    return collate([patch for _, patch in made], sum(asked.stands_in for asked, _ in made))


class TrainLoader:
    """The training batches of one rank: `batches(round, start, epochs)` begins at any position without replay.

    Memory per rank: three tables of the order (39 bytes for each slot of an epoch), the indices of the shards in use
    (about 1 kB a sample), 16,384 slots that are looked ahead at (about 4 MB), and 2 batches for each loader process.
    Shards stay on the disk.
    """

    def __init__(
        self,
        supply: ShardPool,
        order: GlobalSampler,
        *,
        seed: int,
        patch_pixels: int,
        augment: str,
        workers: int,
        rank: int,
        shares: BatchSplit,
        ahead: int,
        pin: bool,
    ) -> None:
        """ahead: how many shards to bring before they are used (`window.shards_ahead`); pin: batches for a GPU."""
        self._train, self._pool, self._sampler = supply.shards.train, supply, order
        self._patches = _PatchDataset(order.tasks, seed, patch_pixels, augment)
        self._rank, self._split, self._workers, self._ahead, self._pin = rank, shares, workers, ahead, pin
        self.damaged: dict[str, str] = {}
        """What this rank met and skipped in the round: 'shard' or 'shard key' -> what was wrong with it."""

    def batches(self, round_: int, start: Position, epochs: int) -> Generator[Batch, None, None]:
        """One Batch per forward pass, from `start` to the round's end; closing it ends its workers.

        The images are uint8 until `Batch.to`. Raises UserError for damaged samples where they are refused.
        """
        self.damaged.clear()
        self._stopped: Stopped | None = None
        window = self._window = PrefetchWindow(
            self._sampler.passes(round_, start, epochs, self._rank, self._split),
            lambda shard: self._pool.acquire(self._train[shard]),
            lambda shard: self._pool.release(self._train[shard]),
            behind=passes_behind(self._workers),
            extra=self._ahead,
        )
        # A fork server keeps workers free of this process's threads (collectives, tracking).
        context = multiprocessing.get_context("forkserver") if self._workers else None
        if context is not None:
            context.set_forkserver_preload([__name__])  # imported once, not by every worker of every round
            with _signals_ignored():  # a stop signal goes to the whole group: the fork server must outlive it
                _start_fork_server()
        with closing(window):
            loader: DataLoader[Any] = DataLoader(
                self._patches,
                batch_sampler=self._requests(window),
                num_workers=self._workers,
                collate_fn=_collate,
                prefetch_factor=_PREFETCH if self._workers else None,
                multiprocessing_context=context,
                generator=torch.Generator().manual_seed(0),  # seeds workers; nothing here draws from it
                worker_init_fn=_worker_begins if self._workers else None,
            )
            for item in loader:
                stack = self._replace_failed(item) if isinstance(item, list) else item
                yield Batch.of(stack, self._pin)
        if self._stopped is not None:
            raise self._stopped

    def _requests(self, window: PrefetchWindow) -> Iterator[list[_ReadRequest]]:
        """Pass after pass. A stop while a shard is awaited ends them: batches that are ready are trained on first, and
        with them the ranks may yet commit together."""
        try:
            for slots in window:
                yield [self._request(slot) for slot in slots]
        except Stopped as stopped:
            self._stopped = stopped

    def _request(self, slot: Slot) -> _ReadRequest:
        """The read of a slot; of the next whole sample where its own is known to be damaged."""
        number = self._whole_sample(slot.shard, slot.sample)
        if number is not None:
            local = self._pool.get(self._train[slot.shard])
            return _ReadRequest(location_of(local, local.entries[number], slot), slot, stands_in=number != slot.sample)
        return self._request_elsewhere(slot)

    def _whole_sample(self, shard: int, sample: int) -> int | None:
        """The number of a sample, or of the next one in its shard that is not damaged; None where all are."""
        local, count = self._pool.get(self._train[shard]), self._train[shard].samples
        for step in range(count):
            number = (sample + step) % count
            if number not in local.bad:
                return number
            key = f" {local.entries[number].key}" if local.entries else ""
            self.damaged[local.shard.name + key] = local.bad[number]
        return None

    def _request_elsewhere(self, slot: Slot) -> _ReadRequest:
        """The read of a slot whose shard has no whole sample: from the next shard of the same sets that has one."""
        source = next(s for s in self._sampler.sources if slot.task in s.task_cycle and slot.shard in s.shards)
        at = source.shards.index(slot.shard)
        for other in (*source.shards[at + 1 :], *source.shards[:at]):
            shard = self._train[other]
            self._window.acquire_extra(other)
            number = self._whole_sample(other, slot.sample % shard.samples)
            if number is not None:
                local = self._pool.get(shard)
                return _ReadRequest(location_of(local, local.entries[number], slot), slot, stands_in=True)
        raise UserError(
            f"data.damage: no shard of {source.name} has a whole sample left. Build or copy the shards again."
        )

    def _replace_failed(self, items: list[tuple[_ReadRequest, Patch] | _FailedRead]) -> NumpyBatch:
        """A stack in which some reads met damage that no digest had told: noted, and replaced one by one.

        What the system was at fault for is tried once more, and is no damage: other ranks would not see it. Raises
        UserError when it stays.
        """
        patches, skipped = [], 0
        for item in items:
            tries = 0
            while isinstance(item, _FailedRead):
                if not item.passing:
                    self._note(item)
                elif tries:
                    raise UserError(f"{item.problem}. Check the disk, then start again.")
                else:
                    tries += 1
                    self._pool.refetch(self._shard_of(item))
                item = self._patches[self._request(item.request.slot)]
            asked, patch = item
            patches.append(patch)
            skipped += asked.stands_in
        return collate(patches, skipped)

    def _shard_of(self, failed: _FailedRead) -> Shard:
        return next(s for s in self._train if s.name == failed.request.location.shard)

    def _note(self, failed: _FailedRead) -> None:
        """Tell the supply which sample failed. Raises UserError where damage is refused."""
        read, shard = failed.request.location, self._shard_of(failed)
        with self._pool.holding([shard]):
            local = self._pool.get(shard)
            number = next(i for i, entry in enumerate(local.entries) if entry.key == read.key)
            self._pool.note(local, number, failed.problem)


def location_of(local: LocalShard, entry: SampleEntry, slot: Slot) -> SampleLocation:
    clean, degraded = entry.image(CLEAN), entry.image(DEGRADED)
    assert clean is not None, "manifest.read_index lets no sample through without a clean image"
    return SampleLocation(
        str(local.path),
        local.shard.name,
        entry.key,
        entry.height,
        entry.width,
        Member(clean[0], clean[1].offset, clean[1].size),
        None if degraded is None else Member(degraded[0], degraded[1].offset, degraded[1].size),
        slot.task,
        slot.round_,
        slot.pass_index,
    )


def _worker_begins(_: int) -> None:
    """In a group of its own: a launcher stops a rank's whole group, and the rank needs its batches up to the commit."""
    os.setpgrp()
    end_with_parent()


def _start_fork_server() -> None:
    try:
        forkserver.ensure_running()
    except OSError as error:  # its socket's path holds 107 bytes at most
        raise UserError(
            f"found {tempfile.gettempdir()} as the folder for temporary files, where loader processes cannot be "
            f"started ({error}). Set TMPDIR to a folder with a short path, or data.workers=0."
        ) from None


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Processes that are started inside ignore what asks a run to stop; this one's handlers come back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only there does a run train
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
