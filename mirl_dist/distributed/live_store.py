"""A key-value store that all ranks share, used until its server is gone."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Protocol


class StatusStore(Protocol):
    """A store that all ranks read and write. Once its server is gone calls raise RuntimeError or OSError, or block.

    get: the values of some keys, which have all been set.
    """

    def set(self, key: str, value: str) -> None: ...
    def get(self, keys: list[str]) -> list[bytes]: ...
    def close(self) -> None: ...


class LiveStore:
    """A StatusStore over torch's store at host:port, which is not called once its server has closed the connection.

    Torch prints a page of C++ frames when it meets a dead server, so a connection of our own notices that first.
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
