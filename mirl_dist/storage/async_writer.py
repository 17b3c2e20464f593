"""Commits in the background: training takes a snapshot and goes on while a thread writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from mirl_dist.errors import UserError
from mirl_dist.storage.retry import Patience, Say, to_stderr, with_retries


class AsyncWriter:
    """One commit at a time, by a daemon thread: a process that must end does not wait for a server that is away.

    A store that fails in passing is tried again for `patience_seconds`; what comes then is raised by `refuse`, `wait`
    and the next `begin`.
    """

    def __init__(self, patience_seconds: float, say: Say = to_stderr) -> None:
        self._patience, self._say = Patience(patience_seconds), say
        self._future: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a commit is being written."""
        return self._future is not None and not self._future.done()

    @property
    def failed(self) -> bool:
        """Whether the last commit could not be written."""
        return self._future is not None and self._future.done() and self._future.exception() is not None

    def begin(self, work: Callable[[], None], what: str) -> None:
        """Start a commit, after the one before has ended. `work` may be called several times. Raises its UserError."""
        self.wait()
        self._future = Future()
        threading.Thread(target=self._work, args=(work, what, self._future), name="keeper", daemon=True).start()

    def _work(self, work: Callable[[], None], what: str, future: Future[None]) -> None:
        try:
            future.set_result(with_retries(work, what, self._patience, self._say))
        except BaseException as error:  # noqa: BLE001 - whoever waits for the commit raises it
            future.set_exception(error)

    def raise_failure(self) -> None:
        """Raise the UserError of the last commit, if it failed; training must not go on as if it were kept."""
        if self.failed:
            self.wait()

    def wait_at_most(self, seconds: float) -> None:
        """Give a commit that is being written some time to end, well or not; for a process that leaves anyway."""
        if self._future is not None:
            wait([self._future], seconds)

    def wait(self) -> None:
        """Until the commit is written. Raises its UserError."""
        if self._future is None:
            return
        try:
            self._future.result()
        except UserError as fault:
            text = f"a commit failed, and training does not go on without: {fault}"
            raise UserError(text, everywhere=fault.everywhere, resumable=fault.resumable) from fault
