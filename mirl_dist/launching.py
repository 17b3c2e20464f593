"""`train --launch`: check everything in this process first, then start the ranks, and pass on how they ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mirl_dist import assemble, ranks
from mirl_dist.config import Config
from mirl_dist.faults import Fault
from mirl_dist.yaml_tree import load_file


def choose(config: Config, how: str) -> tuple[int, list[str]]:
    """How many ranks, and accelerate's options to start them. Raises Fault for a launch file that says neither.

    how: a launch file for accelerate, or 'auto': one rank per GPU (as many as divide the global batch), or two on
    the CPU where two divide it. One rank needs no launcher: it is the calling process.
    """
    return _auto(config) if how == "auto" else _from_file(Path(how))


def launch(config: Config, world: int, options: list[str], command: list[str], sets: Sequence[str]) -> None:
    """Start the ranks of a run and exit with their code. Raises Fault before any process is started."""
    assemble.prepare(config, world, command[-1])
    arguments = [*options, "-m", "mirl_dist", *command]
    for assignment in sets:
        arguments += ["--set", assignment]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    code = ranks.launch(arguments)
    if code:
        sys.exit(code)


def _auto(config: Config) -> tuple[int, list[str]]:
    gpus = 0 if config.train.device == "cpu" else ranks.gpus()
    share = config.batch.global_
    world = max(n for n in range(1, max(gpus, 1) + 1) if share % n == 0) if gpus else (2 if share % 2 == 0 else 1)
    options = ["--num_processes", str(world), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return world, ["--multi_gpu", *options]


def _from_file(path: Path) -> tuple[int, list[str]]:
    tree = load_file(path)
    world = tree.get("num_processes")
    if not isinstance(world, int) or world < 1:
        raise Fault(f"{path}: found num_processes {world!r}; give the number of ranks, 1 or more.")
    return world, ["--config_file", str(path)]
