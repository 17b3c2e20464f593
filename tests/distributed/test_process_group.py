"""Ranks of one start find each other, and what a lost rank makes a collective raise is recognised."""

from __future__ import annotations

import concurrent.futures
import socket
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirl_dist.distributed import process_group
from mirl_dist.distributed.agreement import RankFacts
from mirl_dist.distributed.hardware import DeviceChoice
from mirl_dist.distributed.process_group import is_peer_loss, rendezvous
from mirl_dist.errors import UserError
from tests.services.processes import free_port

FACTS = RankFacts.of_this_process(DeviceChoice(cpu=True), "ddp")


def test_ranks_of_one_start_share_a_launch_id_in_a_store_full_of_earlier_ones() -> None:
    store = torch.distributed.HashStore()

    def start() -> set[str]:
        with concurrent.futures.ThreadPoolExecutor() as threads:
            found = []
            for rank in (2, 1, 0):
                found.append(threads.submit(rendezvous, store, rank, 3, 20, FACTS))
                time.sleep(0.02)  # rank 0 last: the others find an old call first
        return {one.result() for one in found}

    words = [start() for _ in range(3)]
    assert [len(word) for word in words] == [1, 1, 1]
    assert len(set.union(*words)) == 3


def test_ranks_that_never_come_are_named() -> None:
    with pytest.raises(RuntimeError, match="waited 0 s at the start for rank 1, 2$") as told:
        rendezvous(torch.distributed.HashStore(), 0, 3, 0.05, FACTS)
    assert is_peer_loss(told.value)
    with pytest.raises(RuntimeError, match="waited 0 s at the start for rank 0$"):
        rendezvous(torch.distributed.HashStore(), 2, 3, 0.05, FACTS)


def test_all_ranks_are_refused_with_one_text_if_one_of_them_differs() -> None:
    store = torch.distributed.HashStore()
    facts = [FACTS, FACTS._replace(host="odd", engine="fsdp"), FACTS]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        calls = [threads.submit(rendezvous, store, rank, 3, 20, facts[rank]) for rank in range(3)]
        errors = [call.exception(timeout=20) for call in calls]
    assert all(isinstance(error, UserError) and error.everywhere for error in errors)
    (text,) = {str(error) for error in errors}
    assert text.startswith("ranks differ in their engine: rank 1 (odd) has fsdp; rank 0 (")


def test_a_rank_of_a_version_without_facts_is_named() -> None:
    store = torch.distributed.HashStore()
    with concurrent.futures.ThreadPoolExecutor() as threads:
        call = threads.submit(rendezvous, store, 0, 2, 20, FACTS)
        launch_id = store.get("launch_id").decode()
        store.set(f"{launch_id}/1", "token")  # all that such a version registers
        with pytest.raises(
            UserError, match=r"differ in their version of mirl_dist: rank 1 \(\) has an older version; rank 0 \("
        ):
            call.result(timeout=20)


def test_a_group_on_gpus_is_bound_to_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    distributed = SimpleNamespace(
        init_process_group=lambda backend, **options: calls.append((backend, options["device_id"])),
        is_initialized=lambda: False,
        HashStore=torch.distributed.HashStore,
        get_rank=lambda: 0,
        get_world_size=lambda: 1,
        ProcessGroupNCCL=SimpleNamespace(get_error=None),
    )
    monkeypatch.setattr(process_group, "_DISTRIBUTED", distributed)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(process_group.os, "environ", env := {"LOCAL_RANK": "3"})
    facts = FACTS._replace(device="cuda", engine="fsdp")
    joined = process_group.join_process_group(facts, timeout=timedelta(seconds=60))
    gpu = torch.device("cuda", 3)
    assert joined.device == gpu
    assert calls == [gpu, ("nccl", gpu)], "the device is set before NCCL starts"
    assert env["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


def test_an_error_of_nccl_is_read_from_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = torch._C._distributed_c10d.ErrorType
    errors = [kinds.SUCCESS, kinds.COMM_ERROR]
    backend = SimpleNamespace(get_error=lambda: errors.pop(0))
    world = SimpleNamespace(_get_backend=lambda device: backend)
    monkeypatch.setattr(process_group, "_DISTRIBUTED", SimpleNamespace(group=SimpleNamespace(WORLD=world)))
    assert [process_group.find_connection_error() for _ in range(2)] == ["", "COMM_ERROR"]


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[pair.cc:553] Connection closed by peer [127.0.0.1]:60051. This is typically caused by a remote", True),
        ("[pair.cc:537] Read error [127.0.0.1]:30088: Connection reset by peer. This is typically caused by", True),
        ("[unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete", True),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("The client socket has timed out after 2000ms while trying to connect to (127.0.0.1, 1).", True),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
        ("CUDA out of memory. Tried to allocate 20.00 MiB", False),
    ],
)
def test_errors_of_collectives_that_lost_a_rank_are_told_from_others(text: str, lost: bool) -> None:
    assert is_peer_loss(RuntimeError(text)) is lost


def test_a_listener_that_appears_late_is_waited_for() -> None:
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as threads:
        waiting = threads.submit(process_group.wait_for_store, "127.0.0.1", port, 20, serve=False)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        with socket.create_server(("127.0.0.1", port)):
            waiting.result(timeout=20)


def test_a_store_that_nobody_serves_is_a_lost_rank() -> None:
    with pytest.raises(RuntimeError, match="at the start for rank 0, at 127.0.0.1:") as told:
        process_group.wait_for_store("127.0.0.1", free_port(), 0.2, serve=False)
    assert is_peer_loss(told.value)
    process_group.wait_for_store("127.0.0.1", free_port(), 0.2, serve=True)


@pytest.mark.parametrize("serve", [True, False])
def test_a_master_whose_name_stays_unknown_is_named(serve: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_NAME_SECONDS", 0.1)
    with pytest.raises(UserError, match="MASTER_ADDR: found 'nowhere.invalid'.* unset RANK and WORLD_SIZE") as told:
        process_group.wait_for_store("nowhere.invalid", 1, 20, serve=serve)
    assert told.value.resumable
