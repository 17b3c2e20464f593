"""Reports what this machine offers, what a config means on it, and whether a launch of the config would work."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from pathlib import Path

import psutil
import torch

from mirl_dist.cli.doctor import machine, services
from mirl_dist.cli.doctor.arithmetic import check_arithmetic
from mirl_dist.cli.doctor.machine import Finding
from mirl_dist.cli.doctor.plan import LaunchPlan, make_plan, plan_as_dict, plan_lines
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import nearest_existing, shard_cache_folder
from mirl_dist.data.sampler import ranks_in_words, split_batch
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch import launcher
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.errors import UserError
from mirl_dist.observability.progress import say
from mirl_dist.tickets.open import open_ticket
from mirl_dist.training import preflight

_REQUIRED_PACKAGES = (
    "torch",
    "accelerate",
    "webdataset",
    "boto3",
    "einops",
    "jinja2",
    "markupsafe",
    "mlflow",
    "safetensors",
    "numpy",
    "pillow",
    "platformdirs",
    "psutil",
    "scikit-image",
    "matplotlib",
    "pydantic",
    "pyyaml",
    "rich",
    "typer",
)
_OTHER_CREDENTIALS = re.compile("AWS_(PROFILE|WEB_IDENTITY_TOKEN_FILE|CONTAINER_CREDENTIALS_(RELATIVE|FULL)_URI)")


def print_machine() -> int:
    """Print versions, processors, GPUs, free disk space and environment; return how many things are missing."""
    missing = 0
    say(f"{'python':16} {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _REQUIRED_PACKAGES:
        try:
            say(f"{package:16} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing += 1
            say(f"{package:16} MISSING: pip install {package}")
    say(f"{'cores':16} {os.cpu_count()}, {hardware.processes()} for this process")
    gpus = [torch.cuda.get_device_name(i) for i in range(hardware.gpus())]
    say(f"{'GPUs':16} {', '.join(gpus) or f'none: ranks train on the CPU ({hardware.why_no_cuda()})'}")
    backends = [name for name, there in hardware.backends().items() if there]
    say(f"{'rank backends':16} {', '.join(backends) or 'MISSING: this torch cannot connect processes'}")
    missing += not backends
    say(f"{'free disk here':16} {_free_space(Path.cwd())}")
    folder = shard_cache_folder()
    say(f"{'shard cache':16} {folder}, {_free_space(folder)} free (for shards from s3:// and the web)")
    say(f"{'S3 credentials':16} {'set' if _has_s3_credentials() else 'not set'} (for shards in s3://)")
    for name, use in (("MIRL_DATA", "real images for recipes and tests"), ("MLFLOW_TRACKING_URI", "where runs show")):
        # The value may contain a password, so only whether it is set is printed.
        say(f"{name:16} {'set' if os.environ.get(name) else 'not set'} ({use})")
    return missing


def _free_space(folder: Path) -> str:
    """Return the free space, in GB, of the disk that contains or would contain a folder."""
    return f"{shutil.disk_usage(nearest_existing(folder)).free / 1e9:.1f} GB"


def _has_s3_credentials() -> bool:
    """Return whether the environment or the home folder has S3 credentials; instance roles are not detected."""
    env = os.environ
    keys = env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY")
    file = Path(os.path.expanduser(env.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"))
    others = any(value and _OTHER_CREDENTIALS.fullmatch(name) for name, value in env.items())
    return bool(keys or others or file.is_file())


def print_plan(config: Config) -> None:
    """Print what a config means on 1, 2, 4, ... ranks: samples per rank, passes, steps, samples, learning rate."""
    folder = config.data.cache.folder
    if folder is not None:
        say(f"{'data.cache':16} {folder}, {_free_space(Path(folder))} free")
    run_plan = preflight.preflight(config, 1, "auto", open_ticket)
    for world in (2**i for i in range(7)):
        try:
            split = split_batch(config.batch.global_, config.batch.forward, world)
        except UserError as fault:
            say(f"{ranks_in_words(world)}: {fault}")
            continue
        say(preflight.describe(config, run_plan._replace(batch_split=split), world))


def print_launch(config: Config, launch: str, gpu: str | None, rate: float | None, as_json: bool) -> int:
    """Print every check of a launch that is possible before ranks start, then its plan; return the number of faults.

    launch: a launch file, or 'auto'. gpu, rate: as for `plan.make_plan`. All probes are removed. Raises UserError for a
    launch file that cannot be read.
    """
    launch_file, _ = launcher.choose(config, launch)
    findings, plan = examine(config, launch_file, gpu, rate)
    faults = sum(finding.kind == "FAULT" for finding in findings)
    if as_json:
        result = {"faults": faults, "findings": [f._asdict() for f in findings], "plan": plan_as_dict(plan)}
        say(json.dumps(result, indent=1))
        return faults
    for line in (*(finding.line() for finding in findings), "", *plan_lines(plan)):
        say(line)
    return faults


def examine(
    config: Config, launch_file: LaunchFile, gpu: str | None, rate: float | None
) -> tuple[list[Finding], LaunchPlan]:
    """Return the findings, in the order in which a launch would encounter them, and the plan."""
    shards_finding, opened = services.check_shards(config)
    shards = opened[0] if opened else None
    plan = make_plan(config, launch_file, opened, gpu, rate)
    needed = plan.needed_bytes()
    permissions = list(services.check_permissions(config))
    readable = not any(f.kind == "FAULT" and f.text.startswith(("list", "get")) for f in permissions)
    findings = [
        *machine.check_world(config, launch_file, os.environ),
        *machine.check_port(launch_file),
        *machine.check_devices(config, launch_file, needed),
        *check_arithmetic(config, launch_file),
        machine.check_engine(launch_file),
        *machine.check_limits(config, launch_file),
        *machine.check_host_memory(plan.states.host, launch_file),
        shards_finding,
        machine.check_cache(machine.cache_folder(config.data), psutil.disk_partitions(all=True)),
        *permissions,
        *([services.check_run(config, shards.manifest.digest() if shards else None)] if readable else []),
        *machine.check_space(config, plan.size, shards),
        services.check_mlflow(config),
        *services.check_clocks(config),
    ]
    if not any(finding.kind == "FAULT" for finding in findings):
        try:
            preflight.preflight(config, launch_file.ranks, "auto", open_ticket)
        except UserError as fault:
            findings.append(Finding("FAULT", "config", str(fault)))
    if gpu is not None and plan.gpu is not None and needed is not None and needed > plan.gpu.bytes:
        text = f"a rank needs about {needed / 2**30:.1f} GiB, {plan.gpu.name} has {plan.gpu.bytes / 2**30:.1f} GiB"
        findings.append(Finding("FAULT", "GPU", f"{text}; see batch.forward in the plan, or take a larger one."))
    return findings, plan
