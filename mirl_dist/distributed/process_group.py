"""Joins and leaves torch's process group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from mirl_dist.distributed.rendezvous import rendezvous

_DISTRIBUTED: Any = torch.distributed  # what it calls private, or does not describe


def join_process_group(backend: str, patience: timedelta) -> str:
    """Join the process group under a word of this start, which is returned.

    For torch's launcher keeps its store when it starts ranks again (torch 2.4 to 2.13), and torch alone would read in
    it where the dead ones listened.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = connect_store(patience, master=rank == 0 and not store_is_the_launchers())
    word = rendezvous(_DISTRIBUTED.PrefixStore("mirl_dist", store), rank, world, patience.total_seconds())
    own = _DISTRIBUTED.PrefixStore(word, store)
    _DISTRIBUTED.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=patience)
    return word


def connect_store(patience: timedelta, *, master: bool) -> Any:
    """A connection to where the ranks of this launch meet; the master keeps that place."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options = {"is_master": master, "wait_for_workers": False, "multi_tenant": True}
    return _DISTRIBUTED.TCPStore(host, port, timeout=patience, **options)


def store_is_the_launchers() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_peer_loss(error: RuntimeError) -> bool:
    """Whether a collective failed because another process ended, or the network to it."""
    signs = (
        "closed by peer",
        "reset by peer",
        "broken pipe",
        "timed out waiting",  # gloo
        "application timeout caused pair closure",
        "at the start for rank",
        "client socket has",  # timed out, failed
        "connection was likely closed",
        "remote process exit",  # NCCL
        "nccl communicator was aborted",
    )
    return any(sign in str(error).lower() for sign in signs)
