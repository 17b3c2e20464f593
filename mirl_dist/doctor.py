"""What this machine offers a run, and what a config means on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from mirl_dist import assemble, ranks
from mirl_dist.config import Config
from mirl_dist.faults import Fault
from mirl_dist.report import say

_NEEDED = ("torch", "accelerate", "webdataset", "mlflow", "safetensors", "pydantic", "scikit-image")


def print_machine() -> int:
    """Versions, processors, GPUs, room on the disk, environment; returns how many things are missing."""
    missing = 0
    say(f"{'python':16} {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _NEEDED:
        try:
            say(f"{package:16} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing += 1
            say(f"{package:16} MISSING: pip install {package}")
    say(f"{'cores':16} {os.cpu_count()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(ranks.gpus())]
    say(f"{'GPUs':16} {', '.join(gpus) if gpus else 'none: ranks train on the CPU'}")
    backends = [name for name, there in ranks.backends().items() if there]
    say(f"{'rank backends':16} {', '.join(backends) or 'MISSING: this torch cannot connect processes'}")
    missing += not backends
    say(f"{'free disk here':16} {shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB")
    for name, use in (("MIRL_DATA", "real images for recipes and tests"), ("MLFLOW_TRACKING_URI", "where runs show")):
        # The value may hold a password: only whether it is set is told.
        say(f"{name:16} {'set' if os.environ.get(name) else 'not set'} ({use})")
    return missing


def print_plan(config: Config) -> None:
    """What a config means on 1, 2, 4, ... ranks: share, passes, steps, samples, learning rate."""
    for world in (2**i for i in range(7)):
        try:
            said = assemble.describe(config, assemble.prepare(config, world, "auto"), world)
        except Fault as fault:
            if not str(fault).startswith("batch."):
                raise
            said = f"{world} ranks: {fault}"
        say(said)
