"""Runs torch's launcher, which starts this node's ranks, again when some died; exchanges exit codes between nodes.

Torch's launchers agree on who starts, and on little else. So those of `train --launch` also tell each other, in the
store of the ranks' rendezvous, when one of them has ended for good.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from mirl_dist.distributed.live_store import LiveStore

_PERIOD_SECONDS = 0.5
_DELIVERY_SECONDS = 3.0
"""Left to the other nodes to read an exit code, while node 0 serves the store for them."""
_STORE_TIMEOUT_SECONDS = 7 * 86400


class NodesDisconnected(Exception):
    """Launchers of several nodes did not find each other, or lost each other. The text says how."""


class NoRestart(Exception):
    """Raised by `on_failure`: the ranks are not to be started again."""


def launch(arguments: list[str], on_failure: Callable[[int, int], None], address: str | None = None) -> int:
    """Run `accelerate launch ARGUMENTS` in this process; return the exit code of the first worker that failed, else 0.

    To be called in a thread: in the main thread, torch's launcher would handle the signals itself. on_failure(local,
    code): called in that thread each time that ranks of this node failed, with the number on this node of the first of
    them, when all have ended; it may raise NoRestart, and 1 is returned. address: of this node, for the others. Raises
    ValueError for options that accelerate refuses, NodesDisconnected for several nodes that lose each other.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch import distributed
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    torch_distributed: Any = distributed
    options = launch_command_parser().parse_args(arguments)
    nodes = int(options.num_machines or 1)
    if address is not None:
        options.local_addr = address  # accelerate has no option for it, but hands it on to torch
    _report_failures(on_failure)
    try:
        launch_command(options)
    except NoRestart:
        return 1
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        positive = [code for code in codes if code > 0] or [1]
        return min(positive, key=lambda code: (code == 1, code))
    except (
        RendezvousError,
        torch_distributed.DistNetworkError,
        torch_distributed.DistStoreError,
        ConnectionError,
        AttributeError,
    ) as error:
        # AttributeError: torch 2.13 stumbles over the None of its own graceful exit from a closed rendezvous
        if nodes == 1 or (isinstance(error, AttributeError) and "is_failed" not in str(error)):
            raise
        raise NodesDisconnected((str(error).strip().splitlines() or [type(error).__name__])[0][:200]) from None
    return 0


def _report_failures(on_failure: Callable[[int, int], None]) -> None:
    """Silence torch's launcher (the workers have said in one line what is wrong, its reports would bury it), and read
    in its log which worker failed: it tells that nowhere else before it starts all of them again."""

    class FailureHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("failed (exitcode: %s) local_rank: %s") and isinstance(record.args, tuple):
                code, local = record.args[:2]
                on_failure(int(str(local)), int(str(code)))

    importlib.import_module("torch.distributed.run")  # which sets its log's level itself
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # it would warn about c10d's node ranks
    logger = logging.getLogger("torch.distributed.elastic")
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.handlers = [FailureHandler()]


def own_address(address: str, port: int) -> str:
    """Return this node's address on its way to another; nothing is sent. Raises OSError for a name without address."""
    family, _, _, _, endpoint = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(endpoint)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the network interface that has an address of this node."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return str(name)
    return None


class NodeChannel:
    """Exchanges exit codes between the launchers of several nodes, when one of them has ended for good.

    Through the store that torch's launcher of node 0 opens at address:port; that node serves it until it exits.
    """

    def __init__(self, address: str, port: int, node: int, nodes: int) -> None:
        self._endpoint, self._node, self._nodes = (address, port), node, nodes
        self._exit_code: int | None = None
        self._received: tuple[int, int] | None = None
        self._host_gone = False
        self._sent, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="nodes", daemon=True).start()

    def received(self) -> tuple[int, int] | None:
        """Return the node that has ended for good, and its code; None while there is none."""
        return self._received

    def host_gone(self) -> bool:
        """Whether the launcher of node 0 was reached, and has ended since."""
        return self._host_gone

    def send(self, code: int) -> None:
        """Send the others the code with which this node has ended, and leave them some time to read it."""
        self._exit_code = code
        deadline = time.monotonic() + _DELIVERY_SECONDS
        self._sent.wait(_DELIVERY_SECONDS)
        if self._node == 0 and self._sent.is_set():  # the store ends with this process
            time.sleep(max(0.0, min(deadline - time.monotonic(), 3 * _PERIOD_SECONDS)))
        self._closed.set()

    def _run(self) -> None:
        try:
            store = self._open_store()
            if store is None:
                return
            others = [node for node in range(self._nodes) if node != self._node]
            while not self._closed.is_set():
                if self._exit_code is not None:
                    store.set(f"ended/{self._node}", str(self._exit_code))
                    self._sent.set()
                codes = store.get([f"ended/{node}" for node in others])
                ended = [(node, int(code)) for node, code in zip(others, codes, strict=True) if code]
                self._received = self._received or (ended[0] if ended else None)
                self._closed.wait(_PERIOD_SECONDS)
        except (RuntimeError, OSError, ValueError):
            self._host_gone = not self._closed.is_set()

    def _open_store(self) -> LiveStore | None:
        """Connect once node 0 listens; node 0 writes that no node has ended, before any other node reads."""
        from torch import distributed

        torch_distributed: Any = distributed
        while not self._is_listening():
            if self._closed.wait(_PERIOD_SECONDS):
                return None
        options = {"is_master": self._node == 0, "wait_for_workers": False, "multi_tenant": True}
        timeout = timedelta(seconds=_STORE_TIMEOUT_SECONDS)
        server = torch_distributed.TCPStore(*self._endpoint, timeout=timeout, **options)
        store = LiveStore(torch_distributed.PrefixStore("mirl_dist/nodes", server), *self._endpoint)
        for node in range(self._nodes) if self._node == 0 else [self._node]:
            store.set(f"ended/{node}", "")
        return store

    def _is_listening(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(self._endpoint, timeout=5):
            return True
        return False
