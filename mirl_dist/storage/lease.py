"""The lease that ensures one writer per run: each launch that writes into a run holds a numbered generation of it.

Launches compete for a generation with `put_if_absent`, which exactly one of them wins; no other step needs to be
atomic. The newest generation holds the lease. Clocks of different machines are never compared: a waiting launch
watches, by its own clock, for new heartbeats of the holder. A stalled holder that was replaced finds the newer claim in
`Lease.check`; its heartbeats are written under its own generation and affect nobody. The newest claim is never deleted,
so generations only increase.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from mirl_dist.config.canonical_json import to_json
from mirl_dist.errors import Stopped, UserError
from mirl_dist.storage import NotFound, StorageError, Store
from mirl_dist.storage import lease_files as files
from mirl_dist.storage.lease_files import Holder, read_holder
from mirl_dist.storage.retry import Say, to_stderr

__all__ = ["Holder", "Lease", "LeaseLost", "read_holder"]


class LeaseLost(UserError):
    """This launch no longer holds the run: another launch took it over, or the lease was deleted."""


class _Claim:
    """This launch's claim of a generation, and whether it is still the newest claim."""

    def __init__(self, store: Store, launch: Mapping[str, Any]) -> None:
        self.store, self.generation = store, 0
        self.token = uuid.uuid4().hex
        self._data = files.claim_bytes(self.token, launch)
        self._lost = threading.Event()

    def take(self, generation: int) -> bool:
        """Try to claim a generation; True if this launch holds it and no newer one exists."""
        name = files.claim_name(generation)
        try:
            self.store.put_if_absent(name, self._data)
        except NotFound:  # another launch, starting too, swept the temporary file
            self.store.put_if_absent(name, self._data)
        if self._is_newest(generation):
            self.generation = generation
        return self.generation == generation

    def is_lost(self) -> bool:
        """Whether `check` has found the claim lost. Sends no request."""
        return self._lost.is_set()

    def check(self) -> bool:
        """Check with the store whether the claim still holds. A lost claim stays lost. Raises StorageError."""
        if not self._lost.is_set() and not self._is_newest(self.generation):
            self._lost.set()
        return not self._lost.is_set()

    def _is_newest(self, generation: int) -> bool:
        """Whether `generation` is the newest and its claim has this launch's bytes.

        Compares bytes because the response to a put may be lost, and because generations restart at 1 if the folder is
        deleted by hand.
        """
        if files.newest_generation(self.store) != generation:
            return False
        return files.read_or_empty(self.store, files.claim_name(generation)) == self._data


class _Heartbeat(threading.Thread):
    """Thread that writes heartbeats, and after `stop` the release with the reason.

    Store errors do not end the thread; `last_error` keeps the text of the last one. released: whether the release has
    been written.
    """

    def __init__(self, claim: _Claim, seconds: float, status: Callable[[], dict[str, Any]]) -> None:
        super().__init__(name="lease", daemon=True)
        self._claim, self._status = claim, status
        self._pause = max(0.2, min(5.0, seconds / 6))
        self._begun = time.monotonic()
        self.last_error = "the store does not answer"
        self._reason, self.stopped, self.released = "", threading.Event(), False

    def stop(self, reason: str, seconds: float) -> None:
        """Write the release, waiting at most `seconds`. reason: 'finished', 'stopped' or 'failed'."""
        self._reason = reason
        self.stopped.set()
        self.join(seconds)

    def run(self) -> None:
        """Write heartbeats until `stop`, or until another launch holds the run."""
        store, generation, number = self._claim.store, self._claim.generation, 0
        while not self._claim.is_lost():
            number += 1
            with self._keep_error():
                store.put(files.beat_name(generation), self._describe(beat=number))
                self._claim.check()
            if self.stopped.wait(self._pause):
                break
        if not self._claim.is_lost():
            with self._keep_error():
                ending = self._describe(why=self._reason, token=self._claim.token)
                store.put(files.released_name(generation), ending)
                self.released = True

    def _describe(self, **more: Any) -> bytes:
        running = round(time.monotonic() - self._begun, 1)
        beat = {"at": files.utc_now(), "running_seconds": running, "news": self._status(), **more}
        return to_json(beat, default=str)

    @contextmanager
    def _keep_error(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            self.last_error = str(error)


class Lease:
    """The exclusive right of this launch to write into a run, kept alive by a heartbeat thread.

    seconds: a launch without a heartbeat for this long is considered dead. status: returns JSON-compatible values for
    each heartbeat; the heartbeat thread calls it, so it must be fast and must not raise. launch: facts about this
    launch for readers and for the next launch. `claim` sets `generation` (from 1) and `previous` (the preceding holder
    and how it ended, or None).
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
        self._store, self._seconds, self._say = store, seconds, say
        self.generation = 0
        self.previous: Holder | None = None
        self._claim = _Claim(store, launch or {})
        self._heartbeat = _Heartbeat(self._claim, seconds, status)

    # -- claiming ---------------------------------------------------------------------------------------------------

    def claim(self, stop_asked: Callable[[], bool] = lambda: False) -> int:
        """Claim the lease and return its generation: at once if it is free, else once its holder is found dead.

        Raises UserError naming a holder that is alive, Stopped if `stop_asked` returns True, and StorageError.
        """
        assert self.generation == 0, "a lease is claimed once"
        watch = _HolderWatch(self._store, self._seconds, self._say)
        while True:
            if stop_asked():
                raise Stopped(f"asked to stop before {self._store.where()} was this launch's")
            holder = watch.poll()
            if holder is not None and holder.ended is None:
                time.sleep(watch.pause)
            elif self._claim.take(holder.generation + 1 if holder else 1):
                self._start(holder)
                return self.generation

    def _start(self, previous: Holder | None) -> None:
        self.generation, self.previous = self._claim.generation, previous
        self._heartbeat.start()
        endings = {"dead": "is dead", "silent": f"sent no heartbeat for {self._seconds:g} s"}
        if previous is not None and previous.ended in endings:
            self._say(f"the launch on {previous}, {endings[previous.ended]}; going on in its place")
        with suppress(StorageError):  # best effort: the next claim deletes what remains
            files.remove_before(self._store, self.generation - 1)

    # -- holding ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check with the store that this launch holds the run. Raises StorageError, and LeaseLost (permanently)."""
        assert self.generation, "only what was claimed can be checked"
        if not self._claim.check():
            raise LeaseLost(self._report_lost())

    def lost(self) -> bool:
        """Whether `check` or the heartbeat thread has found the lease lost. Sends no request."""
        return self._claim.is_lost()

    def release(self, why: str) -> None:
        """Release the lease. why: 'finished', 'stopped' or 'failed'. Never raises StorageError.

        Gives up after `seconds`: without a heartbeat for that long, the next launch takes over anyway.
        """
        if not self.generation or self._heartbeat.stopped.is_set():
            return
        self._heartbeat.stop(why, self._seconds)
        if not self._heartbeat.released and not self.lost():
            text = f"the lease of {self._store.where()} could not be released ({self._heartbeat.last_error})."
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


class _HolderWatch:
    """Poller of a run's lease that decides, by the local clock alone, whether the holder is alive.

    pause: seconds between two polls.
    """

    def __init__(self, store: Store, seconds: float, say: Say) -> None:
        self._store, self._seconds, self._say = store, seconds, say
        self.pause = max(0.2, min(1.0, seconds / 20))
        self._known: int | None = None  # newest generation at the first poll; 0 for none
        self._first: Holder | None = None
        self._last = self._silent = 0.0

    def poll(self) -> Holder | None:
        """Return the newest holder or None, with `ended` set once known. Raise UserError if it is alive."""
        holder = read_holder(self._store)
        now = time.monotonic()
        gap, self._last = now - self._last, now
        if self._known is None:
            self._known = holder.generation if holder else 0
        if holder is None or holder.ended is not None:
            return holder
        if holder.has_exited():
            return holder.but(ended="dead")
        if holder.generation > self._known:
            raise UserError(self._describe_alive(holder, "it took the run a moment ago"))
        if self._first is None:
            self._first = holder
            text = f"{self._store.where()} is held by the launch on {holder}"
            self._say(f"{text}; watching for a sign of life, {self._seconds:g} s at most")
            return holder
        if holder.beat != self._first.beat:
            if gap < self._seconds:
                raise UserError(self._describe_alive(holder, f"its last beat came less than {max(gap, 0.1):.1f} s ago"))
            self._first, self._silent = holder, 0.0  # written at any time during a long gap: no proof of life now
        # While the store is unavailable no holder can write a heartbeat, so a long gap counts only in part as silence.
        self._silent += min(gap, max(2 * self.pause, self._seconds / 4))
        return holder.but(ended="silent") if self._silent >= self._seconds else holder

    def _describe_alive(self, holder: Holder, sign_of_life: str) -> str:
        seconds, ran = holder.running_seconds, ""
        if seconds is not None:
            ran = f"it has been running for {_format_seconds(seconds)}, and "
        text = f"{self._store.where()} is held by another launch ({holder}), which is alive: {ran}{sign_of_life}."
        return f"{text} Wait for it, stop it, or choose another run.folder."


def _format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
