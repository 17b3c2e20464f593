"""Runs torch's launcher, which starts and restarts this node's ranks, and exchanges exit codes between nodes.

torch's launchers of several nodes coordinate little beyond starting. Those of `train --launch` therefore also publish
in the store of the ranks' rendezvous when one of them has ended for good.
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
from typing import Any, NamedTuple

from mirl_dist.distributed.process_group import LiveStore
from mirl_dist.errors import UserError

_PERIOD_SECONDS = 0.5
_DELIVERY_SECONDS = 3.0
"""Time for the other nodes to read an exit code before node 0, which serves the store, exits."""
_STORE_TIMEOUT = timedelta(days=7)


class NodesDisconnected(Exception):
    """Launchers of several nodes did not find each other or lost their connection; the message gives the cause."""


class NoRestart(Exception):
    """Raised by `on_failure` to prevent a restart of the ranks."""


def launch(
    arguments: list[str], on_failure: Callable[[int, int], None], on_end: Callable[[int], None], address: str | None
) -> int:
    """Run `accelerate launch ARGUMENTS` in this process. Return the first failed worker's exit code, or 0.

    Call this in a thread: in the main thread, torch's launcher would install its own signal handlers. on_failure(local
    rank, exit code): called in that thread for the first failed rank of this node, once all its ranks have exited; if
    it raises NoRestart, 1 is returned. on_end(process id): called there before a SIGTERM ends a rank because another
    failed. address: this node's address for the others. Raise UserError for options that accelerate rejects,
    NodesDisconnected if the launchers of several nodes lose each other.
    """
    import torch.distributed

    try:
        from accelerate.commands.launch import launch_command, launch_command_parser
    except ImportError as error:
        raise UserError(f"accelerate cannot be used here: {error}. Install the version of constraints.txt.") from None
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    distributed: Any = torch.distributed
    lost = (RendezvousError, distributed.DistNetworkError, distributed.DistStoreError, ConnectionError)
    options = launch_command_parser().parse_args(arguments)
    if address is not None:
        options.local_addr = address  # not an option of accelerate, but passed on to torch
    _report_failures(on_failure, on_end)
    try:
        launch_command(options)
    except NoRestart:
        return 1
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return min((code for code in codes if code > 0), key=lambda code: (code == 1, code), default=1)
    except (ValueError, ImportError) as error:
        text = f"accelerate refuses this launch: {str(error).rstrip('.')}. Compare with launch/cpu_two.yaml."
        raise UserError(text) from None
    except (*lost, AttributeError) as error:
        # torch 2.13 raises AttributeError on the None that its own graceful exit from a closed rendezvous returns.
        if options.num_machines in (None, 1) or (isinstance(error, AttributeError) and "is_failed" not in str(error)):
            raise
        raise NodesDisconnected((str(error).strip().splitlines() or [type(error).__name__])[0][:200]) from None
    return 0


def _report_failures(on_failure: Callable[[int, int], None], on_end: Callable[[int], None]) -> None:
    """Silence torch's launcher; call on_failure(local rank, exit code) for failed workers, on_end(pid) for ended ones.

    The launcher's long reports would bury the worker's one-line error. Its log is the only place that names the failed
    worker before all workers are restarted, and that announces the SIGTERM to the others, so a log handler reads it.
    """

    class FailureHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("failed (exitcode: %s) local_rank: %s") and isinstance(record.args, tuple):
                code, local = record.args[:2]
                on_failure(int(str(local)), int(str(code)))
            elif record.msg.startswith("Sending process %s closing signal") and isinstance(record.args, tuple):
                on_end(int(str(record.args[0])))

    importlib.import_module("torch.distributed.run")  # first: importing it sets its logger's level
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # hides a warning about c10d's node ranks
    logger = logging.getLogger("torch.distributed.elastic")
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.handlers = [FailureHandler()]


class NodeEnd(NamedTuple):
    """Final exit of another node. code: its exit code; since: monotonic seconds at which this launcher learned it."""

    node: int
    code: int
    since: float


class NodeChannel:
    """Exchange of final exit codes between the launchers of several nodes.

    Uses the store that torch's launcher opens on node 0 at address:port; node 0 serves it until its launcher exits.
    ended: a node that has ended for good. host_gone: the connection to node 0's launcher was established and then lost.
    """

    def __init__(self, address: str, port: int, node: int, nodes: int) -> None:
        self._endpoint, self._node, self._nodes = (address, port), node, nodes
        self._exit_code: int | None = None
        self.ended: NodeEnd | None = None
        self.host_gone = False
        self._sent, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="nodes", daemon=True).start()

    def send(self, code: int) -> None:
        """Publish this node's final exit code, and give the other nodes time to read it (3 s at most)."""
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
                if self.ended is None:
                    ended = [(node, int(code)) for node, code in zip(others, codes, strict=True) if code]
                    self.ended = NodeEnd(*ended[0], time.monotonic()) if ended else None
                self._closed.wait(_PERIOD_SECONDS)
        except (RuntimeError, OSError, ValueError):
            self.host_gone = not self._closed.is_set()

    def _open_store(self) -> LiveStore | None:
        """Connect once node 0 listens; return None if closed before. Node 0 initialises all keys before others read."""
        while not self._is_listening():
            if self._closed.wait(_PERIOD_SECONDS):
                return None
        store = LiveStore(*self._endpoint, _STORE_TIMEOUT, "mirl_dist/nodes", serve=self._node == 0)
        for node in range(self._nodes) if self._node == 0 else [self._node]:
            store.set(f"ended/{node}", "")
        return store

    def _is_listening(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(self._endpoint, timeout=5):
            return True
        return False
