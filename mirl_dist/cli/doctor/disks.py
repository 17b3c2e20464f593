"""What a run is to take on this machine's disks, and on what kind of disk its shards' cache would lie.

Probes are gone afterwards; nothing else is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mirl_dist.cli.doctor.machine import Finding, sized
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import shard_cache_folder
from mirl_dist.data.shards import Shards
from mirl_dist.storage import Folder, Store, open_store
from mirl_dist.storage.configured import options_of

_NETWORKED = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "gluster", "9p", "fuse.sshfs", "fuse.ceph")


class SpaceNeed(NamedTuple):
    """Bytes that something is to take below a folder of this machine."""

    what: str
    folder: Path
    bytes: int


def store_of(config: Config, address: str) -> Store:
    """The store that a config names, asked once: a doctor does not wait."""
    return open_store(address, replace(options_of(config.store), patience_seconds=0.0))


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    here = folder.expanduser().absolute()
    return next(path for path in (here, *here.parents) if os.path.lexists(path))


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """An empty folder for a moment, in the folder or in the nearest one above it that is there."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing(folder)) as here:
        yield Path(here)


def cache_folder(config: Config, shards: str) -> Path | None:
    """Where this node would keep the shards of an address; None where they are read in place."""
    if config.data.cache.folder is not None:
        return Path(config.data.cache.folder).expanduser()
    return shard_cache_folder() if shards.startswith(("s3://", "http://", "https://")) else None


def cache(folder: Path | None, mounts: str) -> Iterator[Finding]:
    """Whether the shards' cache can lie where it is to. mounts: as /proc/mounts says them."""
    if folder is None:
        yield Finding("ok", "shard cache", "none: shards are read in place")
        return
    try:
        with beside(folder) as here:
            (here / "probe").write_bytes(b"probe")
    except OSError as error:
        text = f"{folder}: {error.strerror}; correct the rights, make room, or set data.cache.folder."
        yield Finding("FAULT", "shard cache", text)
        return
    kind = kind_of_disk(existing(folder), mounts)
    if kind.startswith(_NETWORKED):
        text = f"{folder} lies on {kind}, which may not keep locks; set data.cache.folder to a disk of the node."
        yield Finding("warning", "shard cache", text)
    else:
        yield Finding("ok", "shard cache", f"{folder}, on {kind or 'a disk of this node'}")


def kind_of_disk(folder: Path, mounts: str) -> str:
    """The kind of file system that a folder lies on; '' where the mounts do not say."""
    best, kind = "", ""
    for line in mounts.splitlines():
        _, place, name, *_ = [*line.split(), "", "", ""]
        place = place.replace("\\040", " ")
        if folder.is_relative_to(place or "/nowhere") and len(place) >= len(best):
            best, kind = place, name
    return kind


def run_bytes(config: Config, weights: int, prunable: int) -> int:
    """What a whole run takes in its folder at most: float32 weights, two moments in commits, a bit a mask."""
    mask, rounds = -(-prunable // 8), config.prune.rounds + 1
    commits = (config.checkpoint.keep_last + 1) * (12 * weights + mask)
    first = 4 * weights * (2 if config.rewinds_to() == "step" else 1)
    return commits + rounds * (4 * weights + mask) + first


def run_room(config: Config, weights: int, prunable: int) -> Iterator[SpaceNeed]:
    """What the run is yet to take, where its folder is one of this machine."""
    store = store_of(config, config.run.folder)
    if isinstance(store, Folder):
        folder = Path(store.where()).expanduser()
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield SpaceNeed(f"the run in {folder}", folder, max(0, run_bytes(config, weights, prunable) - held))


def cache_room(config: Config, folder: Path | None, there: Shards | None) -> Iterator[SpaceNeed]:
    if folder is not None and there is not None:
        wanted = min(sum(shard.bytes for shard in there.manifest.shards), int(config.data.cache.gigabytes * 1e9))
        held = sum(path.stat().st_size for path in folder.glob("*.tar"))
        yield SpaceNeed(f"the shard cache in {folder}", folder, max(0, wanted - held))


def rooms(wanted: Sequence[SpaceNeed]) -> Iterator[Finding]:
    """Whether each disk has room for all that is to lie on it."""
    disks: dict[int, list[SpaceNeed]] = {}
    for room in wanted:
        disks.setdefault(os.stat(existing(room.folder)).st_dev, []).append(room)
    for those in disks.values():
        free = shutil.disk_usage(existing(those[0].folder)).free
        needed = sum(room.bytes for room in those)
        text = " and ".join(f"{room.what} needs {sized(room.bytes)}" for room in those) + f", free are {sized(free)}"
        if free < needed:
            text = f"{text}: make room for {sized(needed - free)}, or choose another disk."
            yield Finding("FAULT", "disk", text)
        else:
            yield Finding("ok", "disk", text)
