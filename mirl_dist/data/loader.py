"""Builds batches from shards at any position: the sampler picks samples, the shard pool locates them.

A plain WebDataset reader silently stops at the first damaged tar header. Here, samples are addressed by index in
verified shards, so no reader can run out of samples, read one twice, or wait for another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from mirl_dist.data.mixture import Source
from mirl_dist.data.parallel import end_with_parent, next_item
from mirl_dist.data.prefetch import PrefetchWindow
from mirl_dist.data.sample import Batch, NumpyBatch, Patch, PatchReader, SampleLocation, collate
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, Position, Slot
from mirl_dist.data.shard_fetcher import LocalShard
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.errors import Stopped, UserError

_PREFETCH = 2  # batches that each loader process prepares in advance


class _ReadRequest(NamedTuple):
    """A sample to read, and the slot that it fills. shard, sample: not the slot's if they replace a damaged sample."""

    location: SampleLocation
    slot: Slot
    shard: int
    sample: int

    @property
    def is_replacement(self) -> bool:
        return (self.shard, self.sample) != (self.slot.shard, self.slot.sample)


class _FailedRead(NamedTuple):
    """A failed read and its problem. transient: a system error, not damaged data."""

    request: _ReadRequest
    problem: str
    transient: bool


_ReadResult = tuple[_ReadRequest, Patch] | _FailedRead


def passes_behind(workers: int) -> int:
    """Return how many forward passes may have been requested but not yet read by loader processes."""
    return _PREFETCH * workers + 2


class _PatchDataset(Dataset[Any]):
    """Reads the patch of a request. Failures are returned, because exceptions lose their type between processes."""

    def __init__(self, patches: PatchReader) -> None:
        self._patches = patches

    def __getitem__(self, request: _ReadRequest) -> _ReadResult:
        location = request.location
        try:
            return request, self._patches.read(location)
        except UserError as fault:
            return _FailedRead(request, str(fault), transient=False)
        except OSError as error:
            problem = f"{location.shard}, sample '{location.key}' cannot be read: {error}"
            return _FailedRead(request, problem, transient=True)


def _collate(results: list[_ReadResult]) -> NumpyBatch | list[_ReadResult]:
    """Collate patches into a batch; if any read failed, return all results unchanged for `_replace_failed`."""
    reads = [result for result in results if not isinstance(result, _FailedRead)]
    if len(reads) < len(results):
        return results
    return collate([patch for _, patch in reads], sum(request.is_replacement for request, _ in reads))


class _RequestStream:
    """Iterates over the forward passes of a prefetch window, as lists of read requests.

    If a stop is requested while waiting for a shard, the stream ends and keeps the exception in `stopped`. Batches that
    are ready are still trained on, so that all ranks may reach the step at which they commit.
    """

    def __init__(
        self, pool: ShardPool, window: PrefetchWindow, sampler: GlobalSampler, damaged: dict[str, str]
    ) -> None:
        """damaged: filled with 'shard' or 'shard key' -> problem, for everything that is skipped."""
        self._pool, self._window, self._sources, self._damaged = pool, window, sampler.sources, damaged
        self.stopped: Stopped | None = None

    def __iter__(self) -> Iterator[list[_ReadRequest]]:
        try:
            for slots in self._window:
                yield [self.request(slot) for slot in slots]
        except Stopped as stopped:
            self.stopped = stopped

    def request(self, slot: Slot) -> _ReadRequest:
        """Return the read of a slot's sample, or of the next intact one if that sample is known to be damaged."""
        for shard in self._candidates(slot):
            local = self._pool.get(self._pool.shards.train[shard])
            sample = local.find_intact(slot.sample % local.shard.samples, self._damaged)
            if sample is not None:
                return _ReadRequest(local.locate(sample, slot), slot, shard, sample)
        name = self._source_of(slot).name
        raise UserError(
            f"data.damage: no shard of {name} has an undamaged sample left. Build or copy the shards again."
        )

    def _candidates(self, slot: Slot) -> Iterator[int]:
        """Yield the slot's shard, and then, acquired for this pass, the following shards of its source."""
        yield slot.shard
        shards = self._source_of(slot).shards
        at = shards.index(slot.shard)
        for other in (*shards[at + 1 :], *shards[:at]):
            self._window.acquire_extra(other)
            yield other

    def _source_of(self, slot: Slot) -> Source:
        return next(s for s in self._sources if slot.task in s.task_cycle and slot.shard in s.shards)


class TrainLoader:
    """The training batches of one rank; `batches` starts at any position without replay.

    Memory per rank: three epoch tables (39 bytes per slot of an epoch), the indices of the shards in use (about 1 kB
    per sample), 16,384 slots of the prefetch window (about 4 MB), and 2 batches per loader process. Shards remain on
    disk.
    """

    def __init__(
        self,
        pool: ShardPool,
        sampler: GlobalSampler,
        patches: PatchReader,
        *,
        workers: int,
        rank: int,
        split: BatchSplit,
        ahead: int,
        pin: bool,
    ) -> None:
        """ahead: shards to fetch before their first use (`prefetch.shards_ahead`). pin: use page-locked memory."""
        self._pool, self._sampler = pool, sampler
        self._patches = _PatchDataset(patches)
        self._rank, self._split, self._workers, self._ahead, self._pin = rank, split, workers, ahead, pin
        self.damaged: dict[str, str] = {}
        """Damage that this rank skipped in the round: 'shard' or 'shard key' -> problem."""

    def batches(self, round_: int, start: Position, epochs: int) -> Generator[Batch, None, None]:
        """Yield a Batch per forward pass, from `start` to the end of the round; closing the generator ends its workers.

        Images are uint8 until `Batch.to`. Raises UserError for damaged samples if damage is refused, and Stopped, after
        the batches that are ready, if a stop was requested while waiting for a shard.
        """
        self.damaged.clear()
        context = _worker_context() if self._workers else None
        with closing(self._prefetch_window(round_, start, epochs)) as window:
            requests = _RequestStream(self._pool, window, self._sampler, self.damaged)
            loader: DataLoader[Any] = DataLoader(
                self._patches,
                batch_sampler=requests,
                num_workers=self._workers,
                collate_fn=_collate,
                prefetch_factor=_PREFETCH if self._workers else None,
                multiprocessing_context=context,
                generator=torch.Generator().manual_seed(0),  # seeds the workers, which never draw from it
                worker_init_fn=_initialize_worker if self._workers else None,
            )
            items = iter(loader)
            while (item := next_item(items)) is not None:
                batch = self._replace_failed(requests, item) if isinstance(item, list) else item
                yield Batch.of(batch, self._pin)
        if requests.stopped is not None:
            raise requests.stopped

    def _prefetch_window(self, round_: int, start: Position, epochs: int) -> PrefetchWindow:
        train = self._pool.shards.train
        return PrefetchWindow(
            self._sampler.passes(round_, start, epochs, self._rank, self._split),
            lambda shard: self._pool.acquire(train[shard]),
            lambda shard: self._pool.release(train[shard]),
            behind=passes_behind(self._workers),
            extra=self._ahead,
        )

    def _replace_failed(self, requests: _RequestStream, results: list[_ReadResult]) -> NumpyBatch:
        """Collate a batch with failed reads, replacing samples whose damage no digest had shown by intact ones.

        A transient failure (of the system) is retried once after fetching the shard again. It is not recorded as
        damage, which other ranks would not see. Raises UserError if it persists.
        """
        patches, skipped = [], 0
        for result in results:
            tries = 0
            while isinstance(result, _FailedRead):
                shard = self._pool.shards.train[result.request.shard]
                if not result.transient:
                    self._pool.mark_damaged(shard, result.request.sample, result.problem)
                elif tries:
                    raise UserError(f"{result.problem}. Check the disk, then start again.")
                else:
                    tries += 1
                    self._pool.refetch(shard)
                result = self._patches[requests.request(result.request.slot)]
            request, patch = result
            patches.append(patch)
            skipped += request.is_replacement
        return collate(patches, skipped)


def _worker_context() -> BaseContext:
    """Start the fork server; its workers do not inherit this process's threads (collectives, tracking)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # import once, not in every worker of every round
    # A stop signal reaches the whole process group; the fork server must survive it, and inherits that it is ignored.
    # Only the main thread may set handlers; runs always train there.
    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if in_main else ()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        forkserver.ensure_running()
    except OSError as error:  # for example: the path of a Unix socket is limited to 107 bytes
        raise UserError(
            f"found {tempfile.gettempdir()} as the folder for temporary files, where loader processes cannot be "
            f"started ({error}). Set TMPDIR to a folder with a short path, or data.workers=0."
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return context


def _initialize_worker(_: int) -> None:
    """Move a worker into its own process group.

    A launcher stops a rank's whole group, but the rank needs batches until its commit.
    """
    os.setpgrp()
    end_with_parent()


def calibration_batches(
    slots: Sequence[Slot], pool: ShardPool, patches: PatchReader, stop_asked: Callable[[], bool]
) -> Iterator[NumpyBatch]:
    """Yield a batch of one patch for each slot, in order: the patches of training, for criteria that need gradients.

    All patches are read before the first batch is yielded, so that each shard is fetched only once and one at a time.
    A damaged sample is replaced by the next intact one of its shard. Raises UserError if a shard has no intact sample
    or cannot be read, and Stopped if `stop_asked` returns True.
    """
    patch_of: dict[int, Patch] = {}
    by_shard = sorted(range(len(slots)), key=lambda number: slots[number].shard)
    for shard_number, numbers in groupby(by_shard, key=lambda number: slots[number].shard):
        shard = pool.shards.train[shard_number]
        with pool.holding(shard) as local:
            for number in numbers:
                if stop_asked():
                    raise Stopped("stopped on request while reading samples to select by")
                patch_of[number] = _read_calibration_patch(local, slots[number], patches)
    for number in range(len(slots)):
        yield collate([patch_of[number]])


def _read_calibration_patch(local: LocalShard, slot: Slot, patches: PatchReader) -> Patch:
    name, sample = local.shard.name, local.find_intact(slot.sample, {})
    if sample is None:
        raise UserError(f"{name} has no undamaged sample left to select with. Build or copy the shards again.")
    try:
        return patches.read(local.locate(sample, slot))
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error}. Check the disk, then start again.") from None
