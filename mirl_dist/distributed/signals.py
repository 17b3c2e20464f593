"""SIGTERM, SIGINT, SIGUSR1: a run that trains commits and leaves; one that does not leaves where it stands.

A signal is noted by a thread, because the main thread may be waiting inside a collective or a transfer, where Python
runs no handler. The same thread asks whether others were asked to stop, and ends the process at the deadline.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from mirl_dist.observability.console import rank_here, warn

RESUMABLE = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 0.5
_BUSY_SECONDS = 10.0


class StopSignal:
    """Whether this process was asked to stop; a second SIGINT ends it at once.

    Until `polite` is set there is nothing to commit, and the first signal ends the process with code 75. It does so by
    SystemExit, which no library takes for an error of its own and tries again.
    hears: others who may have been asked, looked at twice a second; tells: called once, when this process was asked
    (both in a thread of their own, and must not raise); meant: called for SIGINT and SIGUSR1, which no launcher sends
    of its own. cleared: whether a SIGTERM only clears this process away because another has failed; it then ends with
    code 1 as soon as it is not `busy` any more, or after ten seconds. phase: what the process is doing, for the message
    at the deadline, which is `deadline_seconds` after the first request.
    """

    def __init__(self) -> None:
        self.requested = False
        self.graceful = False
        self.deadline_seconds = 120.0
        self.sources: list[Callable[[], bool]] = []
        self.listeners: list[Callable[[], None]] = []
        self.on_user_signal: Callable[[], None] = lambda: None
        self.is_cleanup: Callable[[], bool] = lambda: False
        self.busy: Callable[[], bool] = lambda: False
        self.phase: Callable[[], str] = lambda: "starting"
        self.since = 0.0
        self._handled = self._closed = False

    def __call__(self) -> bool:
        return self.requested

    def listen(self) -> StopSignal:
        """Hear the signals of this process from now on; only its main thread may ask for that."""
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
        """Hear no more: whoever comes next has handlers of its own."""
        self._closed = True
        signal.set_wakeup_fd(-1)

    def request(self) -> None:
        """Ask this process to stop."""
        if not self.requested:
            self.since = time.monotonic()
            self.requested = True

    def left_seconds(self) -> float:
        """Until the deadline; all of it while nobody has asked."""
        return self.deadline_seconds - (time.monotonic() - self.since if self.requested else 0.0)

    def _handle(self, number: int, frame: object) -> None:
        """In the main thread, as soon as it runs Python again."""
        if number == signal.SIGTERM and not self.requested and self.is_cleanup():
            return  # the thread ends the process
        again, handled = self.requested and self._handled, self._handled
        self._handled = True
        self.request()
        if again and number == signal.SIGINT:
            os._exit(130)
        if not self.graceful and not handled:  # once: a second one must not break what the first has begun to clear up
            if _rank() == "0":
                text = "stopped as asked; nothing was left half done. The same command goes on from here."
                warn(f"mirl-dist: {text}")
            raise SystemExit(RESUMABLE)

    def _watch(self, signals: socket.socket, keep: socket.socket) -> None:
        """Until the process ends. `keep`: the other end, which must not be closed."""
        signals.settimeout(_POLL_SECONDS)
        told = False
        interrupts = 0
        while not self._closed:
            try:
                numbers = signals.recv(64)
            except TimeoutError:
                numbers = b""
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(130)
            if signal.SIGTERM in numbers and not self.requested and self.is_cleanup():
                self._leave_to_a_new_start()
            if signal.SIGINT in numbers or signal.SIGUSR1 in numbers:
                self.on_user_signal()
            if any(number in _SIGNALS for number in numbers) or any(hear() for hear in self.sources):
                self.request()
            if self.requested and not told:
                told = True
                for tell in self.listeners:
                    tell()
            if self.requested and self.left_seconds() <= 0:
                text = f"asked to stop {self.deadline_seconds:g} s ago (preempt.deadline_seconds), and still in "
                text += f"{self.phase()}: leaving now. The run goes on from its last commit with --resume auto."
                warn(f"mirl-dist, {rank_here()}: {text}")
                self.on_user_signal()
                os._exit(RESUMABLE)

    def _leave_to_a_new_start(self) -> None:
        last = time.monotonic() + _BUSY_SECONDS
        while self.busy() and time.monotonic() < last:
            time.sleep(0.05)
        os._exit(1)


def _rank() -> str:
    return os.environ.get("RANK", "0")
