"""A key-value store shared by all ranks, which detects the end of its server."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Protocol


class StatusStore(Protocol):
    """Key-value store that all ranks read and write.

    get: values of keys that are all set already. Once the server has exited, calls raise RuntimeError or OSError, or
    block.
    """

    def set(self, key: str, value: str) -> None: ...
    def get(self, keys: list[str]) -> list[bytes]: ...
    def close(self) -> None: ...


class LiveStore:
    """StatusStore backed by torch's store at host:port.

    torch prints a page of C++ frames when it calls a dead server. A separate connection detects that the server has
    closed, and calls then raise ConnectionResetError without reaching torch.
    """

    def __init__(self, store: Any, host: str, port: int) -> None:
        self.address = f"{host}:{port}"
        self._store = store
        self._connection = socket.create_connection((host, port), timeout=60)
        self._connection.setblocking(False)

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
