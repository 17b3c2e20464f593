"""A TCP proxy that is late, cuts, refuses, falls silent, or answers for the server: a bad network before any server.

It forwards bytes between real sockets in threads of the test's process. Faults are attributes, switched while it runs;
a fault counts from the next request (an HTTP method at the start of what the client sends), also on a connection that
is kept open. Counters tell whether the faults happened.
"""

from __future__ import annotations

import contextlib
import fcntl
import random
import re
import select
import socket
import struct
import termios
import threading
import time
from urllib.parse import urlsplit

SLOW_DOWN = (503, "SlowDown")
FORBIDDEN = (403, "AccessDenied")

_METHOD = re.compile(rb"(GET|HEAD|PUT|POST|DELETE|OPTIONS) [^\r\n]*")


def answer(status: int, code: str, text: str = "no") -> bytes:
    """An error as an S3 server says it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


class FaultyProxy:
    """In front of `upstream` ('http://host:port', may be changed); `url` is its own address.

    Faults: `latency` seconds before each chunk that goes down. After `cut_after` bytes down, head included, a request's
    connection is cut, for `cuts_left` requests (None: all); `ending`: 'reset' (RST), 'end' (a plain end), or 'stall'
    (it stays open, nothing comes). Every `cut_every`-th request is cut at a random byte below `cut_within`, from
    `seed`. A bit of the byte at `flip_up_after` of a request's body is another when it comes to the server, for
    `flips_left` requests. `silent`: requests are taken and nothing is said. `answers`: the next requests are answered
    so (bytes of HTTP each), without the server; `always`: every request is. `refuse` and `accept`: nobody listens, or
    again.

    Counters: `requests` (first lines), `cuts`, `flips`, `silences`, `answered`, `bytes_down` (what went to clients).
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = upstream
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        self.cuts = self.flips = self.silences = self.answered = self.bytes_down = 0
        self.requests: list[str] = []
        self.calm()
        self._listener: socket.socket | None = None
        self._port = 0
        self.accept()
        self.url = f"http://127.0.0.1:{self._port}"

    # -- switches -----------------------------------------------------------------------------------------------

    def calm(self) -> None:
        """No faults from now on."""
        self.latency = 0.0
        self.cut_after: int | None = None
        self.cuts_left: int | None = None
        self.ending = "reset"
        self.cut_every = 0
        self.cut_within = 1 << 16
        self.flip_up_after: int | None = None
        self.flips_left = 1
        self.silent = False
        self.answers: list[bytes] = []
        self.always: bytes | None = None

    def refuse(self) -> None:
        """Connections break, and new ones are refused."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
            listener.close()
        self.drop()

    def accept(self) -> None:
        """Listen, on the same port as before."""
        if self._listener is None:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self._port))
            listener.listen(128)
            self._port = int(listener.getsockname()[1])
            self._listener = listener
            threading.Thread(target=self._accepting, args=(listener,), daemon=True).start()

    def drop(self) -> None:
        """Break all connections that are open now."""
        with self._lock:
            now = list(self._open)
        for client in now:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        self.refuse()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- threads ------------------------------------------------------------------------------------------------

    def _accepting(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                if self._listener is not listener:
                    client.close()
                    return
                self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with contextlib.ExitStack() as stack:
                self._forward(client, stack)
        except OSError:
            _reset(client)
        finally:
            with self._lock:
                self._open.discard(client)
            client.close()

    def _forward(self, client: socket.socket, stack: contextlib.ExitStack) -> None:
        """Until one side ends, or a fault does. The server is met when there is something to tell it."""
        server: socket.socket | None = None
        left: int | None = None  # bytes of this request's answer until the cut
        passed: int | None = None  # bytes of this request's body that went up; None: its head goes
        while True:
            ready, _, _ = select.select([client] if server is None else [client, server], [], [])
            if client in ready:
                sent = client.recv(1 << 16)
                if not sent:
                    return
                if found := _METHOD.match(sent):
                    passed = None
                    said, left = self._begin(found[0].decode(errors="replace"))
                    if said is not None:
                        _say_and_hear(client, said)
                        return
                sent, passed = self._flipped(sent, passed)
                if server is None:
                    at = urlsplit(self.upstream)
                    server = stack.enter_context(socket.create_connection((at.hostname or "", at.port or 80)))
                server.sendall(sent)
            if server is not None and server in ready:
                got = server.recv(1 << 14)
                if not got:
                    return
                if self.latency:
                    time.sleep(self.latency)
                if left is not None:
                    got, left = got[:left], left - len(got)
                client.sendall(got)
                with self._lock:
                    self.bytes_down += len(got)
                if left is not None and left <= 0:
                    self._cut(client)
                    return

    def _begin(self, line: str) -> tuple[bytes | None, int | None]:
        """What happens to the request that begins now: the answer given here, or the bytes until the cut."""
        with self._lock:
            self.requests.append(line)
            if self.silent:
                self.silences += 1
                return b"", None
            said = self.answers.pop(0) if self.answers else self.always
            if said is not None:
                self.answered += 1
                return said, None
            if self.cut_every and len(self.requests) % self.cut_every == 0:
                return None, self._chance.randrange(1, self.cut_within)
            if self.cuts_left is not None and self.cuts_left <= 0:
                return None, None
            return None, self.cut_after

    def _flipped(self, sent: bytes, passed: int | None) -> tuple[bytes, int | None]:
        """What goes up instead of `sent`, and how much of the body has passed then."""
        begins = 0
        if passed is None:
            head = sent.find(b"\r\n\r\n")
            if head < 0:
                return sent, None
            begins, passed = head + 4, 0
        with self._lock:
            at = -1 if self.flip_up_after is None else begins + self.flip_up_after - passed
            if self.flips_left > 0 and begins <= at < len(sent):
                self.flips_left -= 1
                self.flips += 1
                sent = sent[:at] + bytes([sent[at] ^ 1]) + sent[at + 1 :]
        return sent, passed + len(sent) - begins

    def _cut(self, client: socket.socket) -> None:
        with self._lock:
            self.cuts += 1
            if self.cuts_left is not None:
                self.cuts_left -= 1
        if self.ending == "stall":
            _say_and_hear(client, b"")
        elif self.ending == "reset":
            _delivered(client)
            _reset(client)


def _reset(client: socket.socket) -> None:
    """Close with RST instead of FIN."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _delivered(client: socket.socket) -> None:
    """Wait until the other side's kernel has all that was sent: a reset throws away what is still here."""
    last = time.monotonic() + 2
    while time.monotonic() < last:
        waiting = fcntl.ioctl(client, termios.TIOCOUTQ, struct.pack("i", 0))
        if struct.unpack("i", waiting)[0] == 0:
            return
        time.sleep(0.001)


def _say_and_hear(client: socket.socket, said: bytes) -> None:
    """Answer, then read what the client still sends until it leaves; without an answer: silence until it leaves."""
    if said:
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        client.settimeout(5)
    with contextlib.suppress(OSError):
        while client.recv(1 << 16):
            pass
