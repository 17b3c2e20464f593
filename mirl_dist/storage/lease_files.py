"""The files of a run's lease, what they say of a launch, and whether the process that they name is dead.

    lease/00000004.json            generation 4 is claimed: who, where, since when
    lease/00000004.beat.json       its holder lives: written again and again, each time with other bytes
    lease/00000004.released.json   it has ended, and how

Files that are damaged or foreign say nothing; they break nothing.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from mirl_dist.config.canonical_json import to_json
from mirl_dist.config.process_identity import Machine, has_exited, process_state, this_machine
from mirl_dist.storage import NotFound, Store

FOLDER = "lease"
_NAME = re.compile(rf"{FOLDER}/(\d{{8,}})(\.beat|\.released)?\.json")


def claim_name(generation: int) -> str:
    return f"{FOLDER}/{generation:08d}.json"


def beat_name(generation: int) -> str:
    return f"{FOLDER}/{generation:08d}.beat.json"


def released_name(generation: int) -> str:
    return f"{FOLDER}/{generation:08d}.released.json"


def newest_generation(store: Store) -> int:
    """The newest that is claimed, from 1; 0 where there is none."""
    matches = [_NAME.fullmatch(name) for name in store.list(FOLDER)]
    return max((int(match[1]) for match in matches if match and not match[2]), default=0)


def remove_before(store: Store, generation: int) -> None:
    """Remove the files of all generations below `generation`; what is not ours stays."""
    for name in store.list(FOLDER):
        match = _NAME.fullmatch(name)
        if match and int(match[1]) < generation:
            store.remove(name)


# -- what the files say -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """A launch that holds a run, or held it, as its lease says; empty or None where that is damaged or not there.

    started_at, beat_at: ISO 8601, by that machine's clock, for people. beat_at, status, running_seconds (since it
    started): of its last beat, or of its release. ended: 'finished', 'stopped' or 'failed' as it said itself; 'dead' or
    'silent' as its follower found it; None: it may live. beat: the bytes of its last beat; others are a sign of life.
    """

    generation: int
    host: str
    pid: int | None
    process_started: int | None
    machine: Machine | None
    started_at: str
    launch: Mapping[str, Any]
    running_seconds: float | None
    beat_at: str
    status: Mapping[str, Any]
    ended: str | None
    beat: bytes

    def __str__(self) -> str:
        return f"{self.host or 'an unknown host'}, pid {self.pid or 'unknown'}"

    def has_exited(self) -> bool:
        """Whether its process is known to be dead: it ran on this very machine."""
        if self.machine is None or self.pid is None or self.process_started is None:
            return False
        return self.machine == this_machine() and has_exited(self.pid, self.process_started)


def read_holder(store: Store) -> Holder | None:
    """Who claimed a run last, whether it lives or not; None where nobody ever did. Only reads.

    Raises StorageError where the store does not answer: that is never 'nobody'.
    """
    generation = newest_generation(store)
    if generation == 0:
        return None
    beat = read_or_empty(store, beat_name(generation))
    claimed = _parse_object(read_or_empty(store, claim_name(generation)))
    released = _parse_object(read_or_empty(store, released_name(generation)))
    ended = _printable(released.get("why")) or None if released.get("token") == claimed.get("token") else None
    last = released if ended else _parse_object(beat)
    boot, pids = _printable(claimed.get("boot")), _positive_int(claimed.get("pids"))
    running = last.get("running_seconds")
    return Holder(
        generation,
        host=_printable(claimed.get("host")),
        pid=_positive_int(claimed.get("pid")),
        process_started=_positive_int(claimed.get("process_started")),
        machine=Machine(boot, pids) if boot and pids else None,
        started_at=_printable(claimed.get("started_at")),
        launch=_mapping(claimed.get("launch")),
        running_seconds=float(running) if isinstance(running, int | float) and 0 <= running < 1e10 else None,
        beat_at=_printable(last.get("at")),
        status=_mapping(last.get("news")),
        ended=ended,
        beat=beat,
    )


def read_or_empty(store: Store, name: str) -> bytes:
    """The bytes of `name`; none where it does not exist."""
    try:
        return store.get(name)
    except NotFound:
        return b""


def claim_bytes(token: str, launch: Mapping[str, Any]) -> bytes:
    """What this process writes to claim a generation. token: unlike that of any other launch."""
    machine, process = this_machine(), process_state(os.getpid())
    return to_json(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": process.started if process else None,
            "boot": machine.boot if machine else None,
            "pids": machine.pid_namespace if machine else None,
            "token": token,
            "started_at": utc_now(),
            "launch": dict(launch),
        },
        default=str,
    )


def utc_now() -> str:
    """For people: the time of this machine's clock, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        return _mapping(json.loads(data))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _printable(value: Any) -> str:
    """A short text that can be shown; '' for all else."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 255 else ""


def _positive_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
