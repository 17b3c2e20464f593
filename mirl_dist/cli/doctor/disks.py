"""Checks the disk space that a run needs on this machine, and the disk of its shard cache.

Probes are removed afterwards; nothing else is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mirl_dist.cli.doctor.machine import Finding, format_bytes
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import shard_cache_folder
from mirl_dist.config.schema import StoreSection
from mirl_dist.config.schema_training import DataSection
from mirl_dist.data.shards import Shards
from mirl_dist.storage import Folder, Store, open_store
from mirl_dist.storage.configured import options_of

_NETWORK_FILE_SYSTEMS = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "smb",
    "ceph",
    "gluster",
    "9p",
    "fuse.sshfs",
    "fuse.ceph",
)


class SpaceNeed(NamedTuple):
    """Bytes that will be written below a folder of this machine."""

    what: str
    folder: Path
    bytes: int


def store_of(section: StoreSection, address: str) -> Store:
    """Open a store without retries, so that checks do not wait for an unavailable server."""
    return open_store(address, replace(options_of(section), patience_seconds=0.0))


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing parent."""
    absolute = folder.expanduser().absolute()
    return next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))


@contextmanager
def probe_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary empty folder inside the folder, or inside its nearest existing parent."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=nearest_existing(folder)) as probe:
        yield Path(probe)


def cache_folder(section: DataSection) -> Path | None:
    """Return the folder of this node's shard cache; None if shards are read in place."""
    is_remote = section.shards.startswith(("s3://", "http://", "https://"))
    return shard_cache_folder(section.cache.folder) if is_remote or section.cache.folder else None


def check_cache(folder: Path | None, mounts: Sequence[Any]) -> Iterator[Finding]:
    """Check that the shard cache is writable and on a local disk. mounts: all mounts, as listed by psutil."""
    if folder is None:
        yield Finding("ok", "shard cache", "none: shards are read in place")
        return
    try:
        with probe_folder(folder) as probe:
            (probe / "probe").write_bytes(b"probe")
    except OSError as error:
        text = f"{folder}: {error.strerror}; correct the rights, make room, or set data.cache.folder."
        yield Finding("FAULT", "shard cache", text)
        return
    kind = file_system_type(nearest_existing(folder), mounts)
    if kind.startswith(_NETWORK_FILE_SYSTEMS):
        text = f"{folder} lies on {kind}, which may not keep locks; set data.cache.folder to a disk of the node."
        yield Finding("warning", "shard cache", text)
    else:
        yield Finding("ok", "shard cache", f"{folder}, on {kind or 'a disk of this node'}")


def file_system_type(folder: Path, mounts: Sequence[Any]) -> str:
    """Return the type of the file system that contains a folder; '' if no mount contains it."""
    # Reversed, because a later mount hides an earlier one at the same mount point.
    around = [mount for mount in reversed(mounts) if folder.is_relative_to(mount.mountpoint)]
    return str(max(around, key=lambda mount: len(mount.mountpoint)).fstype) if around else ""


def run_bytes(config: Config, weights: int, prunable: int) -> int:
    """Return an upper bound of the bytes that a whole run writes to its folder.

    Counts float32 weights, two float32 moments in each commit, and one bit per prunable weight in each mask.
    """
    mask, rounds = -(-prunable // 8), config.prune.rounds + 1
    commits = (config.checkpoint.keep_last + 1) * (12 * weights + mask)
    initial = 4 * weights * (2 if config.rewinds_to() == "step" else 1)
    return commits + rounds * (4 * weights + mask) + initial


def run_space(config: Config, weights: int, prunable: int) -> Iterator[SpaceNeed]:
    """Yield the space that the run will still need, if its folder is on this machine."""
    store = store_of(config.store, config.run.folder)
    if isinstance(store, Folder):
        folder = Path(store.where()).expanduser()
        used_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield SpaceNeed(f"the run in {folder}", folder, max(0, run_bytes(config, weights, prunable) - used_bytes))


def cache_space(section: DataSection, shards: Shards | None) -> Iterator[SpaceNeed]:
    """Yield the space that the shard cache will still need. shards: None if they cannot be read."""
    folder = cache_folder(section)
    if folder is not None and shards is not None:
        all_bytes = sum(shard.bytes for shard in shards.manifest.shards)
        needed_bytes = min(all_bytes, int(section.cache.gigabytes * 1e9))
        used_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
        yield SpaceNeed(f"the shard cache in {folder}", folder, max(0, needed_bytes - used_bytes))


def check_space(needs: Sequence[SpaceNeed]) -> Iterator[Finding]:
    """Check that each disk has space for everything that will be written to it."""
    disks: dict[int, list[SpaceNeed]] = {}
    for need in needs:
        disks.setdefault(os.stat(nearest_existing(need.folder)).st_dev, []).append(need)
    for on_disk in disks.values():
        free = shutil.disk_usage(nearest_existing(on_disk[0].folder)).free
        needed = sum(need.bytes for need in on_disk)
        text = " and ".join(f"{need.what} needs {format_bytes(need.bytes)}" for need in on_disk)
        text += f", free are {format_bytes(free)}"
        if free < needed:
            text = f"{text}: make room for {format_bytes(needed - free)}, or choose another disk."
            yield Finding("FAULT", "disk", text)
        else:
            yield Finding("ok", "disk", text)
