"""How long the exact selection takes beside a sort and beside the published percentile, on the same weights.

    python benchmarks/selection.py [--weights 33000000] [--runs 5]

Interleaved A/B/C in one process: counting (mirl_dist.pruning.quantile), torch.sort of all magnitudes, and
numpy.percentile as the released code of MIR-L calls it. Prints medians, their ratios, and the conditions.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from mirl_dist.pruning.prune import count_to_remove
from mirl_dist.pruning.quantile import kth_smallest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=int, default=33_000_000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    parts = {f"tensor{i}": torch.randn(args.weights // 400) * 0.02 for i in range(400)}
    k = count_to_remove(sum(p.numel() for p in parts.values()), 0.2)

    def sort() -> float:
        return float(torch.cat([p.abs() for p in parts.values()]).sort().values[k - 1])

    def percentile() -> float:
        return float(np.percentile(np.concatenate([np.abs(p.numpy()) for p in parts.values()]), 20))

    methods: dict[str, Callable[[], float]] = {
        "counting": lambda: kth_smallest(parts, k).value,
        "torch.sort": sort,
        "numpy.percentile": percentile,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    thresholds: dict[str, float] = {}
    for _ in range(args.runs):
        for name, select in methods.items():
            start = time.perf_counter()
            thresholds[name] = select()
            seconds[name].append(time.perf_counter() - start)
    assert thresholds["counting"] == thresholds["torch.sort"], "the exact selection and the sort disagree"
    base = statistics.median(seconds["counting"])
    print(f"{args.weights:,} float32 weights in 400 tensors, {args.runs} interleaved runs each")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores, {platform.machine()}"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:18} median {median:6.2f} s  (min {min(times):.2f}, max {max(times):.2f})  {median / base:5.2f} x")


if __name__ == "__main__":
    main()
