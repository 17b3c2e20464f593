"""How long to try again: a store that is away for a while is waited for, and a transfer that broke goes on."""

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
"""Takes one line for people."""

T = TypeVar("T")

_SAY_EVERY_SECONDS = 60.0


def to_stderr(line: str) -> None:
    """One line on standard error, at once."""
    warn(f"mirl-dist: {line}")


@dataclass(frozen=True)
class Patience:
    """How long to try again, in seconds: in all since the last progress, the first pause, and the longest pause.

    Pauses double, and each is shortened by a random part of up to a half, so that ranks that lost a server together do
    not return together. `seconds` of 0: one try.
    """

    seconds: float = 300.0
    first: float = 0.2
    most: float = 20.0


DEFAULT_PATIENCE = Patience()


class RetryState:
    """The clock of one piece of work that may have to be tried several times."""

    def __init__(self, what: str, patience: Patience, say: Say) -> None:
        self._what, self._patience, self._say = what, patience, say
        self._jitter = random.Random()  # of its own: the global state belongs to experiments
        self._last_report = -_SAY_EVERY_SECONDS
        self._tries = 0
        self.progressed()

    def progressed(self) -> None:
        """Something arrived: patience begins afresh."""
        self._failures = 0
        self._since = time.monotonic()

    def pause_or_give_up(self, error: Unavailable) -> None:
        """Pause before the next try. Raises Unavailable when patience ends: the last error, how long, how often."""
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
    """What `work` returns; it is called again while it raises Unavailable and patience lasts.

    `what`: the work in a few words, for the message at the end of patience. Any other error passes at once.
    """
    tries = RetryState(what, patience, say)
    while True:
        try:
            return work()
        except Unavailable as error:
            tries.pause_or_give_up(error)


def download(store: Store, name: str, path: Path, size: int, *, patience: Patience, say: Say) -> None:
    """Append to `path` what it lacks of `name`, until `size` bytes lie there; a transfer that broke goes on.

    Patience begins afresh whenever bytes arrive. Nothing is flushed, renamed or digested: that is the caller's. Raises
    Rejected where the file is longer than `size`, or where the store's object has another size (the bytes that lie
    there are then removed); Unavailable at the end of patience; OSError where `path` cannot be written.
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
    """Raises Rejected, always, and removes what was brought: it belongs to another object."""
    actual = store.size(name)
    path.unlink(missing_ok=True)
    if actual == size:
        raise Rejected(f"{store.where(name)} changed while it was read. Start again.")
    raise Rejected(
        f"{store.where(name)} has {actual} bytes where its manifest or commit says {size}. It was replaced, or its "
        "upload was damaged: build or copy it again."
    )
