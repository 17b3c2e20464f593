"""How the processes of a launch find each other: launches that lost some are refused, those that came are counted."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Protocol

from mirl_dist.errors import UserError

_WORD = "word"
_LONGEST_PAUSE_SECONDS = 0.25


class KeyValueStore(Protocol):
    """Where the processes of a launch meet. check: whether all of some keys are set; get: what one holds."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def rendezvous(store: KeyValueStore, rank: int, world: int, seconds: float) -> str:
    """A word that all ranks of this start know, and none of an earlier one, whose words the store may still hold.

    Rank 0 makes it and calls the others; each answers with a word of its own, and is let in by that one: so nobody
    takes an old call for this one. Raises RuntimeError after `seconds`, on rank 0 with the ranks that have not come.
    """
    last, pause = time.monotonic() + seconds, 0.005
    mine, called = secrets.token_hex(8), ""
    others = range(1, world)
    if rank == 0:
        store.set(_WORD, mine)
    while time.monotonic() < last:
        if rank == 0 and store.check([f"{mine}/{other}" for other in others]):
            for other in others:
                store.set(f"{mine}/{store.get(f'{mine}/{other}').decode()}", "come in")
            return mine
        if rank != 0 and store.check([_WORD]):
            found = store.get(_WORD).decode()
            if found != called:
                called = found
                store.set(f"{called}/{rank}", mine)
            if store.check([f"{called}/{mine}"]):
                return called
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    missing = [other for other in others if not store.check([f"{mine}/{other}"])] if rank == 0 else [0]
    raise RuntimeError(f"waited {seconds:.0f} s at the start for rank {', '.join(map(str, missing))}")


def check_launch_environment(env: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` announces a meeting point but starts one process, silently."""
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
    """Several ranks on one GPU cannot talk to each other: NCCL refuses them without naming the cause."""
    local = int(env.get("LOCAL_RANK", "0"))
    if local >= gpus:
        raise UserError(
            f"rank {local} of this node finds {gpus} GPUs, so none for itself. Start one rank per GPU, or add "
            "--set train.device=cpu to train on its processors."
        )
