"""Agrees on a launch id between the ranks of a launch, and rejects environments where ranks would train alone."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Protocol

from mirl_dist.errors import UserError

_LAUNCH_ID = "launch_id"
_LONGEST_PAUSE_SECONDS = 0.25


class KeyValueStore(Protocol):
    """Key-value store shared by all processes of a launch. check: whether all keys are set; get: the value of a key."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def rendezvous(store: KeyValueStore, rank: int, world: int, seconds: float) -> str:
    """Return the launch id, shared by all ranks of this start and distinct from earlier starts in the same store.

    Rank 0 draws and publishes the launch id. Every other rank registers a token of its own under it and waits until
    rank 0 admits that token, so a stale launch id is never accepted. Raise RuntimeError after `seconds`; on rank 0 it
    names the missing ranks.
    """
    deadline, pause = time.monotonic() + seconds, 0.005
    token, answered = secrets.token_hex(8), ""
    others = range(1, world)
    if rank == 0:
        store.set(_LAUNCH_ID, token)
    while time.monotonic() < deadline:
        if rank == 0 and store.check([f"{token}/{other}" for other in others]):
            for other in others:
                store.set(f"{token}/{store.get(f'{token}/{other}').decode()}", "admitted")
            return token
        if rank != 0 and store.check([_LAUNCH_ID]):
            launch_id = store.get(_LAUNCH_ID).decode()
            if launch_id != answered:
                answered = launch_id
                store.set(f"{launch_id}/{rank}", token)
            if store.check([f"{launch_id}/{token}"]):
                return launch_id
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    missing = [other for other in others if not store.check([f"{token}/{other}"])] if rank == 0 else [0]
    raise RuntimeError(f"waited {seconds:.0f} s at the start for rank {', '.join(map(str, missing))}")


def check_launch_environment(env: Mapping[str, str]) -> None:
    """Raise UserError if announced processes were never started, or were started without a launcher.

    For example, `accelerate launch --cpu --num_processes 2` sets a master address but silently starts one process.
    """
    if int(env.get("WORLD_SIZE", "1")) > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise UserError(
            f"found WORLD_SIZE={env['WORLD_SIZE']} in the environment, but not RANK, MASTER_ADDR and MASTER_PORT: this "
            "process would wait for others that nobody started. Unset it, or launch with a file from launch/."
        )
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "WORLD_SIZE" not in env:
        raise UserError(
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks without a launcher: each would train alone in the same "
            "folder. Start one task per node, and in it `accelerate launch` with a file from launch/, or torchrun."
        )
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "RANK" not in env:
        raise UserError(
            "accelerate launch was asked for several processes but started this one alone (its --cpu launcher does "
            "that without a word). Use `accelerate launch --config_file launch/cpu_two.yaml -m mirl_dist train ...`."
        )


def check_own_gpu(env: Mapping[str, str], gpus: int) -> None:
    """Raise UserError if this rank has no GPU of its own. NCCL rejects two ranks on one GPU with an unclear error."""
    local = int(env.get("LOCAL_RANK", "0"))
    if local >= gpus:
        raise UserError(
            f"rank {local} of this node finds {gpus} GPUs, so none for itself. Start one rank per GPU, or add "
            "--set train.device=cpu to train on its processors."
        )
