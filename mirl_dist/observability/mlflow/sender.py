"""The thread that tells a tracking store what waits, in order, so that nobody else has to wait for it.

After a failure it pauses and tries again; only what a store refuses for good is given up. No store is known here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow.outbox import Outbox
from mirl_dist.observability.mlflow.records import DamagedRecord, Record
from mirl_dist.observability.mlflow.segments import PendingRecord

STEPS_PER_DELIVERY, SECONDS_PER_DELIVERY = 50, 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, HURRIED_PAUSE_SECONDS = 5.0, 300.0, 1.0
LOCK_PAUSE_SECONDS = 1.0

_log = logging.getLogger("mirl_dist.tracking")


class RecordStore(Protocol):
    """Where items go.

    deliver: must bear the same item twice, and one of a run that an earlier life opened. troubles: what it may raise
    when it should be tried again; UserError among them, for ids that could not be kept.
    """

    name: str  # for people, without secrets

    def deliver(self, item: Record) -> None: ...
    def transient_errors(self) -> tuple[type[BaseException], ...]: ...
    def describe(self, trouble: BaseException) -> str: ...
    def is_final(self, trouble: BaseException) -> bool: ...
    def answers(self) -> bool: ...


@dataclasses.dataclass
class _Outage:
    """Of a store, or of its place for files alone. told: whether people know; not_before: monotonic time to try at."""

    told: bool = False
    pause: float = 0.0
    not_before: float = 0.0

    def lengthen(self, longest: float) -> None:
        self.pause = min(max(2 * self.pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS, longest)
        self.not_before = time.monotonic() + self.pause

    def over(self) -> None:
        self.pause = self.not_before = 0.0


class Sender:
    """Sends what an outbox holds to a store, in a daemon thread after `start`, or in the caller's by `send_all`."""

    def __init__(self, store: RecordStore, outbox: Outbox) -> None:
        self._store, self._outbox, self._changed = store, outbox, outbox.changed
        self._due, self._steps, self._lock_at = math.inf, 0, 0.0
        self._longest_pause, self._closed = math.inf, False
        self._away, self._no_files = _Outage(), _Outage()
        self._refused = set[tuple[str, str]]()
        self._error = "nothing got through"
        self._announce: Callable[..., None] = _log.warning  # of outages
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        self.soon()
        self._thread.start()

    def soon(self) -> None:
        """Send what waits, now or when the pause after a failure is over."""
        self._send_at(time.monotonic())

    def step(self) -> None:
        """A step was put: send when 50 have gathered, or after 5 seconds."""
        with self._changed:
            self._steps += 1
            full = self._steps >= STEPS_PER_DELIVERY
            self._send_at(time.monotonic() + (0.0 if full else SECONDS_PER_DELIVERY))

    def finish(self, idle_seconds: float, seconds: float) -> bool:
        """Try all that waits once more, without long pauses; whether it is sent. The thread ends.

        Waits while items keep getting through: at most `idle_seconds` without one, and `seconds` in all.
        """
        with self._changed:
            self._longest_pause = HURRIED_PAUSE_SECONDS
            self._away.not_before = self._no_files.not_before = self._lock_at = 0.0
            self._due = -math.inf
            self._changed.notify_all()
            last = now = time.monotonic()
            end, sent = now + seconds, self._outbox.sent
            while self._unfinished() and self._thread.is_alive() and now < min(end, last + idle_seconds):
                self._changed.wait(min(end - now, last + idle_seconds - now, 0.5))
                now = time.monotonic()
                if self._outbox.sent != sent:
                    last, sent = now, self._outbox.sent
            unfinished = self._unfinished()
            self._closed = True
            self._changed.notify_all()
        if not unfinished:
            self._thread.join(idle_seconds)
        return not unfinished

    def send_all(self, idle_seconds: float, advance: Callable[[int], None]) -> str:
        """Send all that waits, in this thread; what hindered it for `idle_seconds`, else ''. advance: items so far."""
        self._due, self._longest_pause = -math.inf, HURRIED_PAUSE_SECONDS
        self._announce = _nobody
        last, sent = time.monotonic(), 0
        while self._unfinished():
            self._send_one()
            if self._outbox.sent != sent:
                last, sent = time.monotonic(), self._outbox.sent
                advance(sent)
            elif time.monotonic() - last > idle_seconds:
                return self._error
            else:
                time.sleep(max(0.0, min(self._pause(), HURRIED_PAUSE_SECONDS)))
        return ""

    def _send_at(self, when: float) -> None:
        with self._changed:
            if when < self._due and self._unfinished():
                self._due = when
                self._changed.notify_all()

    def _unfinished(self) -> bool:
        return not self._outbox.mine or sum(self._outbox.has_pending()) > 0

    def _work(self) -> None:
        try:
            while self._awaited():
                if self._outbox.mine:
                    self._send_one()
                elif self._outbox.claim_older():
                    self._gather_anew()
                else:
                    self._lock_at = time.monotonic() + LOCK_PAUSE_SECONDS
        finally:
            self._outbox.close()

    def _awaited(self) -> bool:
        """Wait until there is something to do; False at the end."""
        with self._changed:
            while not self._closed:
                seconds = self._pause()
                if seconds <= 0:
                    return True
                self._changed.wait(None if seconds == math.inf else seconds)
        return False

    def _pause(self) -> float:
        """Seconds until something may be tried."""
        at = self._lock_at
        if self._outbox.mine:
            files, others = self._outbox.has_pending()
            at = min(
                max(self._away.not_before, self._due) if others else math.inf,
                max(self._away.not_before, self._no_files.not_before) if files else math.inf,
            )
        return at - time.monotonic()

    def _gather_anew(self) -> None:
        """When all steps are sent, the next ones are gathered again."""
        with self._changed:
            if not self._outbox.has_pending()[1]:
                self._due, self._steps = math.inf, 0

    def _send_one(self) -> None:
        """One delivery of what may be tried now, and what comes of it."""
        now = time.monotonic()
        back = self._away.not_before <= now
        batch = self._outbox.next(files=back and self._no_files.not_before <= now, others=back and self._due <= now)
        item = self._whole(batch)
        if item is None:
            self._outbox.done(batch)
            return
        try:
            self._store.deliver(item)
        except self._store.transient_errors() as trouble:
            if not self._refuses(item, trouble):
                self._must_wait(item, trouble)
                return
        else:
            self._refused.discard((item.kind, item.run_key))
            self._away.over()
            if item.kind == "file":
                self._no_files.over()
        with self._changed:
            self._outbox.done(batch)
            self._gather_anew()
        self._report_recovery()

    def _whole(self, batch: list[PendingRecord]) -> Record | None:
        """The one item that a batch makes, of all that can still be read."""
        items = []
        for entry in batch:
            try:
                items.append(entry.read())
            except (DamagedRecord, OSError) as error:
                text = "%s of %s, which %s was to hear, cannot be read any more (%s) and is left out"
                _log.warning(text, entry.kind, entry.run_key, self._store.name, error)
        if not items:
            return None
        return dataclasses.replace(items[0], points=[point for item in items for point in item.points])

    def _refuses(self, item: Record, trouble: BaseException) -> bool:
        """Whether the store will never take it; the first refusal of a kind is told."""
        if item.kind == "open" or isinstance(trouble, UserError) or not self._store.is_final(trouble):
            return False
        if (item.kind, item.run_key) not in self._refused:
            text = "%s did not take %s '%s' of %s (%s). Training goes on without it there."
            _log.warning(text, self._store.name, item.kind, item.name, item.run_key, self._store.describe(trouble))
        self._refused.add((item.kind, item.run_key))
        return True

    def _must_wait(self, item: Record, trouble: BaseException) -> None:
        """Pause; the first failure of an outage is told. The place for files may be away alone: points pass then."""
        cause = str(trouble) if isinstance(trouble, UserError) else self._store.describe(trouble)
        outage, text = (
            self._away,
            (
                "%s is away or refuses (%s). Training goes on; points are kept and sent when it is back. "
                "Check the server, and the address in tracking.uri or MLFLOW_TRACKING_URI."
            ),
        )
        if isinstance(trouble, UserError):
            text = "what %s is to hear waits, because the ids of its runs could not be kept (%s). Training goes on."
        elif item.kind == "file" and self._store.answers():
            outage, text = self._no_files, "%s takes points but no file (%s). Training goes on; files are kept."
        self._error = cause
        with self._changed:
            outage.lengthen(self._longest_pause)
        if not outage.told:
            outage.told = True
            self._announce(text, self._store.name, cause)

    def _report_recovery(self) -> None:
        """An outage is over, and told to be, when all that waited is sent."""
        files, others = self._outbox.has_pending()
        if self._away.told and not others and (not files or self._no_files.told):
            self._away.told = False
            self._announce("%s is back: all that waited is sent", self._store.name)
        if self._no_files.told and not files:
            self._no_files.told = False
            self._announce("%s takes files again: all that waited are sent", self._store.name)


def _nobody(*_: object) -> None:
    """Tell nobody."""
