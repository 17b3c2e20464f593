"""Joins and leaves torch's process group, under a launch id that the ranks agree on in the launch's store."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from mirl_dist.distributed import environment
from mirl_dist.distributed.agreement import RankFacts, find_disagreement
from mirl_dist.errors import UserError
from mirl_dist.observability.console import warn

_DISTRIBUTED: Any = torch.distributed  # typed Any: some members are private or lack type stubs
_LAUNCH_ID, _ADMITTED = "launch_id", "admitted"
_LONGEST_PAUSE_SECONDS = 0.25
_READING_SECONDS = 4 * _LONGEST_PAUSE_SECONDS  # time for the other ranks to read why they are refused
_QUIET_SECONDS = 30.0  # after that, a rank that waits for others at the start names them
_NAME_SECONDS = 60.0  # how long a name server may take to learn the name of a node that has just started

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


def join_process_group(facts: RankFacts, *, timeout: timedelta) -> Membership:
    """Join the process group that the launcher announced in the environment.

    timeout: torch's timeout for collectives. Raise UserError, on every rank, if the ranks' facts do not fit together.
    """
    device, cpu = torch.device("cpu"), facts.device == "cpu"
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if is_alone and facts.fault:
        raise UserError(facts.fault)
    if not cpu:
        environment.set_nccl_defaults(os.environ, timeout.total_seconds(), keep_errors=tells_nccl_errors())
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    launch_id = "" if is_alone else _join_under_launch_id(facts, device, timeout)
    # Accelerate would wrap the networks of other engines in its own training loop or, on a CPU, silently not at all.
    use_accelerate = facts.engine == "ddp"
    if use_accelerate:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        replicas = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no gradient is copied back
        settings = [InitProcessGroupKwargs(timeout=timeout), replicas]
        accelerator: Any = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=settings)
        rank, world = accelerator.process_index, accelerator.num_processes
        return Membership(rank, world, accelerator.device, launch_id, accelerator)
    if not _DISTRIBUTED.is_initialized():  # one process
        _init_process_group(facts.backend, device, _DISTRIBUTED.HashStore(), 0, 1, timeout)
    return Membership(_DISTRIBUTED.get_rank(), _DISTRIBUTED.get_world_size(), device, launch_id, None)


def _init_process_group(
    backend: str, device: torch.device, store: Any, rank: int, world: int, timeout: timedelta
) -> None:
    options: dict[str, Any] = {"store": store, "rank": rank, "world_size": world, "timeout": timeout}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device  # NCCL connects here, so a GPU that it cannot use fails here
    _DISTRIBUTED.init_process_group(backend, **options)


def _join_under_launch_id(facts: RankFacts, device: torch.device, timeout: timedelta) -> str:
    """Join the process group under a new launch id, and return the id. Raise UserError as `rendezvous`.

    torch's launcher keeps its store when it restarts ranks (torch 2.4 to 2.13). Without a prefix per launch, torch
    would read the addresses of the previous, dead ranks.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    serve, seconds = rank == 0 and not store_is_the_launchers(), timeout.total_seconds()
    with _remark_on_waiting(rank, world):
        wait_for_store(*_master(), seconds, serve=serve)
        store = open_store(*_master(), timeout, serve=serve)
        launch_id = rendezvous(_DISTRIBUTED.PrefixStore("mirl_dist", store), rank, world, seconds, facts)
    _init_process_group(facts.backend, device, _DISTRIBUTED.PrefixStore(launch_id, store), rank, world, timeout)
    return launch_id


@contextlib.contextmanager
def _remark_on_waiting(rank: int, world: int) -> Iterator[None]:
    """Print what this rank waits for, and why, once the context has lasted for a while."""
    host, port = _master()
    timer = threading.Timer(
        _QUIET_SECONDS,
        warn,
        [
            f"mirl-dist, rank {rank}: waiting for the other ranks at {host}:{port} (found RANK={rank}, "
            f"WORLD_SIZE={world}, MASTER_ADDR and MASTER_PORT in the environment). Start them, or unset these "
            "variables to run alone."
        ],
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_store(host: str, port: int, seconds: float, *, serve: bool) -> None:
    """Wait until the host's name is known and, unless this process is to serve it, the store answers.

    torch waits for both inside a call in which Python handles no signal. Raise UserError if the name stays unknown,
    RuntimeError if nothing answers within `seconds`.
    """
    start, pause = time.monotonic(), 0.05
    while time.monotonic() - start < seconds:
        try:
            if serve:
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), timeout=10).close()
            return
        except socket.gaierror as error:
            if time.monotonic() - start > _NAME_SECONDS:
                raise UserError(
                    f"MASTER_ADDR: found '{host}' in the environment, whose address this node cannot find "
                    f"({error.strerror}). Give the address of the node of rank 0, or unset RANK and WORLD_SIZE to run "
                    "alone.",
                    resumable=True,
                ) from error
        except OSError:
            pass  # nobody listens there yet
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    raise RuntimeError(f"waited {seconds:.0f} s at the start for rank 0, at {host}:{port}")


def rendezvous(store: Any, rank: int, world: int, seconds: float, facts: RankFacts) -> str:
    """Return the launch id, shared by all ranks of this start and distinct from earlier starts in the same store.

    Rank 0 draws and publishes the launch id. Every other rank registers its facts and a token of its own under it, and
    waits until rank 0 answers that token, so a stale launch id is never accepted. Rank 0 compares the facts of all
    before it answers any. Raise UserError on every rank if they do not fit together, RuntimeError after `seconds`; on
    rank 0 it names the missing ranks. store: torch's, or one with its methods set, get and check.
    """
    deadline, pause = time.monotonic() + seconds, 0.005
    token, answered = secrets.token_hex(8), ""
    others = range(1, world)
    if rank == 0:
        store.set(_LAUNCH_ID, token)
    while time.monotonic() < deadline:
        if rank == 0 and store.check([f"{token}/{other}" for other in others]):
            _answer_all(store, token, [facts, *(_read_facts(store, token, other) for other in others)])
            return token
        if rank != 0 and store.check([_LAUNCH_ID]):
            launch_id: str = store.get(_LAUNCH_ID).decode()
            if launch_id != answered:
                answered = launch_id
                store.set(f"{launch_id}/{rank}/facts", facts.to_json().decode())
                store.set(f"{launch_id}/{rank}", token)
            if store.check([f"{launch_id}/{token}"]):
                _raise_refusal(store.get(f"{launch_id}/{token}").decode())
                return launch_id
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    missing = [other for other in others if not store.check([f"{token}/{other}"])] if rank == 0 else [0]
    raise RuntimeError(f"waited {seconds:.0f} s at the start for rank {', '.join(map(str, missing))}")


def _read_facts(store: Any, launch_id: str, rank: int) -> RankFacts:
    key = f"{launch_id}/{rank}/facts"
    # Versions before these facts register a token alone.
    return RankFacts.from_json(store.get(key) if store.check([key]) else b'{"mirl_dist": "an older version"}')


def _answer_all(store: Any, launch_id: str, everyone: list[RankFacts]) -> None:
    """Admit all ranks, or refuse all with the reason, from rank 0. everyone: facts in rank order."""
    refusal = find_disagreement(everyone)
    for other in range(1, len(everyone)):
        store.set(f"{launch_id}/{store.get(f'{launch_id}/{other}').decode()}", refusal or _ADMITTED)
    if refusal and not store_is_the_launchers():
        time.sleep(_READING_SECONDS)  # the store ends with this process
    _raise_refusal(refusal or _ADMITTED)


def _raise_refusal(answer: str) -> None:
    if answer != _ADMITTED:
        raise UserError(answer, everywhere=True)


def tells_nccl_errors() -> bool:
    """Whether this torch can be asked for errors of NCCL, as `find_connection_error` does (torch 2.6 or newer)."""
    return hasattr(getattr(_DISTRIBUTED, "ProcessGroupNCCL", None), "get_error")


def find_connection_error() -> str:
    """Return the error that NCCL's thread has met in a collective of this process, or ''. Callable from any thread."""
    error = _DISTRIBUTED.group.WORLD._get_backend(torch.device("cuda")).get_error()
    return "" if error == torch._C._distributed_c10d.ErrorType.SUCCESS else str(error.name)


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


def open_store(host: str, port: int, timeout: timedelta, *, serve: bool) -> Any:
    """Connect to torch's store at host:port. serve: serve the store from this process, unless it does already."""
    options = {"is_master": serve, "wait_for_workers": False, "multi_tenant": True}
    return _DISTRIBUTED.TCPStore(host, port, timeout=timeout, **options)


def _master() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def store_is_the_launchers() -> bool:
    """Whether the launcher's process serves the store, rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class LiveStore:
    """Key-value store of torch at host:port under a prefix, which detects the end of its server.

    get: values of keys that are all set already. Once the server has exited, calls raise RuntimeError or OSError, or
    block. torch prints a page of C++ frames when it calls a dead server. A separate connection detects that the server
    has closed, and calls then raise ConnectionResetError without reaching torch.
    """

    def __init__(self, host: str, port: int, timeout: timedelta, prefix: str, *, serve: bool = False) -> None:
        """serve: as for open_store."""
        self.address = f"{host}:{port}"
        self._store = _DISTRIBUTED.PrefixStore(prefix, open_store(host, port, timeout, serve=serve))
        self._connection = socket.create_connection((host, port), timeout=60)
        self._connection.setblocking(False)

    @classmethod
    def of_launch(cls, launch_id: str) -> LiveStore:
        """Open the watchdog's own connection. Calls may block indefinitely, which the watchdog itself detects."""
        return cls(*_master(), timedelta(days=1000), f"{launch_id}/watch")

    def _check_alive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self._connection.recv(1):
                raise ConnectionResetError("the store has closed the connection")

    def set(self, key: str, value: str) -> None:
        self._check_alive()
        self._store.set(key, value)

    def get(self, keys: list[str]) -> list[bytes]:
        self._check_alive()
        values: list[bytes] = self._store.multi_get(keys)
        return values

    def close(self) -> None:
        self._connection.close()


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
