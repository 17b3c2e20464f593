"""One writer per run: every launch that writes into a run holds a numbered generation of its lease.

Of several starters exactly one wins a generation, by `put_if_absent`; nothing else has to be exact. Clocks of two
machines are never compared: whoever wants the lease watches, by its own clock, whether beats come. The newest
generation holds. A holder that slept through its succession finds the newer claim when it asks (`Lease.check`); its
beats go under its own number and disturb nobody. The newest claim is never removed, so numbers only grow.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from mirl_dist.errors import Stopped, UserError
from mirl_dist.storage import NotFound, StorageError, Store
from mirl_dist.storage import lease_files as files
from mirl_dist.storage.lease_files import Holder, read_holder
from mirl_dist.storage.retry import Say, to_stderr

__all__ = ["Holder", "Lease", "LeaseLost", "read_holder"]


class LeaseLost(UserError):
    """This launch no longer holds the run: another took it over, or the lease was removed."""


class Lease:
    """The right of this launch to write into a run. Its beats come from a thread of their own.

    seconds: a launch without a beat for so long is dead for others. news: what a beat tells, of JSON's types; called by
    that thread, must be quick and must not raise. launch: what readers and the next launch should know of this one.
    After `claim`: `generation`, from 1, and `previous`, whom this launch followed and how that one ended.
    """

    def __init__(
        self,
        store: Store,
        *,
        seconds: float,
        status: Callable[[], dict[str, Any]],
        launch: Mapping[str, Any] | None = None,
        say: Say = to_stderr,
    ) -> None:
        self._store, self._seconds, self._status, self._say = store, seconds, status, say
        self.generation = 0
        self.previous: Holder | None = None
        self._token = uuid.uuid4().hex
        self._claim = files.claim_bytes(self._token, launch or {})
        self._since = self._renewed = time.monotonic()
        self._lost, self._end = threading.Event(), threading.Event()
        self._why, self._released, self._trouble = "", False, "the store does not answer"
        self._thread = threading.Thread(target=self._beat_until_end, name="lease", daemon=True)

    # -- taking -----------------------------------------------------------------------------------------------------

    def claim(self, stop_asked: Callable[[], bool] = lambda: False) -> int:
        """Take the lease; its generation. At once where nobody holds it, else when its holder is found dead.

        Raises UserError naming a holder that lives, Stopped when that is asked meanwhile, StorageError.
        """
        assert self.generation == 0, "a lease is claimed once"
        watch = _HolderWatch(self._store, self._seconds, self._say)
        while True:
            if stop_asked():
                raise Stopped(f"asked to stop before {self._store.where()} was this launch's")
            found = watch.poll()
            if found is not None and found.ended is None:
                time.sleep(watch.pause)
            elif self._try_claim(found.generation + 1 if found else 1):
                self._start(found)
                return self.generation

    def _try_claim(self, generation: int) -> bool:
        """Whether this launch holds that generation now. One that others passed meanwhile is worth nothing."""
        name = files.claim_name(generation)
        try:
            self._store.put_if_absent(name, self._claim)
        except NotFound:  # another start swept the temporary file away
            self._store.put_if_absent(name, self._claim)
        return self._holds(generation)

    def _holds(self, generation: int) -> bool:
        """Whether it is the newest, with this very launch's claim: the answer to a put may get lost on its way, and
        where the folder is removed by hand numbers begin again."""
        if files.newest_generation(self._store) != generation:
            return False
        return files.read_or_empty(self._store, files.claim_name(generation)) == self._claim

    def _start(self, previous: Holder | None) -> None:
        self.generation = previous.generation + 1 if previous else 1
        self.previous = previous
        self._renewed = time.monotonic()
        self._thread.start()
        if previous is not None and previous.ended == "dead":
            self._say(f"the launch on {previous}, is dead; going on in its place")
        elif previous is not None and previous.ended == "silent":
            self._say(f"the launch on {previous}, gave no sign of life for {self._seconds:g} s; going on in its place")
        with suppress(StorageError):  # the next claim removes what stays now
            files.remove_before(self._store, self.generation - 1)

    # -- holding ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Ask the store whether this launch still holds the run. Raises Lost, and from then on always; StorageError."""
        assert self.generation, "only what was claimed can be checked"
        if not self._lost.is_set() and not self._holds(self.generation):
            self._lost.set()
        if self._lost.is_set():
            raise LeaseLost(self._report_lost())

    def lost(self) -> bool:
        """Whether `check`, or the thread after a beat, found that another launch holds the run. Asks nothing."""
        return self._lost.is_set()

    def seconds_since_beat(self) -> float:
        """Since the last beat that got through to the store."""
        return time.monotonic() - self._renewed

    def release(self, why: str) -> None:
        """End the lease: 'finished', 'stopped' or 'failed'. Never raises StorageError; returns within `seconds`.

        To try for longer has no use: after so long without a beat the next launch takes over unasked.
        """
        if not self.generation or self._end.is_set():
            return
        self._why = why
        self._end.set()
        self._thread.join(self._seconds)
        if not self._released and not self.lost():
            text = f"the lease of {self._store.where()} could not be released ({self._trouble})."
            self._say(f"{text} A next launch on another machine waits {self._seconds:g} s.")

    def _report_lost(self) -> str:
        taken, then = "its lease was removed", "Start it again"
        with suppress(StorageError):
            other = read_holder(self._store)
            if other is not None and other.generation >= self.generation:
                taken = f"{other}, took it over at {other.started_at or 'an unknown time'}"
                then = "Leave the run to that launch, or stop it and start this one again"
        me = f"{socket.gethostname()}, pid {os.getpid()}"
        return f"this launch ({me}) no longer holds {self._store.where()}: {taken}; nothing more is written. {then}."

    def _beat_until_end(self) -> None:
        """Until the end, or until another launch holds the run. A store that fails is no reason to die."""
        pause = max(0.2, min(5.0, self._seconds / 6))
        number = 0
        while not self.lost():
            number += 1
            with self._transient_errors():
                self._store.put(files.beat_name(self.generation), self._beat_bytes(beat=number))
                self._renewed = time.monotonic()
                if not self._holds(self.generation):
                    self._lost.set()
            if self._end.wait(pause):
                break
        if not self.lost():
            with self._transient_errors():
                self._store.put(
                    files.released_name(self.generation), self._beat_bytes(why=self._why, token=self._token)
                )
                self._released = True

    def _beat_bytes(self, **more: Any) -> bytes:
        """How this launch stands."""
        running = round(time.monotonic() - self._since, 1)
        return files.to_json({"at": files.utc_now(), "running_seconds": running, "news": self._status(), **more})

    @contextmanager
    def _transient_errors(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            self._trouble = str(error)


class _HolderWatch:
    """Looks at a run's lease, from the first look on, and judges by its own clock whether the holder lives.

    pause: seconds between two looks.
    """

    def __init__(self, store: Store, seconds: float, say: Say) -> None:
        self._store, self._seconds, self._say = store, seconds, say
        self.pause = max(0.2, min(1.0, seconds / 20))
        self._known: int | None = None  # the newest generation at the first look
        self._first: Holder | None = None
        self._last = self._silent = 0.0

    def poll(self) -> Holder | None:
        """The newest holder, `ended` when that is known; None where there is none. Raises UserError for one that lives."""
        found = read_holder(self._store)
        now = time.monotonic()
        gap, self._last = now - self._last, now
        if self._known is None:
            self._known = found.generation if found else 0
        if found is None or found.ended is not None:
            return found
        if found.has_exited():
            return replace(found, ended="dead")
        if found.generation > self._known:
            raise UserError(self._describe_alive(found, "it took the run a moment ago"))
        if self._first is None:
            self._first = found
            text = f"{self._store.where()} is held by the launch on {found}"
            self._say(f"{text}; watching for a sign of life, {self._seconds:g} s at most")
            return found
        if found.beat != self._first.beat:
            if gap < self._seconds:
                raise UserError(self._describe_alive(found, f"its last beat came less than {max(gap, 0.1):.1f} s ago"))
            self._first, self._silent = found, 0.0  # it came while the store was away, and says nothing of now
        # While the store does not answer nobody can beat: such a time counts little.
        self._silent += min(gap, max(2 * self.pause, self._seconds / 4))
        return replace(found, ended="silent") if self._silent >= self._seconds else found

    def _describe_alive(self, found: Holder, life: str) -> str:
        ran = (
            ""
            if found.running_seconds is None
            else f"it has been running for {_format_seconds(found.running_seconds)}, and "
        )
        text = f"{self._store.where()} is held by another launch ({found}), which is alive: {ran}{life}."
        return f"{text} Wait for it, stop it, or choose another run.folder."


def _format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
