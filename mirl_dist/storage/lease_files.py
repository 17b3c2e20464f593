"""The files of a run's lease: their names and content, and whether the process that they name has exited.

    lease/00000004.json            the claim of generation 4: which process, on which host, since when
    lease/00000004.beat.json       the holder's heartbeat: rewritten periodically, each time with different bytes
    lease/00000004.released.json   the release: how the holder ended

Files with foreign names are ignored; a damaged file is read as an empty one.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

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
    """Return the newest claimed generation, from 1; 0 if there is none."""
    matches = [_NAME.fullmatch(name) for name in store.list(FOLDER)]
    return max((int(match[1]) for match in matches if match and not match[2]), default=0)


def remove_before(store: Store, generation: int) -> None:
    """Delete the lease files of all generations below `generation`; keep files with other names."""
    for name in store.list(FOLDER):
        match = _NAME.fullmatch(name)
        if match and int(match[1]) < generation:
            store.remove(name)


# -- content ----------------------------------------------------------------------------------------------------------


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("not printable")
    return text


_Text = Annotated[str, Field(max_length=255), AfterValidator(_check_printable)]


class _Status(BaseModel):
    """Content of a heartbeat, or of a release, where `why` states how the launch ended."""

    model_config = ConfigDict(strict=True)
    at: _Text = ""
    running_seconds: Annotated[float, Field(ge=0, lt=1e10)] | None = None
    news: dict[str, Any] = {}
    token: _Text = ""
    why: _Text = ""


class Holder(BaseModel):
    """A launch that holds or held a run, as read from its lease files; a damaged or missing file leaves defaults.

    started_at, beat_at: ISO 8601 by the holder's clock, for display only. beat_at, status, running_seconds (since its
    start): from the last heartbeat, or from the release. ended: 'finished', 'stopped' or 'failed' as released; 'dead'
    or 'silent' as found by the next launch; None if it may be alive. beat: bytes of the last heartbeat; a change shows
    that the holder wrote again.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    host: _Text = ""
    pid: PositiveInt | None = None
    process_started: PositiveInt | None = None
    boot: _Text | None = None
    pids: PositiveInt | None = None
    token: _Text = ""
    started_at: _Text = ""
    launch: dict[str, Any] = {}
    # Not in the claim; set by `read_holder`:
    generation: int = 0
    running_seconds: float | None = None
    beat_at: str = ""
    status: dict[str, Any] = {}
    ended: str | None = None
    beat: bytes = b""

    def __str__(self) -> str:
        return f"{self.host or 'an unknown host'}, pid {self.pid or 'unknown'}"

    @property
    def machine(self) -> Machine | None:
        return Machine(self.boot, self.pids) if self.boot and self.pids else None

    def has_exited(self) -> bool:
        """Whether its process is known to have exited; False if it ran on another machine or is unknown."""
        if self.machine is None or self.pid is None or self.process_started is None:
            return False
        return self.machine == this_machine() and has_exited(self.pid, self.process_started)


_File = TypeVar("_File", _Status, Holder)


def _parse(cls: type[_File], data: bytes) -> _File:
    try:
        return cls.model_validate_json(data)
    except ValidationError:
        return cls()


def read_holder(store: Store) -> Holder | None:
    """Return the last launch that claimed the run, alive or not; None if the run was never claimed. Only reads.

    Raises StorageError if the store is unavailable; that never counts as 'never claimed'.
    """
    generation = newest_generation(store)
    if generation == 0:
        return None
    beat = read_or_empty(store, beat_name(generation))
    claim = _parse(Holder, read_or_empty(store, claim_name(generation)))
    released = _parse(_Status, read_or_empty(store, released_name(generation)))
    ended = released.why or None if released.token == claim.token else None
    last = released if ended else _parse(_Status, beat)
    known = {"running_seconds": last.running_seconds, "beat_at": last.at, "status": last.news}
    return claim.model_copy(update={"generation": generation, "ended": ended, "beat": beat, **known})


def read_or_empty(store: Store, name: str) -> bytes:
    """Return the bytes of `name`; empty if it does not exist."""
    try:
        return store.get(name)
    except NotFound:
        return b""


def claim_bytes(token: str, launch: Mapping[str, Any]) -> bytes:
    """Return the content of this process's claim. token: unique to the launch."""
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
    """Return this machine's time in UTC as ISO 8601, in seconds, for display."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
