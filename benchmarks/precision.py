"""Whether training in bf16, or with compiled blocks, follows the loss of training in float32.

    python benchmarks/precision.py [--steps 2000] [--samples 4] [--seeds 2] [--variants SET ...] [--out curves.json]

Trains the demo's network, 0.35 million weights, on the demo's photographs with `mirl-dist train`: float32 with
several seeds, and each variant with the first seed. Compares mean losses of consecutive windows. The noise is the root
mean square of the relative difference between two seeds in float32, over all windows but the first tenth; a variant
must differ from float32 with its own seed by no more. Exits with code 1 if it does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=4, help="patches per step")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="*", default=["train.precision=bf16"], help="a --set, or several with ','")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        mirl("shards", "build", str(ROOT / "shards/demo.yaml"), "--out", str(work / "shards"))
        curves = {f"fp32 seed {seed}": train(work, args, seed, []) for seed in range(args.seeds)}
        curves |= {variant: train(work, args, 0, variant.split(",")) for variant in args.variants}
    noise = max(distance(curves["fp32 seed 0"], curves[f"fp32 seed {seed}"]) for seed in range(1, args.seeds))
    distances = {variant: distance(curves["fp32 seed 0"], curves[variant]) for variant in args.variants}
    print(f"{args.steps} steps of {args.samples} patches of 32 pixels, {WINDOWS} windows; torch {torch.__version__}")
    print(
        f"CPU: {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    )
    for name, curve in curves.items():
        tail = statistics.fmean(curve["loss"][-2:])
        print(f"{name:32} last tenth {tail:.5f}, {curve['seconds'] / args.steps * 1000:.0f} ms per step with start")
    print(f"noise: {noise:.3%} between seeds")
    for variant, value in distances.items():
        print(f"{variant:32} {value:.3%} from float32: {'within' if value <= noise else 'OUTSIDE'} the noise")
    if args.out is not None:
        args.out.write_text(json.dumps({"noise": noise, "distances": distances, "curves": curves}, indent=1) + "\n")
    sys.exit(any(value > noise for value in distances.values()))


def mirl(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "mirl_dist", *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def train(work: Path, args: argparse.Namespace, seed: int, sets: Sequence[str]) -> dict[str, Any]:
    """Train one dense round; return the mean loss of each window, and the seconds that the command took."""
    steps, database, began = args.steps, work / f"{len(list(work.iterdir()))}.db", time.monotonic()
    values = {
        "run.folder": database.with_suffix(".run"),
        "run.seed": seed,
        "data.shards": work / "shards",
        "data.patch_pixels": 32,
        "data.steps_per_epoch": steps // WINDOWS,
        "batch.global": args.samples,
        "train.epochs": WINDOWS,
        "prune.rounds": 0,
        "evaluate.sets": "[photos]",
        "tracking.uri": f"sqlite:///{database}",
        "tracking.every_steps": 10,
    }
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    mirl("train", str(ROOT / "configs/demo.yaml"), *words, *(word for one in sets for word in ("--set", one)))
    seconds = time.monotonic() - began
    with contextlib.closing(sqlite3.connect(database)) as opened:
        rows = opened.execute("SELECT step, value FROM metrics WHERE key = 'loss/mean' ORDER BY step").fetchall()
    per_window: list[list[float]] = [[] for _ in range(WINDOWS)]
    for step, value in rows:
        per_window[min((step - 1) * WINDOWS // steps, WINDOWS - 1)].append(value)
    return {"loss": [statistics.fmean(window) for window in per_window], "seconds": seconds}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the root mean square of relative differences between windows, without the first tenth."""
    pairs = list(zip(one["loss"], other["loss"], strict=True))[WINDOWS // 10 :]
    return math.sqrt(statistics.fmean((2 * (a - b) / (a + b)) ** 2 for a, b in pairs))


if __name__ == "__main__":
    main()
