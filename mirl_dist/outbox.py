"""What waits to be told to a tracking store: items in order, bounded in memory, tried again after a failure.

No store is known here. Runs go by our own names ("run", "round/03") and an item holds plain values only, so
that the outbox can become a journal on disk. Texts are made fit for MLflow 3, with no password in them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import unquote, urlsplit

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 300.0
TRIES_PER_FILE = 3
OUTBOX_BYTES, POINT_BYTES = 64 * 2**20, 200  # what may wait in memory; one point, roughly
POINTS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # MLflow's limits, as are the next three (characters)
LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000

_log = logging.getLogger("mirl_dist.tracking")


@dataclass(eq=False)
class Item:
    """One thing to deliver."""

    do: str  # open, params, points, ticket, file or end
    where: str  # "run" or "round/03"
    name: str = ""  # of a run or a file; the status for "end"
    texts: dict[str, str] = field(default_factory=dict)  # tags or params
    points: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, time in ms, step
    data: bytes = b""
    at_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    tries: int = 0


class Store(Protocol):
    """Where items go. `deliver` must bear the same item twice."""

    name: str  # for people, without secrets

    def deliver(self, item: Item) -> None: ...
    def troubles(self) -> tuple[type[BaseException], ...]: ...
    def told(self, trouble: BaseException) -> str: ...
    def final(self, trouble: BaseException) -> bool: ...
    def answers(self) -> bool: ...


class Outbox:
    """Items in the order of their making; when too much waits, the oldest points and files are forgotten."""

    def __init__(self, store: Store) -> None:
        self.items: deque[Item] = deque()
        self._store = store
        self._forgotten = 0
        self._away, self._pause, self._not_before = False, 0.0, 0.0

    def put(self, item: Item) -> None:
        self.items.append(item)

    def put_points(self, do: str, where: str, values: list[tuple[str, float, int]]) -> None:
        """Add (name, value, step) under one time, joined to the last item where the batch limit allows.

        Values that are not finite are left out: MLflow would draw infinity as 1.8e308.
        """
        now = time.time_ns() // 1_000_000
        points = [(legal_name(n), float(v), now, step) for n, v, step in values if math.isfinite(v)]
        tail = self.items[-1] if self.items else None
        same = tail is not None and (tail.do, tail.where) == (do, where)
        if tail and same and len(tail.points) + len(points) <= POINTS_PER_CALL:
            tail.points += points
            return
        for start in range(0, len(points), POINTS_PER_CALL):
            self.put(Item(do, where, points=points[start : start + POINTS_PER_CALL]))

    def deliver(self, *, at_once: bool) -> None:
        """Deliver in order until nothing waits or the store fails; without `at_once`, not during a pause."""
        if at_once or time.monotonic() >= self._not_before:
            while self.items:
                try:
                    self._store.deliver(self.items[0])
                except self._store.troubles() as trouble:
                    if self._must_wait(self.items[0], trouble):
                        break
                self.items.popleft()
            else:
                self._away, self._pause, self._not_before = False, 0.0, 0.0
        self._forget_oldest()

    def _must_wait(self, item: Item, trouble: BaseException) -> bool:
        """Whether a failed item stays; the first failure of an outage and each refusal are told."""
        if item.do == "file" and self._store.answers():
            item.tries += 1
        refused = item.do != "open" and self._store.final(trouble)
        if refused or item.tries >= TRIES_PER_FILE:
            _log.warning(
                "%s did not take %s '%s' of %s (%s). Training goes on without it there.",
                *(self._store.name, item.do, item.name, item.where, self._store.told(trouble)),
            )
            return False
        if not self._away:
            _log.warning(
                "%s is away or refuses (%s). Training goes on; points are kept and sent when it is back. "
                "Check the server, and the address in tracking.uri or MLFLOW_TRACKING_URI.",
                *(self._store.name, self._store.told(trouble)),
            )
        self._away = True
        self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._not_before = time.monotonic() + self._pause
        if item.do == "file":  # the place for files may be away alone: let points pass
            self.items.rotate(-1)
        return True

    def _forget_oldest(self) -> None:
        sizes = [(item, POINT_BYTES * len(item.points) + len(item.data)) for item in self.items]
        total = sum(size for _, size in sizes)
        for item, size in sizes:
            if total > OUTBOX_BYTES and size:
                if not self._forgotten:
                    _log.warning("too much waits for %s: the oldest is being forgotten", self._store.name)
                self.items.remove(item)
                self._forgotten += len(item.points) or 1
                total -= size

    def __str__(self) -> str:
        points = sum(len(item.points) for item in self.items)
        text = f"{points} points and {sum(not item.points for item in self.items)} other records wait"
        return text + (f" and {self._forgotten} were forgotten" if self._forgotten else "")


def flat(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested params as {'a.b': text}; numbers, lists, true, false and null as JSON writes them."""
    texts: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            texts |= flat(value, f"{prefix}{name}.")
        else:
            texts[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return texts


def legal_name(name: str) -> str:
    """A name that MLflow takes for a metric, param or tag: letters, digits, _ - . / space, 250 at most."""
    parts = re.sub(r"[^/\w.\- ]", "_", name)[:LONGEST_NAME].split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "_"


def shown(uri: str) -> str:
    """A tracking URI without password, token and query (for web addresses without user name as well)."""
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    if parts.scheme in ("http", "https"):
        user, at = "", ""
    return f"{parts.scheme}://{user.partition(':')[0]}{at}{host}{parts.path}" if parts.scheme else uri


def masked(text: str, uri: str) -> str:
    """A text without the secrets of the tracking URI, of MLflow's environment, and of any address in it."""
    parts = urlsplit(uri)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    token = user if not password and parts.scheme in ("http", "https") else ""
    environment = [os.environ.get(f"MLFLOW_TRACKING_{word}", "") for word in ("PASSWORD", "TOKEN")]
    text = re.sub(r"(\w://)[^/\s@]+@", r"\1***@", text.replace(uri, shown(uri)))
    for secret in (password, unquote(password), token, parts.query, *environment):
        if len(secret) > 3:  # shorter ones would garble every word
            text = text.replace(secret, "***")
    return text
