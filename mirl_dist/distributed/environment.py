"""Decides which environment variables of launchers and libraries are obeyed, ignored or refused.

`train --launch` starts its ranks from the launch file and the config alone: variables of accelerate, torchrun, MPI or
a job operator in its environment belong to another launch and are removed, with a line that names them. A process
that another launcher started obeys that launcher, unless a variable contradicts the config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import psutil

from mirl_dist.errors import UserError

_OTHER_LAUNCHES = ("ACCELERATE_", "FSDP_", "PET_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
_OF_RANKS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "CROSS_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
# Variables whose other values would change the training behind the config's back, their neutral values, and the key.
_DECIDED_BY_CONFIG = (
    ("ACCELERATE_GRADIENT_CLIPPING", ("none",), "optimiser.clip_norm"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1", "none"), "batch.forward"),
    ("ACCELERATE_MIXED_PRECISION", ("no", "none"), "train.precision"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no", "none"), "train.compile"),
    ("NVIDIA_TF32_OVERRIDE", ("0",), "train.precision"),
)
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_NCCL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_HEARTBEAT_MARGIN_SECONDS = 120
_GLOO_INTERFACES, _NCCL_INTERFACES = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def foreign_variables(env: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that `train --launch` ignores, sorted."""
    return sorted(name for name in env if name in _OF_RANKS or name.startswith(_OTHER_LAUNCHES))


def clear_for_launch(env: MutableMapping[str, str]) -> list[str]:
    """Remove variables of other launches and return their names.

    Raise UserError if a launcher has started this process: each of its ranks would start a launch of its own.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        raise UserError(
            "--launch: found TORCHELASTIC_RUN_ID in the environment: torchrun or accelerate has started this process. "
            "Use either that launcher or --launch, not both."
        )
    names = foreign_variables(env)
    for name in names:
        del env[name]
    return names


def check_rank(env: Mapping[str, str]) -> None:
    """Raise UserError if this process's launcher left it incomplete, or contradicts the config.

    For example, `accelerate launch --cpu --num_processes 2` sets a master address but silently starts one process.
    """
    for name in _NUMBERS:
        if name in env and not (env[name].isascii() and env[name].isdigit()):
            raise UserError(f"{name}: found '{env[name]}' in the environment. Give a whole number, or unset it.")
    world = int(env.get("WORLD_SIZE", "1"))
    if world > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise UserError(
            f"found WORLD_SIZE={world} in the environment, but not RANK, MASTER_ADDR and MASTER_PORT: this process "
            "would wait for ranks that were never started. Unset it, or launch with a file from launch/."
        )
    if int(env.get("RANK", "0")) >= world:
        raise UserError(
            f"found RANK={env['RANK']} with WORLD_SIZE={env.get('WORLD_SIZE', 'unset')} in the environment: ranks "
            "count from 0. Unset both, or launch with a file from launch/."
        )
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "WORLD_SIZE" not in env:
        raise UserError(
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks without a launcher: each would train alone in the same "
            "folder. Start one task per node, and in it `accelerate launch` with a file from launch/, or torchrun."
        )
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "RANK" not in env:
        raise UserError(
            "accelerate launch was asked for several processes but started only this one (its --cpu launcher does "
            "that silently). Use `accelerate launch --config_file launch/cpu_two.yaml -m mirl_dist train ...`."
        )
    for name, neutral, key in _DECIDED_BY_CONFIG:
        if env.get(name, neutral[0]).lower() not in neutral:
            raise UserError(f"found {name}={env[name]} in the environment; the config decides ({key}). Unset it.")


def check_interfaces(env: Mapping[str, str], *, nccl: bool) -> None:
    """Raise UserError if gloo, or NCCL where ranks use it, is to use network interfaces that this node does not have.

    GLOO_SOCKET_IFNAME lists names. NCCL_SOCKET_IFNAME lists beginnings of names; '^' before the list excludes them
    instead, '=' before them (after '^') makes them whole names.
    """
    interfaces = psutil.net_if_addrs() if _GLOO_INTERFACES in env or _NCCL_INTERFACES in env else {}
    missing = [name for name in env.get(_GLOO_INTERFACES, "").split(",") if name and name not in interfaces]
    refused = {_GLOO_INTERFACES: missing[0]} if missing else {}
    listed = env.get(_NCCL_INTERFACES, "") if nccl else ""
    if listed and not _nccl_interfaces(listed, interfaces):
        refused[_NCCL_INTERFACES] = listed
    for variable, value in refused.items():
        raise UserError(
            f"{variable}: found '{value}', which is no network interface of this node. Use one of "
            f"{', '.join(sorted(interfaces))}, or unset it."
        )


def _nccl_interfaces(text: str, interfaces: Iterable[str]) -> list[str]:
    """Return the interfaces that a value of NCCL_SOCKET_IFNAME admits."""
    is_excluding, listed = text.startswith("^"), text.removeprefix("^")
    is_exact, names = listed.startswith("="), tuple(name for name in listed.removeprefix("=").split(",") if name)
    return [i for i in interfaces if (i in names if is_exact else i.startswith(names)) != is_excluding]


def set_nccl_defaults(env: MutableMapping[str, str], timeout_seconds: float, *, keep_errors: bool) -> None:
    """Set how torch reacts to errors of NCCL, unless the user has: this package's watchdog reports them in one line.

    torch would abort the process with pages of C++ when a peer has died, and when its own thread has waited longer than
    its heartbeat. timeout_seconds: of the collectives. keep_errors: this process asks torch for the errors, which may
    therefore end nothing. Source: torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp (2.13).
    """
    defaults = {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",  # the main thread meets the same error, and reports it
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(int(timeout_seconds) + _HEARTBEAT_MARGIN_SECONDS),
    }
    if keep_errors:
        defaults[_NCCL_ERRORS] = "0"
        if env.get(_NCCL_ERRORS) == "1" and "TORCHELASTIC_RUN_ID" in env:
            del env[_NCCL_ERRORS]  # the default of torch's launcher, not a wish
    for name, value in defaults.items():
        env.setdefault(name, value)
