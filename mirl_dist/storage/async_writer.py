"""Background commits: training takes a snapshot and continues while a thread writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from mirl_dist.errors import UserError
from mirl_dist.storage.retry import Patience, Say, to_stderr, with_retries


class AsyncWriter:
    """Writer of one commit at a time, on a daemon thread, so that an unavailable server cannot block process exit.

    A transient store failure is retried for `patience_seconds`. The final error is raised by `raise_failure`, `wait`
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
        """Whether the last commit failed."""
        return self._future is not None and self._future.done() and self._future.exception() is not None

    def begin(self, work: Callable[[], None], what: str) -> None:
        """Start a commit once the previous one has ended, whose UserError is raised here. `work` may be retried."""
        self.wait()
        self._future = Future()
        threading.Thread(target=self._work, args=(work, what, self._future), name="keeper", daemon=True).start()

    def _work(self, work: Callable[[], None], what: str, future: Future[None]) -> None:
        try:
            future.set_result(with_retries(work, what, self._patience, self._say))
        except BaseException as error:  # noqa: BLE001 - raised again by `wait`
            future.set_exception(error)

    def raise_failure(self) -> None:
        """Raise the UserError of the last commit if it failed, so that training does not continue without it."""
        if self.failed:
            self.wait()

    def wait_at_most(self, seconds: float) -> None:
        """Wait up to `seconds` for the current commit to succeed or fail, without raising; for a process that exits."""
        if self._future is not None:
            wait([self._future], seconds)

    def wait(self) -> None:
        """Block until the commit is written. Raise its UserError if it failed."""
        if self._future is None:
            return
        try:
            self._future.result()
        except UserError as fault:
            text = f"a commit failed, and training stops: {fault}"
            raise UserError(text, everywhere=fault.everywhere, resumable=fault.resumable) from fault
