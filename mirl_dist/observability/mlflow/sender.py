"""The thread that sends pending records to a tracking store in order, so that training never waits for the store.

After a failure it pauses and retries; only records that the store rejects permanently are dropped.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow.client import REFUSALS, MlflowClientStore, transient_errors
from mirl_dist.observability.mlflow.outbox import Outbox
from mirl_dist.observability.mlflow.records import Record, describe

STEPS_PER_DELIVERY, SECONDS_PER_DELIVERY = 50, 5.0
FIRST_STEP_SECONDS = 5.0
"""How long sending waits for the first step: importing MLflow takes a processor for seconds, which delays that step."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, HURRIED_PAUSE_SECONDS = 5.0, 300.0, 1.0
LOCK_PAUSE_SECONDS = 1.0

_log = logging.getLogger("mirl_dist.tracking")


@dataclasses.dataclass
class _Outage:
    """Outage of a store, or of its artifact store only.

    announced: whether a warning was logged. pause: seconds. not_before: monotonic time of the next attempt.
    """

    announced: bool = False
    pause: float = 0.0
    not_before: float = 0.0

    def lengthen(self, longest: float) -> None:
        self.pause = min(max(2 * self.pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS, longest)
        self.not_before = time.monotonic() + self.pause

    def end(self) -> None:
        self.pause = self.not_before = 0.0


@dataclasses.dataclass
class _Schedule:
    """When to send.

    opens_at: monotonic time before which nothing is sent. due: as that, for records other than files. lock_at:
    monotonic time of the next attempt to take the journal's lock. steps: steps gathered since the last delivery.
    longest_pause: seconds, limit of pauses. ended: whether the thread is to end.
    """

    opens_at: float = 0.0
    due: float = math.inf
    lock_at: float = 0.0
    steps: int = 0
    longest_pause: float = math.inf
    ended: bool = False


class Sender:
    """Sender of an outbox's records to a store: in a daemon thread by `start`, or in the caller's by `send_all`.

    announce: logs a format string with values. last_failure: most recent cause.
    """

    def __init__(
        self, store: MlflowClientStore, outbox: Outbox, announce: Callable[..., object] = _log.warning
    ) -> None:
        self.last_failure = "nothing got through"
        self._store, self._outbox, self._announce = store, outbox, announce
        self._schedule, self._away, self._no_files = _Schedule(), _Outage(), _Outage()
        self._refused = set[tuple[str, str]]()  # kind and run of records that the store rejected permanently
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        """Start sending: after the first step, or in a few seconds."""
        self._schedule.opens_at = time.monotonic() + FIRST_STEP_SECONDS
        self.request_send()
        self._thread.start()

    def request_send(self) -> None:
        """Request sending of all pending records, now or after the current pause. Does not block."""
        self._send_at(time.monotonic())

    def count_step(self) -> None:
        """Count a queued step. Steps are sent once 50 have gathered, or after 5 seconds."""
        with self._outbox.changed:
            self._schedule.steps += 1
            if self._schedule.opens_at:
                self._schedule.opens_at = 0.0
                self._outbox.changed.notify_all()
            full = self._schedule.steps >= STEPS_PER_DELIVERY
            self._send_at(time.monotonic() + (0.0 if full else SECONDS_PER_DELIVERY))

    def finish(self, idle_seconds: float, seconds: float) -> bool:
        """Send all pending records without long pauses, and end the thread. Return whether all were sent.

        Wait as long as deliveries succeed: at most `idle_seconds` without one, and `seconds` in total.
        """
        with self._outbox.changed:
            self._schedule.longest_pause = HURRIED_PAUSE_SECONDS
            self._away.not_before = self._no_files.not_before = self._schedule.lock_at = 0.0
            self._schedule.due, self._schedule.opens_at = -math.inf, 0.0
            self._outbox.changed.notify_all()
            last = now = time.monotonic()
            end, sent = now + seconds, self._outbox.sent
            while (left := self._unfinished()) and self._thread.is_alive() and now < min(end, last + idle_seconds):
                self._outbox.changed.wait(min(end - now, last + idle_seconds - now, 0.5))
                now = time.monotonic()
                if self._outbox.sent != sent:
                    last, sent = now, self._outbox.sent
            self._schedule.ended = True
            self._outbox.changed.notify_all()
        if not left:
            self._thread.join(idle_seconds)
        return not left

    def send_all(self, idle_seconds: float, advance: Callable[[int], None]) -> bool:
        """Send all pending records in the caller's thread. Return False if no delivery succeeds for `idle_seconds`.

        A delivery under way is never given up. advance: called with the number of points and other records sent.
        """
        self._schedule.due, self._schedule.longest_pause = -math.inf, HURRIED_PAUSE_SECONDS
        last, sent = time.monotonic(), 0
        while self._unfinished():
            self._send_one()
            if self._outbox.sent != sent:
                last, sent = time.monotonic(), self._outbox.sent
                advance(sent)
            elif time.monotonic() - last > idle_seconds:
                return False
            else:
                time.sleep(max(0.0, min(self._seconds_to_wait(), HURRIED_PAUSE_SECONDS)))
        return True

    def _send_at(self, when: float) -> None:
        with self._outbox.changed:
            if when < self._schedule.due and self._unfinished():
                self._schedule.due = when
                self._outbox.changed.notify_all()

    def _unfinished(self) -> bool:
        return not self._outbox.owns_delivery or any(self._outbox.waits())

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                if self._outbox.owns_delivery:
                    self._send_one()
                elif self._outbox.claim():
                    self._gather_again()
                else:
                    self._schedule.lock_at = time.monotonic() + LOCK_PAUSE_SECONDS
                self._outbox.journal.checkpoint()  # here, so that appending need not wait for the disk
        finally:
            with self._outbox.changed:
                self._outbox.journal.close()

    def _wait_for_work(self) -> bool:
        """Block until there is work. Return False once the sender is closed."""
        with self._outbox.changed:
            while not self._schedule.ended:
                seconds = self._seconds_to_wait()
                if seconds <= 0:
                    return True
                self._outbox.changed.wait(None if seconds == math.inf else seconds)
        return False

    def _seconds_to_wait(self) -> float:
        """Return the seconds until the next attempt is due; infinite if there is nothing to send."""
        at = self._schedule.lock_at
        if self._outbox.owns_delivery:
            files, others = self._outbox.waits()
            at = min(
                max(self._away.not_before, self._schedule.due) if others else math.inf,
                max(self._away.not_before, self._no_files.not_before) if files else math.inf,
            )
            at = max(at, self._schedule.opens_at)
        return at - time.monotonic()

    def _gather_again(self) -> None:
        """Once all records but files are sent, start gathering steps again."""
        with self._outbox.changed:
            if not self._outbox.waits()[1]:
                self._schedule.due, self._schedule.steps = math.inf, 0

    def _send_one(self) -> None:
        """Try one delivery of records that are due, and handle its result."""
        now = time.monotonic()
        back = self._away.not_before <= now
        batch = self._outbox.next_batch(
            files=back and self._no_files.not_before <= now, others=back and self._schedule.due <= now
        )
        if not batch:  # all its records were damaged
            return
        record = dataclasses.replace(batch[0], points=[point for record in batch for point in record.points])
        try:
            self._store.deliver(record)
        except transient_errors() as trouble:
            if not self._is_refused(record, trouble):
                self._back_off(record, trouble)
                return
        else:
            self._refused.discard((record.kind, record.run_key))
            self._away.end()
            if record.kind == "file":
                self._no_files.end()
        with self._outbox.changed:
            self._outbox.mark_sent(batch)
            self._gather_again()
            self._report_recovery()

    def _is_refused(self, record: Record, trouble: BaseException) -> bool:
        """Whether the store rejects the record permanently. Log the first rejection per kind and run."""
        if record.kind == "open" or getattr(trouble, "error_code", "") not in REFUSALS:
            return False
        if (record.kind, record.run_key) not in self._refused:
            text = "%s did not take %s '%s' of %s (%s). Training continues without it there."
            cause = describe(trouble, self._store.uri)
            _log.warning(text, self._store.name, record.kind, record.name, record.run_key, cause)
        self._refused.add((record.kind, record.run_key))
        return True

    def _back_off(self, record: Record, trouble: BaseException) -> None:
        """Pause after a failure, and announce the first one of an outage.

        If only the artifact store is unavailable, points are still sent.
        """
        cause = str(trouble).rstrip(".") if isinstance(trouble, UserError) else describe(trouble, self._store.uri)
        outage = self._away
        text = (
            "%s is unavailable or refuses requests (%s). Training continues; points are kept and sent when it is back. "
            "Check the server, and the address in tracking.uri or MLFLOW_TRACKING_URI."
        )
        if isinstance(trouble, UserError):
            text = "records for %s are pending: %s. Training continues, and keeps them."
        elif record.kind == "file" and self._store.answers():
            outage, text = self._no_files, "%s accepts points but no files (%s). Training continues; files are kept."
        self.last_failure = cause
        with self._outbox.changed:
            outage.lengthen(self._schedule.longest_pause)
        if not outage.announced:
            outage.announced = True
            self._announce(text, self._store.name, cause)

    def _report_recovery(self) -> None:
        """Announce the end of an outage once all records pending from it are sent."""
        files, others = self._outbox.waits()
        if self._away.announced and not others and (not files or self._no_files.announced):
            self._away.announced = False
            self._announce("%s is back: all pending records are sent", self._store.name)
        if self._no_files.announced and not files:
            self._no_files.announced = False
            self._announce("%s accepts files again: all that waited are sent", self._store.name)
