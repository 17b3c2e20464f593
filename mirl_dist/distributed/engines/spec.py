"""Which engine a launch requests, and whether its library is installed. Needs no torch.

`accelerate launch` passes the engine on in environment variables, which it sets from its launch file.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from mirl_dist.errors import UserError

EngineName = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
ZERO_STAGES: dict[int, EngineName] = {1: "zero1", 2: "zero2", 3: "zero3"}
_IS_OFFLOADED = {"": False, "none": False, "cpu": True}
_TORCH, _DEEPSPEED = (2, 6), (0, 19)
"""Minimum versions. torch.distributed.fsdp exports FSDP2 since 2.6. DeepSpeed 0.16 loses the gradients of all passes
but the last when moments are offloaded, and cannot skip a step."""


class EngineSpec(NamedTuple):
    """Engine requested by a launch.

    offload_optimizer: keep moments and the weights they update in host memory. offload_parameters: keep parameters in
    host memory.
    """

    name: EngineName = "ddp"
    offload_optimizer: bool = False
    offload_parameters: bool = False


def engine_from_env(env: Mapping[str, str]) -> EngineSpec:
    """Return the requested engine, DDP by default. Raise UserError for an unsupported engine or option."""
    if _is_true(env, "ACCELERATE_USE_DEEPSPEED"):
        return _zero_spec(env)
    if not _is_true(env, "ACCELERATE_USE_FSDP"):
        return EngineSpec()
    version = env.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"found FSDP_VERSION={version}; only FSDP2 is known here. Set fsdp_version: 2 in the launch file."
        )
    offload = _is_true(env, "FSDP_OFFLOAD_PARAMS")
    return EngineSpec("fsdp", offload, offload)


def _is_true(env: Mapping[str, str], key: str) -> bool:
    return env.get(key, "").lower() in ("true", "1")


def _zero_spec(env: Mapping[str, str]) -> EngineSpec:
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise UserError(
            "found a deepspeed_config_file in the launch file, which could change rates, precision or accumulation "
            "behind the config's back. Give zero_stage and offload_*_device in the launch file instead."
        )
    if stage not in ("1", "2", "3"):
        raise UserError(f"found zero_stage {stage or 'none'} in the launch file. Use 1, 2 or 3, or a file for DDP.")
    devices = [
        env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none").lower() for what in ("OPTIMIZER", "PARAM")
    ]
    for what, device in zip(("optimizer", "param"), devices, strict=True):
        if device not in _IS_OFFLOADED:
            raise UserError(f"found offload_{what}_device {device} in the launch file. Use none or cpu.")
    optimizer, parameters = (_IS_OFFLOADED[device] for device in devices)
    if parameters and stage != "3":
        raise UserError(f"found offload_param_device cpu with zero_stage {stage}; parameters stay with ZeRO-3 alone.")
    return EngineSpec(ZERO_STAGES[int(stage)], optimizer or parameters, parameters)


def require(name: EngineName) -> str:
    """Return the engine's name with its library and version. Raise LookupError that tells what to install."""
    library, least = ("deepspeed", _DEEPSPEED) if name.startswith("zero") else ("torch", _TORCH)
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise LookupError(
            f"{name} needs DeepSpeed, which is not installed; pip install 'mirl_dist[deepspeed]', or launch with a "
            "file for DDP or FSDP."
        ) from None
    if name != "ddp" and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < least:
        raise LookupError(
            f"{name} needs {library} {'.'.join(map(str, least))} or newer, and finds {version}; install one, or launch "
            "with a file for DDP."
        )
    return f"{name}, {library} {version}"
