"""Handles SIGTERM, SIGINT and SIGUSR1: a run that trains commits and exits; any other command exits where it is.

A signal is noted by a thread, because the main thread may be waiting inside a collective or a transfer, where Python
runs no handler. The same thread asks whether others were asked to stop, and ends the process at the deadline.
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
    """What has happened so far. requested_at: seconds of the monotonic clock, None while nobody has asked."""

    requested_at: float | None = None
    handled: bool = False
    closed: bool = False


class StopSignal:
    """Whether this process was asked to stop; a second SIGINT ends it at once.

    Until `graceful` is set there is nothing to commit, and the first signal ends the process with code 75. It does so
    by SystemExit, which no library takes for an error of its own and tries again.

    sources: others that may have been asked, polled twice a second; listeners: called once, when this process was asked
    (both in a thread of their own, and must not raise); on_user_signal: called for SIGINT and SIGUSR1, which no
    launcher sends of its own. is_cleanup: whether a SIGTERM only clears this process away because another has failed;
    it then exits with code 1 as soon as it is not `busy` any more, or after ten seconds. phase: what the process is
    doing, for the message at the deadline, which is `deadline_seconds` after the first request.
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

    @property
    def requested(self) -> bool:
        return self._state.requested_at is not None

    def __call__(self) -> bool:
        return self.requested

    def listen(self) -> StopSignal:
        """Handle the signals of this process from now on; only its main thread may call this."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # A loader process that is ended by SIGTERM must not write into this socket, which it has inherited.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        threading.Thread(target=self._watch, args=(ours, theirs), name="signals", daemon=True).start()
        return self

    def close(self) -> None:
        """Handle no more signals: whoever comes next has handlers of its own."""
        self._state.closed = True
        signal.set_wakeup_fd(-1)

    def request(self) -> None:
        """Ask this process to stop."""
        if self._state.requested_at is None:
            self._state.requested_at = time.monotonic()

    def left_seconds(self) -> float:
        """Seconds until the deadline; all of it while nobody has asked."""
        since = self._state.requested_at
        return self.deadline_seconds - (time.monotonic() - since if since is not None else 0.0)

    def _handle(self, number: int, frame: object) -> None:
        """Run in the main thread, as soon as it executes Python again."""
        if number == signal.SIGTERM and not self.requested and self.is_cleanup():
            return  # the thread ends the process
        again, handled = self.requested and self._state.handled, self._state.handled
        self._state.handled = True
        self.request()
        if again and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        if not self.graceful and not handled:  # once: a second one must not break what the first has begun to clear up
            if os.environ.get("RANK", "0") == "0":
                text = "stopped as asked; nothing is left half-written. Start the same command again to continue."
                warn(f"mirl-dist: {text}")
            raise SystemExit(RESUMABLE)

    def _watch(self, signals: socket.socket, keep: socket.socket) -> None:
        """Run in a thread until the process ends. `keep`: the other end, which must not be closed."""
        signals.settimeout(_POLL_SECONDS)
        notified = False
        interrupts = 0
        while not self._state.closed:
            try:
                numbers = signals.recv(64)
            except TimeoutError:
                numbers = b""
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(INTERRUPTED)
            self._note(numbers)
            if self.requested and not notified:
                notified = True
                for notify in self.listeners:
                    notify()
            if self.requested and self.left_seconds() <= 0:
                self._exit_at_deadline()

    def _note(self, numbers: bytes) -> None:
        """Act on the signals received since the last poll, and ask the other sources."""
        if signal.SIGTERM in numbers and not self.requested and self.is_cleanup():
            self._exit_for_restart()
        if signal.SIGINT in numbers or signal.SIGUSR1 in numbers:
            self.on_user_signal()
        if any(number in _SIGNALS for number in numbers) or any(asked() for asked in self.sources):
            self.request()

    def _exit_at_deadline(self) -> None:
        text = f"asked to stop {self.deadline_seconds:g} s ago (preempt.deadline_seconds), and still in "
        text += f"{self.phase()}: leaving now. The run resumes from its last commit with --resume auto."
        warn(f"mirl-dist, {rank_label()}: {text}")
        self.on_user_signal()
        os._exit(RESUMABLE)

    def _exit_for_restart(self) -> None:
        """Exit with code 1 once this process is not busy: the launcher clears it away and may start it again."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while self.busy() and time.monotonic() < deadline:
            time.sleep(0.05)
        os._exit(1)


@contextlib.contextmanager
def record_signals(on_signal: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Collect the signals that ask this process to stop, in order, SIGHUP too; only the main thread may call this.

    on_signal: called at each of them.
    """
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        signals.append(number)
        on_signal()

    # nohup has SIGHUP ignored, and means it.
    handles_hangup = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    numbers = (*_SIGNALS, signal.SIGHUP) if handles_hangup else _SIGNALS
    before = [(number, signal.signal(number, handle)) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in before:
            signal.signal(number, handler)
