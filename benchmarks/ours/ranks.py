"""One training step of several ranks of this machine, each in a process of its own, on a global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare(*, ranks: int, batch: int = 8, **options: Any) -> Callable[[], None]:
    """Start the ranks, of one thread each, and return a function that makes one step of all.

    batch: samples of all ranks, which divide them. options: as for `benchmarks.ours.step`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = json.dumps(options | {"batch": batch // ranks, "threads": 1})
    command = [sys.executable, "-m", "benchmarks.side", "benchmarks.ours.step", arguments]
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=os.environ | launch | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(ranks)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in map(str, range(ranks))
    ]

    def train_step() -> None:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("run\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit(f"a rank ended with code {process.wait()}")

    return train_step
