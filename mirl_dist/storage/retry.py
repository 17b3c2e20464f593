"""Retries with exponential backoff for an unavailable store, and downloads that resume where they broke."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar

from mirl_dist.observability.console import warn
from mirl_dist.storage.base import Rejected, Store, Unavailable

Say: TypeAlias = Callable[[str], None]
"""A function that shows one line of text to the user."""

T = TypeVar("T")

_SAY_EVERY_SECONDS = 60.0


def to_stderr(line: str) -> None:
    """Write one line to standard error, unbuffered."""
    warn(f"mirl-dist: {line}")


@dataclass(frozen=True)
class Patience:
    """A retry policy, in seconds: the limit since the last progress (0: one attempt), the first and longest pause.

    Pauses double. Each is multiplied by a random factor in [0.5, 1], so that ranks that lost a server at the same time
    do not reconnect at the same time.
    """

    seconds: float = 300.0
    first: float = 0.2
    most: float = 20.0


DEFAULT_PATIENCE = Patience()


class RetryState:
    """Attempts and elapsed time of one operation that may be retried."""

    def __init__(self, what: str, patience: Patience, say: Say) -> None:
        self._what, self._patience, self._say = what, patience, say
        self._jitter = random.Random()  # own generator: the global random state must stay reproducible for training
        self._last_report = -_SAY_EVERY_SECONDS
        self._tries = 0
        self.progressed()

    def progressed(self) -> None:
        """Record progress: resets the time limit and the pauses."""
        self._failures = 0
        self._since = time.monotonic()

    def pause_or_give_up(self, error: Unavailable) -> None:
        """Sleep before the next attempt. Once patience has run out, raise Unavailable with duration and attempts."""
        self._tries += 1
        self._failures += 1
        now = time.monotonic()
        left = self._since + self._patience.seconds - now
        if left <= 0:
            if self._patience.seconds <= 0:
                raise error
            times = f"{self._tries} tries" if self._tries > 1 else "one try"
            ended = f"{error} Given up on {self._what} after {times} and {now - self._since:.0f} s without progress."
            raise Unavailable(ended) from error
        if now - self._last_report >= _SAY_EVERY_SECONDS:
            self._last_report = now
            self._say(f"{error} Trying again for {left:.0f} s.")
        pause = min(self._patience.most, self._patience.first * 2.0 ** min(self._failures - 1, 30))
        time.sleep(min(left, pause * self._jitter.uniform(0.5, 1.0)))


def with_retries(work: Callable[[], T], what: str, patience: Patience, say: Say) -> T:
    """Return the result of `work`, retrying while it raises Unavailable and patience lasts.

    what: a short name of the work for the final error message. Any other error is raised at once.
    """
    tries = RetryState(what, patience, say)
    while True:
        try:
            return work()
        except Unavailable as error:
            tries.pause_or_give_up(error)


def download(store: Store, name: str, path: Path, size: int, *, patience: Patience, say: Say) -> None:
    """Append the missing bytes of `name` to `path` until it has `size` bytes; resumes broken transfers.

    Patience is reset whenever bytes arrive. The caller must fsync, rename and verify the digest. Raises Rejected if the
    file is longer than `size`, or if the object's size differs (the local file is then deleted); Unavailable once
    patience has run out; OSError if `path` cannot be written.
    """
    size_so_far = path.stat().st_size if path.exists() else 0
    if size_so_far > size:
        raise Rejected(f"{path} has {size_so_far} bytes, but {store.where(name)} should have {size}. Remove {path}.")
    tries = RetryState(f"bringing {store.where(name)}", patience, say)
    with path.open("ab") as file:
        while size_so_far < size:
            try:
                for block in store.read(name, size_so_far):
                    if size_so_far + len(block) > size:
                        _check_size(store, name, path, size)
                    size_so_far += file.write(block)
                    tries.progressed()
                if size_so_far < size:
                    _check_size(store, name, path, size)
            except Unavailable as error:
                tries.pause_or_give_up(error)


def _check_size(store: Store, name: str, path: Path, size: int) -> NoReturn:
    """Delete the local bytes, which belong to a different object, and raise Rejected."""
    actual = store.size(name)
    path.unlink(missing_ok=True)
    if actual == size:
        raise Rejected(f"{store.where(name)} changed while it was read. Start again.")
    raise Rejected(
        f"{store.where(name)} has {actual} bytes where its manifest or commit says {size}. It was replaced, or its "
        "upload was damaged: build or copy it again."
    )
