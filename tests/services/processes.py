"""Ports for servers that tests start, what waits for them, and what ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import psutil

T = TypeVar("T")
PATIENCE = 300.0
"""Seconds after which what a test waits for counts as never to come: many, for a machine may be busy."""
_RESERVED: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody else gets as long as this process lives: a socket is bound to it and never listens.

    A server that sets SO_REUSEADDR, as all that the tests start do, can bind it beside that socket, and again after it
    was killed. Connections are refused meanwhile.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    _RESERVED.append(reserved)
    return int(reserved.getsockname()[1])


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait_until(
    reached: Callable[[], T],
    *,
    seconds: float = PATIENCE,
    hopeless: Callable[[], object] = lambda: False,
    said: Callable[[], str] = lambda: "",
    pause: float = 0.01,
) -> T:
    """What `reached` returns once that is true. Raises TimeoutError after `seconds`, or once it is `hopeless`.

    said: what the error tells, called at most once, so that it may also end what was waited for.
    """
    last = time.monotonic() + seconds
    while not (found := reached()):
        if (time.monotonic() > last or hopeless()) and not (found := reached()):
            raise TimeoutError(f"what was waited for never came\n{said()}")
        time.sleep(pause)
    return found


def output_of(*command: str, env: Mapping[str, str], timeout: float) -> str:
    """What a command prints. env: added to this process's. Raises RuntimeError with what it complains of."""
    ended = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=timeout, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return ended.stdout


def runs(pid: int) -> bool:
    """Whether a process has not ended (one that only waits for its parent to take note has)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def kill_group(process: subprocess.Popen[bytes] | None) -> None:
    """SIGKILL to a process that leads a group, and to all in it."""
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
