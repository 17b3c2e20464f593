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
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mirl_dist.config.tasks import Task
from mirl_dist.data.parallel import end_with_parent
from mirl_dist.data.prefetch import PrefetchWindow
from mirl_dist.data.read_requests import FailedRead, ReadRequest, RequestStream
from mirl_dist.data.sample import Batch, NumpyBatch, Patch, collate, make_patch
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, Position
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.errors import UserError

_PREFETCH = 2  # batches that each loader process prepares in advance
_ReadResult = tuple[ReadRequest, Patch] | FailedRead


def passes_behind(workers: int) -> int:
    """Return how many forward passes may have been requested but not yet read by loader processes."""
    return _PREFETCH * workers + 2


class _PatchDataset(Dataset[Any]):
    """Reads the patch of a request. Failures are returned, because exceptions lose their type between processes."""

    def __init__(self, tasks: Sequence[Task], seed: int, patch_pixels: int, augment: str) -> None:
        self._tasks, self._seed, self._patch_pixels, self._augment = tuple(tasks), seed, patch_pixels, augment

    def __getitem__(self, request: ReadRequest) -> _ReadResult:
        location = request.location
        task = self._tasks[location.task]
        try:
            return request, make_patch(location, task, self._seed, self._patch_pixels, self._augment)
        except UserError as fault:
            return FailedRead(request, str(fault), transient=False)
        except OSError as error:
            problem = f"{location.shard}, sample '{location.key}' cannot be read: {error}"
            return FailedRead(request, problem, transient=True)


def _collate(results: list[_ReadResult]) -> NumpyBatch | list[_ReadResult]:
    """Collate patches into a batch; if any read failed, return all results unchanged for `_replace_failed`."""
    reads = [result for result in results if not isinstance(result, FailedRead)]
    if len(reads) < len(results):
        return results
    return collate([patch for _, patch in reads], sum(request.is_replacement for request, _ in reads))


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
        *,
        seed: int,
        patch_pixels: int,
        augment: str,
        workers: int,
        rank: int,
        split: BatchSplit,
        ahead: int,
        pin: bool,
    ) -> None:
        """ahead: shards to fetch before their first use (`prefetch.shards_ahead`). pin: use page-locked memory."""
        self._pool, self._sampler = pool, sampler
        self._patches = _PatchDataset(sampler.tasks, seed, patch_pixels, augment)
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
            requests = RequestStream(self._pool, window, self._sampler.sources, self.damaged)
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
            for item in loader:
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

    def _replace_failed(self, requests: RequestStream, results: list[_ReadResult]) -> NumpyBatch:
        """Collate a batch with failed reads, replacing samples whose damage no digest had shown by intact ones.

        A transient failure (of the system) is retried once after fetching the shard again. It is not recorded as
        damage, which other ranks would not see. Raises UserError if it persists.
        """
        patches, skipped = [], 0
        for result in results:
            tries = 0
            while isinstance(result, FailedRead):
                if not result.transient:
                    requests.mark_damaged(result)
                elif tries:
                    raise UserError(f"{result.problem}. Check the disk, then start again.")
                else:
                    tries += 1
                    requests.refetch(result)
                result = self._patches[requests.request(result.request.slot)]
            request, patch = result
            patches.append(patch)
            skipped += request.is_replacement
        return collate(patches, skipped)


def _worker_context() -> BaseContext:
    """Start the fork server; its workers do not inherit this process's threads (collectives, tracking)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # import once, not in every worker of every round
    with _signals_ignored():  # a stop signal reaches the whole process group; the fork server must survive it
        _start_fork_server()
    return context


def _initialize_worker(_: int) -> None:
    """Move a worker into its own process group.

    A launcher stops a rank's whole group, but the rank needs batches until its commit.
    """
    os.setpgrp()
    end_with_parent()


def _start_fork_server() -> None:
    try:
        forkserver.ensure_running()
    except OSError as error:  # for example: the path of a Unix socket is limited to 107 bytes
        raise UserError(
            f"found {tempfile.gettempdir()} as the folder for temporary files, where loader processes cannot be "
            f"started ({error}). Set TMPDIR to a folder with a short path, or data.workers=0."
        ) from None


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore stop signals, so that processes started inside inherit that; restore the handlers afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; runs always train there
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
