"""Joins and leaves torch's process group, and connects to the launch's rendezvous store."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from mirl_dist.distributed.live_store import LiveStore
from mirl_dist.distributed.rendezvous import rendezvous

_DISTRIBUTED: Any = torch.distributed  # typed Any: some members are private or lack type stubs

# Keeps destroyed groups alive. If a wrapped model held the last reference, freeing it would wait, while holding the
# GIL, for a gloo thread that may need the GIL to free a tensor (torch 2.13): a finished rank would never exit.
_LEFT_GROUPS: list[Any] = []


class Membership(NamedTuple):
    """A process's place in its group.

    launch_id: shared by all ranks of this start; '' for a single process. accelerator: Accelerate's Accelerator, which
    wraps the network and runs its backward passes under DDP; None under other engines.
    """

    rank: int
    world: int
    device: torch.device
    launch_id: str
    accelerator: Any


def join_process_group(*, cpu: bool, use_accelerate: bool, timeout: timedelta) -> Membership:
    """Join the process group that the launcher announced in the environment.

    timeout: torch's timeout for collectives. use_accelerate: True for DDP only. Accelerate would wrap the networks of
    other engines in its own training loop or, on a CPU, silently not at all.
    """
    backend = "gloo" if cpu else "nccl"
    launch_id = _join_under_launch_id(backend, timeout) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    if use_accelerate:
        return _join_with_accelerate(cpu, timeout, launch_id)
    if not _DISTRIBUTED.is_initialized():  # one process
        store = _DISTRIBUTED.HashStore()
        _DISTRIBUTED.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    device = torch.device("cpu")
    if not cpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return Membership(_DISTRIBUTED.get_rank(), _DISTRIBUTED.get_world_size(), device, launch_id, None)


def _join_with_accelerate(cpu: bool, timeout: timedelta, launch_id: str) -> Membership:
    from accelerate import Accelerator, InitProcessGroupKwargs

    settings = InitProcessGroupKwargs(timeout=timeout)
    accelerator: Any = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[settings])
    rank, world = accelerator.process_index, accelerator.num_processes
    return Membership(rank, world, accelerator.device, launch_id, accelerator)


def _join_under_launch_id(backend: str, timeout: timedelta) -> str:
    """Join the process group under a new launch id, and return the id.

    torch's launcher keeps its store when it restarts ranks (torch 2.4 to 2.13). Without a prefix per launch, torch
    would read the addresses of the previous, dead ranks.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = connect_store(timeout, master=rank == 0 and not store_is_the_launchers())
    launch_id = rendezvous(_DISTRIBUTED.PrefixStore("mirl_dist", store), rank, world, timeout.total_seconds())
    prefixed = _DISTRIBUTED.PrefixStore(launch_id, store)
    _DISTRIBUTED.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=timeout)
    return launch_id


def leave_process_group(membership: Membership) -> None:
    """Leave the process group. All ranks must call this together."""
    if _is_joined():
        _LEFT_GROUPS.append(_DISTRIBUTED.group.WORLD)
    if membership.accelerator is not None:
        membership.accelerator.end_training()
    if _is_joined():
        _DISTRIBUTED.destroy_process_group()


def _is_joined() -> bool:
    return bool(_DISTRIBUTED.is_available() and _DISTRIBUTED.is_initialized())


def connect_store(timeout: timedelta, *, master: bool) -> Any:
    """Connect to the store of this launch. master: serve the store from this process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options = {"is_master": master, "wait_for_workers": False, "multi_tenant": True}
    return _DISTRIBUTED.TCPStore(host, port, timeout=timeout, **options)


def connect_live_store(launch_id: str) -> LiveStore:
    """Open a separate connection for the watchdog. Calls may block indefinitely, which the watchdog itself detects."""
    store = connect_store(timedelta(days=1000), master=False)
    return LiveStore(_DISTRIBUTED.PrefixStore(f"{launch_id}/watch", store), store.host, store.port)


def store_is_the_launchers() -> bool:
    """Whether the launcher's process serves the store, rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_peer_loss(error: RuntimeError) -> bool:
    """Whether a collective failed because another process exited or the network to it failed."""
    signs = (
        "closed by peer",
        "reset by peer",
        "broken pipe",
        "timed out waiting",  # gloo
        "application timeout caused pair closure",
        "at the start for rank",
        "client socket has",  # ... timed out, ... failed
        "connection was likely closed",
        "remote process exit",  # NCCL
        "nccl communicator was aborted",
    )
    return any(sign in str(error).lower() for sign in signs)
