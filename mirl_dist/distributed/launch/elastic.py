"""The door to torch's launcher: it starts this node's ranks, again when some died, and hears of the other nodes' ends.

Torch's launchers agree on who starts, and on little else. So those of `train --launch` also tell each other, in the
store where the ranks meet, when one of them has ended for good.
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
_HEARD_SECONDS = 3.0
"""Left to the other nodes to hear a last word, while node 0 keeps the store for them."""
_MOST_SECONDS = 7 * 86400


class NodesDisconnected(Exception):
    """Launchers of several nodes did not find each other, or not any more. The text says how."""


class NoRestart(Exception):
    """Raised by `died`: the ranks are not to be started again."""


def launch(arguments: list[str], died: Callable[[int, int], None], address: str | None = None) -> int:
    """`accelerate launch ARGUMENTS` in this process; the exit code of the first worker that failed, else 0.

    To be called in a thread: in the main thread, torch's launcher would take the signals for itself. died(local, code):
    called in that thread for each time that ranks of this node failed, with the number on this node of the first of
    them, when all have ended; it may raise Over, and 1 is returned. address: of this node, for the others. Raises
    ValueError for options that accelerate refuses, Apart for several nodes that lose each other.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch import distributed
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    known: Any = distributed
    asked = launch_command_parser().parse_args(arguments)
    nodes = int(asked.num_machines or 1)
    if address is not None:
        asked.local_addr = address  # accelerate has no option for it, but hands it on to torch
    _hear_failures(died)
    try:
        launch_command(asked)
    except NoRestart:
        return 1
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        chosen = [code for code in codes if code > 0] or [1]
        return min(chosen, key=lambda code: (code == 1, code))
    except (RendezvousError, known.DistNetworkError, known.DistStoreError, ConnectionError, AttributeError) as error:
        # AttributeError: torch 2.13 stumbles over the None of its own graceful exit from a closed rendezvous
        if nodes == 1 or (isinstance(error, AttributeError) and "is_failed" not in str(error)):
            raise
        raise NodesDisconnected((str(error).strip().splitlines() or [type(error).__name__])[0][:200]) from None
    return 0


def _hear_failures(failed: Callable[[int, int], None]) -> None:
    """Silence torch's launcher (the workers have said in one line what is wrong, its reports would bury it), and hear
    from its log which worker failed: it tells that nowhere else before it starts all of them again."""

    class Failures(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("failed (exitcode: %s) local_rank: %s") and isinstance(record.args, tuple):
                code, local = record.args[:2]
                failed(int(str(local)), int(str(code)))

    importlib.import_module("torch.distributed.run")  # which sets its log's level itself
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # that c10d deals the ranks out is known here
    logger = logging.getLogger("torch.distributed.elastic")
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.handlers = [Failures()]


def own_address(address: str, port: int) -> str:
    """This node's own address on its way to another one; nothing is sent. Raises OSError for a name without address."""
    kind, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has an address of this node."""
    import psutil

    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return str(name)
    return None


class NodeChannel:
    """What the launchers of several nodes tell each other: that one of them has ended for good, and with which code.

    It lies in the store that torch's launcher of node 0 opens at address:port; that node keeps it until it leaves.
    """

    def __init__(self, address: str, port: int, node: int, nodes: int) -> None:
        self._place, self._node, self._nodes = (address, port), node, nodes
        self._told: int | None = None
        self._heard: tuple[int, int] | None = None
        self._gone = False
        self._said, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="nodes", daemon=True).start()

    def received(self) -> tuple[int, int] | None:
        """The node that has ended for good, and its code."""
        return self._heard

    def host_gone(self) -> bool:
        """Whether the launcher of node 0 was met, and has ended since."""
        return self._gone

    def send(self, code: int) -> None:
        """Tell the others that this node has ended with `code`, and leave them some time to hear it."""
        self._told = code
        last = time.monotonic() + _HEARD_SECONDS
        self._said.wait(_HEARD_SECONDS)
        if self._node == 0 and self._said.is_set():  # the store ends with this process
            time.sleep(max(0.0, min(last - time.monotonic(), 3 * _PERIOD_SECONDS)))
        self._over.set()

    def _run(self) -> None:
        try:
            board = self._open()
            if board is None:
                return
            others = [node for node in range(self._nodes) if node != self._node]
            while not self._over.is_set():
                if self._told is not None:
                    board.set(f"ended/{self._node}", str(self._told))
                    self._said.set()
                words = board.get([f"ended/{node}" for node in others])
                said = [(node, int(word)) for node, word in zip(others, words, strict=True) if word]
                self._heard = self._heard or (said[0] if said else None)
                self._over.wait(_PERIOD_SECONDS)
        except (RuntimeError, OSError, ValueError):
            self._gone = not self._over.is_set()

    def _open(self) -> LiveStore | None:
        """Once node 0 listens; node 0 writes that nobody has ended, before any other node looks."""
        from torch import distributed

        known: Any = distributed
        while not self._listens():
            if self._over.wait(_PERIOD_SECONDS):
                return None
        options = {"is_master": self._node == 0, "wait_for_workers": False, "multi_tenant": True}
        store = known.TCPStore(*self._place, timeout=timedelta(seconds=_MOST_SECONDS), **options)
        board = LiveStore(known.PrefixStore("mirl_dist/nodes", store), *self._place)
        for node in range(self._nodes) if self._node == 0 else [self._node]:
            board.set(f"ended/{node}", "")
        return board

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(self._place, timeout=5):
            return True
        return False
