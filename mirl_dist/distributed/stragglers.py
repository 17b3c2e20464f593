"""Detects stragglers: ranks that reach the all-reduce much later than the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_REPORT_AFTER = 3
_REPORT_AGAIN_AFTER = 100
_LEAST_SECONDS = 0.005


class StragglerDetector:
    """Timer for the part of a pass before its first collective, and comparison of these times between ranks.

    Only durations are compared, because clocks of different machines differ. Time waiting for other ranks is excluded.
    A GPU's work is timed by the GPU: the host is done as soon as it has queued it.
    """

    def __init__(
        self, hosts: Sequence[str] = (), clock: Callable[[], float] = time.monotonic, *, on_gpu: bool = False
    ) -> None:
        """hosts: one per rank, for messages."""
        self._hosts, self._clock, self._on_gpu = hosts, clock, on_gpu
        self._slow: dict[int, int] = {}
        self._began_at: float = 0.0
        self._batch_ready_at: Any = 0.0
        self._reset()

    def _reset(self) -> None:
        self._batch_seconds = 0.0
        self._passes: list[tuple[Any, Any]] = []  # when the batch was ready and the collective reached

    def _now(self) -> Any:
        """Return the host's time, or an event that gets the GPU's time once the work queued so far is done."""
        if not self._on_gpu:
            return self._clock()
        cuda: Any = torch.cuda
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Record the start of a pass."""
        self._began_at = self._clock()

    def batch_ready(self) -> None:
        """Record that the pass has received its batch."""
        self._batch_seconds += self._clock() - self._began_at
        self._batch_ready_at = self._now()

    def reached_collective(self) -> None:
        """Record the first collective since `begin`. Call this before the collective blocks."""
        self._passes.append((self._batch_ready_at, self._now()))

    def mean_seconds(self) -> tuple[float, float]:
        """Return the mean seconds per pass since the last call: (waiting for the batch, everything else).

        A GPU must have finished these passes.
        """
        spans = self._passes
        seconds = [begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin for begin, end in spans]
        means = self._batch_seconds / max(len(spans), 1), sum(seconds) / max(len(spans), 1)
        self._reset()
        return means

    def find_slow(self, seconds_per_rank: Sequence[tuple[float, float]], factor: float) -> list[str]:
        """Return one line per rank that was slower than `factor` x the median of the others in three calls in a row.

        seconds_per_rank: `mean_seconds` of every rank. A rank is reported again after it recovered in between, or after
        100 more slow calls.
        """
        totals = [sum(seconds) for seconds in seconds_per_rank]
        lines = []
        for rank, total in enumerate(totals):
            others = statistics.median(totals[:rank] + totals[rank + 1 :]) if len(totals) > 1 else total
            slow = total > factor * others and total - others >= _LEAST_SECONDS
            self._slow[rank] = self._slow.get(rank, 0) + 1 if slow else 0
            if slow and self._slow[rank] % _REPORT_AGAIN_AFTER == _REPORT_AFTER:
                lines.append(self._line(rank, total, others, seconds_per_rank[rank][0] / total))
        return lines

    def _line(self, rank: int, total: float, others: float, batches: float) -> str:
        who = f"rank {rank}" + (f" ({self._hosts[rank]})" if self._hosts else "")
        look = "disk, network and data.workers" if batches >= 0.5 else "GPU and processors"
        return (
            f"{who} reaches the all-reduce {total / max(others, 0.001):.1f} times later than the others "
            f"({total:.3g} s against {others:.3g} s a pass; {batches:.0%} of it waiting for batches): look at that "
            f"node's {look}"
        )
