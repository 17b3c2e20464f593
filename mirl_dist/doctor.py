"""What this machine offers a run, and what a config means on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from mirl_dist import preparing, ranks
from mirl_dist.config import Config
from mirl_dist.data.cache import usual_folder
from mirl_dist.data.crew import processes
from mirl_dist.data.order import share_batch
from mirl_dist.faults import Fault
from mirl_dist.report import say

_NEEDED = (
    "torch",
    "accelerate",
    "webdataset",
    "boto3",
    "mlflow",
    "safetensors",
    "numpy",
    "pillow",
    "scikit-image",
    "matplotlib",
    "pydantic",
    "pyyaml",
    "rich",
    "typer",
)
_OTHER_CREDENTIALS = (
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def print_machine() -> int:
    """Versions, processors, GPUs, room on the disks, environment; returns how many things are missing."""
    missing = 0
    say(f"{'python':16} {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _NEEDED:
        try:
            say(f"{package:16} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing += 1
            say(f"{package:16} MISSING: pip install {package}")
    say(f"{'cores':16} {os.cpu_count()}, {processes()} for this process")
    gpus = [torch.cuda.get_device_name(i) for i in range(ranks.gpus())]
    say(f"{'GPUs':16} {', '.join(gpus) if gpus else 'none: ranks train on the CPU'}")
    backends = [name for name, there in ranks.backends().items() if there]
    say(f"{'rank backends':16} {', '.join(backends) or 'MISSING: this torch cannot connect processes'}")
    missing += not backends
    say(f"{'free disk here':16} {_room(Path.cwd())}")
    folder = usual_folder()
    say(f"{'shard cache':16} {folder}, {_room(folder)} free (for shards from s3:// and the web)")
    say(f"{'S3 credentials':16} {'set' if _has_s3_credentials() else 'not set'} (for shards in s3://)")
    for name, use in (("MIRL_DATA", "real images for recipes and tests"), ("MLFLOW_TRACKING_URI", "where runs show")):
        # The value may hold a password: only whether it is set is told.
        say(f"{name:16} {'set' if os.environ.get(name) else 'not set'} ({use})")
    return missing


def _room(folder: Path) -> str:
    """Free bytes on the disk where a folder lies or would lie."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return f"{shutil.disk_usage(there).free / 1e9:.1f} GB"


def _has_s3_credentials() -> bool:
    """Whether this environment or home has any. No server is asked: a machine's own role is not seen."""
    env = os.environ
    keys = env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY")
    file = Path(env.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    return bool(keys or any(env.get(name) for name in _OTHER_CREDENTIALS) or file.is_file())


def print_plan(config: Config) -> None:
    """What a config means on 1, 2, 4, ... ranks: share, passes, steps, samples, learning rate."""
    folder = config.data.cache.folder
    if folder is not None:
        say(f"{'data.cache':16} {folder}, {_room(Path(folder).expanduser())} free")
    prepared = preparing.prepare(config, 1, "auto")
    for world in (2**i for i in range(7)):
        try:
            shares = share_batch(config.batch.global_, config.batch.forward, world)
        except Fault as fault:
            say(f"{world} ranks: {fault}")
            continue
        say(preparing.describe(config, prepared._replace(shares=shares), world))
