"""Ports of this machine for servers that tests start."""

from __future__ import annotations

import socket

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
