"""What this machine offers a run, what a config means on it, and whether a launch of it would work."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path

import torch

from mirl_dist.cli.doctor import disks, machine, services
from mirl_dist.cli.doctor.machine import Finding
from mirl_dist.cli.doctor.plan import LaunchPlan, lines, make, tree
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import shard_cache_folder
from mirl_dist.data.sampler import GlobalSampler, ranks_in_words, split_batch
from mirl_dist.data.shards import Shards
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch import launcher
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.errors import UserError
from mirl_dist.observability.progress import say
from mirl_dist.tickets.open import open_ticket
from mirl_dist.training import preflight

_NEEDED = (
    "torch",
    "accelerate",
    "webdataset",
    "boto3",
    "mlflow",
    "safetensors",
    "numpy",
    "pillow",
    "psutil",
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
    say(f"{'cores':16} {os.cpu_count()}, {hardware.processes()} for this process")
    gpus = [torch.cuda.get_device_name(i) for i in range(hardware.gpus())]
    say(f"{'GPUs':16} {', '.join(gpus) if gpus else 'none: ranks train on the CPU'}")
    backends = [name for name, there in hardware.backends().items() if there]
    say(f"{'rank backends':16} {', '.join(backends) or 'MISSING: this torch cannot connect processes'}")
    missing += not backends
    say(f"{'free disk here':16} {_room(Path.cwd())}")
    folder = shard_cache_folder()
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
    prepared = preflight.preflight(config, 1, "auto", open_ticket)
    for world in (2**i for i in range(7)):
        try:
            shares = split_batch(config.batch.global_, config.batch.forward, world)
        except UserError as fault:
            say(f"{ranks_in_words(world)}: {fault}")
            continue
        say(preflight.describe(config, prepared._replace(batch_split=shares), world))


def print_launch(config: Config, launch: str, gpu: str | None, rate: float | None, as_json: bool) -> int:
    """All that can be checked of a launch before a rank starts, then its plan; returns how many faults there are.

    launch: a launch file, or 'auto'; gpu, rate: as for `launch_plan.make`. Nothing is left behind. Raises UserError for a
    launch file that cannot be read.
    """
    said, _ = launcher.choose(config, launch)
    findings, plan = examine(config, said, gpu, rate)
    faults = sum(finding.kind == "FAULT" for finding in findings)
    if as_json:
        found = [finding._asdict() for finding in findings]
        say(json.dumps({"faults": faults, "findings": found, "plan": tree(plan)}, indent=1))
        return faults
    for line in (*(finding.line() for finding in findings), "", *lines(plan)):
        say(line)
    return faults


def examine(config: Config, said: LaunchFile, gpu: str | None, rate: float | None) -> tuple[list[Finding], LaunchPlan]:
    """The findings, in the order in which a launch would meet their subjects, and the plan."""
    there: list[tuple[Shards, GlobalSampler]] = []
    shards = list(services.check_shards(config, there))
    found = there[0] if there else None
    plan = make(config, said, found, gpu, rate)
    needed = plan.needed()
    folder = disks.cache_folder(config, config.data.shards)
    mounts = Path("/proc/mounts")
    rooms = [
        *disks.run_room(config, plan.size.weights, plan.size.prunable),
        *disks.cache_room(config, folder, found[0] if found else None),
    ]
    place = list(services.run_place(config))
    readable = not any(f.kind == "FAULT" and f.text.startswith(("list", "get")) for f in place)
    digest = found[0].manifest.digest() if found else None
    findings = [
        *machine.world(config, said, os.environ),
        *machine.port(said),
        *machine.devices(config, said, needed),
        *machine.engine(said),
        *machine.limits(config, said),
        *machine.host(plan.states.host, said),
        *shards,
        *disks.cache(folder, mounts.read_text() if mounts.exists() else ""),
        *place,
        *(services.check_run(config, digest) if readable else ()),
        *disks.rooms(rooms),
        *services.check_mlflow(config),
        *services.check_clocks(config),
    ]
    if not any(finding.kind == "FAULT" for finding in findings):
        try:
            preflight.preflight(config, said.ranks, "auto", open_ticket)
        except UserError as fault:
            findings.append(Finding("FAULT", "config", str(fault)))
    if gpu is not None and plan.gpu is not None and needed is not None and needed > plan.gpu.bytes:
        text = f"a rank needs about {needed / 2**30:.1f} GiB, {plan.gpu.name} has {plan.gpu.bytes / 2**30:.1f} GiB"
        findings.append(Finding("FAULT", "GPU", f"{text}; see batch.forward in the plan, or take a larger one."))
    return findings, plan
