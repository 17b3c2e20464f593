"""Which ranks all others wait for: names those that reach the all-reduce much later than the rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

_TOLD_AFTER = 3
_TOLD_AGAIN_AFTER = 100
_LEAST_SECONDS = 0.005


class StragglerDetector:
    """How long a rank takes from a pass's beginning to its first meeting; which ranks all others wait for.

    Only durations are compared, for clocks of two machines differ; waiting for other ranks is not counted.
    """

    def __init__(self, hosts: Sequence[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        """hosts: of all ranks, for messages."""
        self._hosts, self._clock = hosts, clock
        self._slow: dict[int, int] = {}
        self._began = self._came = 0.0
        self._reset()

    def _reset(self) -> None:
        self._passes, self._batches, self._rest = 0, 0.0, 0.0

    def begin(self) -> None:
        self._began = self._came = self._clock()

    def batch_ready(self) -> None:
        self._came = self._clock()

    def reached_collective(self) -> None:
        """At the first meeting since `begin`, before it waits."""
        self._passes += 1
        self._batches += self._came - self._began
        self._rest += self._clock() - self._came

    def mean_seconds(self) -> tuple[float, float]:
        """The mean seconds of a pass since the last call: waiting for its batch, and the rest."""
        passes = max(self._passes, 1)
        means = self._batches / passes, self._rest / passes
        self._reset()
        return means

    def find_slow(self, seconds_per_rank: Sequence[tuple[float, float]], factor: float) -> list[str]:
        """Lines that name ranks slower than the median of the others by `factor`, three reports in a row.

        seconds_per_rank: what `take` gave on every rank. A rank is named again when it has recovered in between, or
        after 100 reports.
        """
        totals = [sum(seconds) for seconds in seconds_per_rank]
        lines = []
        for rank, total in enumerate(totals):
            others = statistics.median(totals[:rank] + totals[rank + 1 :]) if len(totals) > 1 else total
            slow = total > factor * others and total - others >= _LEAST_SECONDS
            self._slow[rank] = self._slow.get(rank, 0) + 1 if slow else 0
            if slow and self._slow[rank] % _TOLD_AGAIN_AFTER == _TOLD_AFTER:
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
