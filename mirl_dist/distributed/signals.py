"""Handles SIGTERM, SIGINT and SIGUSR1: a training run commits and exits; any other command exits immediately.

A thread receives the signals, because Python runs no handler while the main thread blocks in a collective or a
transfer. The same thread polls for stop requests from elsewhere, and exits the process at the deadline.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mirl_dist.observability.console import rank_label, warn

RESUMABLE = 75
INTERRUPTED = 130
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 0.5
_BUSY_SECONDS = 10.0


@dataclass
class _SignalState:
    """Mutable state of StopSignal. requested_at: monotonic seconds of the first stop request, or None."""

    requested_at: float | None = None
    handled: bool = False
    closed: bool = False


class StopSignal:
    """Stop request of this process; callable, returns whether a stop was requested. A second SIGINT exits at once.

    Until `graceful` is set there is nothing to commit, and the first signal exits the process with code 75. It raises
    SystemExit, because libraries might catch and retry an ordinary exception.

    sources: further stop conditions, polled twice a second. listeners: called once after a stop request. Both run in
    the signal thread and must not raise. on_user_signal: called for SIGINT and SIGUSR1, which launchers never send by
    themselves. is_cleanup: whether a SIGTERM only ends this process because another rank failed; the process then exits
    with code 1 once it is no longer `busy`, after ten seconds at most. phase: current activity, for the message at the
    deadline, `deadline_seconds` after the first request.
    """

    def __init__(self) -> None:
        self.graceful = False
        self.deadline_seconds = 120.0
        self.sources: list[Callable[[], bool]] = []
        self.listeners: list[Callable[[], None]] = []
        self.on_user_signal: Callable[[], None] = lambda: None
        self.is_cleanup: Callable[[], bool] = lambda: False
        self.busy: Callable[[], bool] = lambda: False
        self.phase: Callable[[], str] = lambda: "starting"
        self._state = _SignalState()

    def __call__(self) -> bool:
        return self._state.requested_at is not None

    def listen(self) -> StopSignal:
        """Start handling signals. Only the main thread may call this."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # Forked loader processes inherit this socket; a SIGTERM to one of them must not be written into it.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        threading.Thread(target=self._watch, args=(ours, theirs), name="signals", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop handling signals, so that later code can install its own handlers."""
        self._state.closed = True
        signal.set_wakeup_fd(-1)

    def request(self) -> None:
        """Request a stop of this process."""
        if not self():
            self._state.requested_at = time.monotonic()

    def left_seconds(self) -> float:
        """Return the seconds left until the deadline; `deadline_seconds` before any stop request."""
        since = self._state.requested_at
        return self.deadline_seconds - (time.monotonic() - since if since is not None else 0.0)

    def _handle(self, number: int, frame: object) -> None:
        """Handle a signal in the main thread, as soon as it executes Python bytecode again."""
        if number == signal.SIGTERM and not self() and self.is_cleanup():
            return  # the signal thread exits the process
        is_second, self._state.handled = self._state.handled, True
        self.request()
        if is_second and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        if not self.graceful and not is_second:  # only once: a second signal must not interrupt the clean-up
            if os.environ.get("RANK", "0") == "0":
                text = "stopped on request; nothing is left half-written. Start the same command again to continue."
                warn(f"mirl-dist: {text}")
            raise SystemExit(RESUMABLE)

    def _watch(self, signals: socket.socket, keep: socket.socket) -> None:
        """Receive signals until `close`; runs in a thread. keep: reference that keeps the socket's write end open."""
        signals.settimeout(_POLL_SECONDS)
        has_notified, interrupts = False, 0
        while not self._state.closed:
            numbers = b""
            with contextlib.suppress(TimeoutError):
                numbers = signals.recv(64)
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(INTERRUPTED)
            if signal.SIGTERM in numbers and not self() and self.is_cleanup():
                self._exit_for_restart()
            if signal.SIGINT in numbers or signal.SIGUSR1 in numbers:
                self.on_user_signal()
            if any(number in _SIGNALS for number in numbers) or any(asked() for asked in self.sources):
                self.request()
            if self() and not has_notified:
                has_notified = True
                for notify in self.listeners:
                    notify()
            if self() and self.left_seconds() <= 0:
                self._exit_at_deadline()

    def _exit_at_deadline(self) -> None:
        text = f"asked to stop {self.deadline_seconds:g} s ago (preempt.deadline_seconds), and still in "
        text += f"{self.phase()}: leaving now. The run resumes from its last commit with --resume auto."
        warn(f"mirl-dist, {rank_label()}: {text}")
        self.on_user_signal()
        os._exit(RESUMABLE)

    def _exit_for_restart(self) -> None:
        """Exit with code 1 once this process is not busy, after ten seconds at most. The launcher may restart it."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while self.busy() and time.monotonic() < deadline:
            time.sleep(0.05)
        os._exit(1)


@contextlib.contextmanager
def record_signals(on_signal: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Collect the received stop signals, SIGHUP included, in order. Only the main thread may call this.

    on_signal: called for each signal.
    """
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        signals.append(number)
        on_signal()

    # Under nohup SIGHUP is ignored; keep it so.
    handles_hangup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    numbers = (*_SIGNALS, signal.SIGHUP) if handles_hangup else _SIGNALS
    before = [(number, signal.signal(number, handle)) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in before:
            signal.signal(number, handler)
