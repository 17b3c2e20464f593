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
from contextlib import suppress
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
    """This launch's claim of a generation. lost: whether `check` has found a newer one; stays True."""

    def __init__(self, store: Store, launch: Mapping[str, Any]) -> None:
        self.store, self.generation, self.lost = store, 0, False
        self.token = uuid.uuid4().hex
        self._data = files.claim_bytes(self.token, launch)

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

    def check(self) -> bool:
        """Check with the store whether the claim still holds. Raises StorageError."""
        if not self.lost and not self._is_newest(self.generation):
            self.lost = True
        return not self.lost

    def _is_newest(self, generation: int) -> bool:
        """Whether `generation` is the newest and its claim has this launch's bytes.

        Compares bytes because the response to a put may be lost, and because generations restart at 1 if the folder is
        deleted by hand.
        """
        if files.newest_generation(self.store) != generation:
            return False
        return files.read_or_empty(self.store, files.claim_name(generation)) == self._data


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
        self.previous: Holder | None = None
        self._claim, self._seconds, self._status, self._say = _Claim(store, launch or {}), seconds, status, say
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._stopped, self._ending = threading.Event(), ""
        self._last_error = "the store does not answer"  # '' once the release has been written

    @property
    def generation(self) -> int:
        return self._claim.generation

    # -- claiming ---------------------------------------------------------------------------------------------------

    def claim(self, stop_asked: Callable[[], bool] = lambda: False) -> int:
        """Claim the lease and return its generation: at once if it is free, else once its holder is found dead.

        Raises UserError naming a holder that is alive, Stopped if `stop_asked` returns True, and StorageError.
        """
        assert self.generation == 0, "a lease is claimed once"
        store, pause = self._claim.store, max(0.2, min(1.0, self._seconds / 20))
        watch = _watch(store, self._seconds, pause, self._say)
        while not self.generation:
            if stop_asked():
                raise Stopped(f"asked to stop before {store.where()} was this launch's")
            holder = next(watch)
            if holder is not None and holder.ended is None:
                time.sleep(pause)
            elif self._claim.take(holder.generation + 1 if holder else 1):
                self.previous = holder
        self._thread.start()
        endings = {"dead": "is dead", "silent": f"sent no heartbeat for {self._seconds:g} s"}
        if self.previous is not None and self.previous.ended in endings:
            self._say(f"the launch on {self.previous}, {endings[self.previous.ended]}; going on in its place")
        with suppress(StorageError):  # best effort: the next claim deletes what remains
            files.remove_before(store, self.generation - 1)
        return self.generation

    # -- holding ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check with the store that this launch holds the run. Raises StorageError, and LeaseLost (permanently)."""
        assert self.generation, "only what was claimed can be checked"
        if not self._claim.check():
            raise LeaseLost(self._report_lost())

    def lost(self) -> bool:
        """Whether `check` or the heartbeat thread has found the lease lost. Sends no request."""
        return self._claim.lost

    def release(self, why: str) -> None:
        """Release the lease. why: 'finished', 'stopped' or 'failed'. Never raises StorageError.

        Gives up after `seconds`: without a heartbeat for that long, the next launch takes over anyway.
        """
        if not self.generation or self._stopped.is_set():
            return
        self._ending = why
        self._stopped.set()
        self._thread.join(self._seconds)
        if self._last_error and not self.lost():
            text = f"the lease of {self._claim.store.where()} could not be released ({self._last_error})."
            self._say(f"{text} A next launch on another machine waits {self._seconds:g} s.")

    def _beat(self) -> None:
        """Write heartbeats until `release`, and then how it ended; end at once if another launch holds the run.

        Store errors do not end the thread.
        """
        claim, pause, began, number = self._claim, max(0.2, min(5.0, self._seconds / 6)), time.monotonic(), 0

        def write(name: str, **more: Any) -> None:
            running = round(time.monotonic() - began, 1)
            beat = {"at": files.utc_now(), "running_seconds": running, "news": self._status(), **more}
            claim.store.put(name, to_json(beat, default=str))

        while not claim.lost:
            number += 1
            try:
                write(files.beat_name(claim.generation), beat=number)
                claim.check()
            except StorageError as error:
                self._last_error = str(error)
            if self._stopped.wait(pause):
                break
        if not claim.lost:
            try:
                write(files.released_name(claim.generation), why=self._ending, token=claim.token)
                self._last_error = ""
            except StorageError as error:
                self._last_error = str(error)

    def _report_lost(self) -> str:
        taken, then = "its lease was removed", "Start it again"
        with suppress(StorageError):
            other = read_holder(self._claim.store)
            if other is not None and other.generation >= self.generation:
                taken = f"{other}, took it over at {other.started_at or 'an unknown time'}"
                then = "Leave the run to that launch, or stop it and start this one again"
        me, where = f"{socket.gethostname()}, pid {os.getpid()}", self._claim.store.where()
        return f"this launch ({me}) no longer holds {where}: {taken}; nothing more is written. {then}."


def _watch(store: Store, seconds: float, pause: float, say: Say) -> Iterator[Holder | None]:
    """Yield a run's newest holder or None at each poll, with `ended` set once known. Raise UserError if it is alive.

    Decides by the local clock alone. pause: seconds between two polls.
    """
    known: int | None = None  # newest generation at the first poll; 0 for none
    first: Holder | None = None
    last = silent = 0.0
    while True:
        holder = read_holder(store)
        now = time.monotonic()
        gap, last = now - last, now
        known = (holder.generation if holder else 0) if known is None else known
        if holder is None or holder.ended is not None:
            pass
        elif holder.has_exited():
            holder = holder.model_copy(update={"ended": "dead"})
        elif holder.generation > known:
            raise UserError(_describe_alive(store, holder, "it took over the run a moment ago"))
        elif first is None:
            first = holder
            text = f"{store.where()} is held by the launch on {holder}"
            say(f"{text}; watching for a sign of life, {seconds:g} s at most")
        else:
            if holder.beat != first.beat:
                if gap < seconds:
                    sign = f"its last heartbeat came less than {max(gap, 0.1):.1f} s ago"
                    raise UserError(_describe_alive(store, holder, sign))
                first, silent = holder, 0.0  # written at any time during a long gap: no proof of life now
            # While the store is away no holder can write a heartbeat, so a long gap counts only in part as silence.
            silent += min(gap, max(2 * pause, seconds / 4))
            if silent >= seconds:
                holder = holder.model_copy(update={"ended": "silent"})
        yield holder


def _describe_alive(store: Store, holder: Holder, sign_of_life: str) -> str:
    seconds, ran = holder.running_seconds, ""
    if seconds is not None:
        ran = f"it has been running for {_format_seconds(seconds)}, and "
    text = f"{store.where()} is held by another launch ({holder}), which is alive: {ran}{sign_of_life}."
    return f"{text} Wait for it, stop it, or choose another run.folder."


def _format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
