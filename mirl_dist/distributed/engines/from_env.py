"""Reads the requested engine from the environment variables that `accelerate launch` sets from its launch file."""

from __future__ import annotations

from collections.abc import Mapping

from mirl_dist.distributed.engines.base import EngineSpec
from mirl_dist.errors import UserError

_DECIDED_BY_CONFIG = (
    ("ACCELERATE_GRADIENT_CLIPPING", "none", "optimiser.clip_norm"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "batch.forward"),
    ("ACCELERATE_MIXED_PRECISION", "no", "train.precision"),
)
_IS_OFFLOADED = {"": False, "none": False, "cpu": True}


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
    for key, usual, instead in _DECIDED_BY_CONFIG:
        if env.get(key, usual) not in (usual, "none"):
            raise UserError(f"found {key}={env[key]} from the launch file; the run's config decides ({instead}).")
    offloads: list[bool] = []
    for what in ("OPTIMIZER", "PARAM"):
        device = env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none").lower()
        if device not in _IS_OFFLOADED:
            raise UserError(f"found offload_{what.lower()}_device {device} in the launch file. Use none or cpu.")
        offloads.append(_IS_OFFLOADED[device])
    optimizer, parameters = offloads
    if parameters and stage != "3":
        raise UserError(f"found offload_param_device cpu with zero_stage {stage}; parameters stay with ZeRO-3 alone.")
    names = {"1": "zero1", "2": "zero2", "3": "zero3"}
    return EngineSpec(names[stage], optimizer or parameters, parameters)  # type: ignore[arg-type]
