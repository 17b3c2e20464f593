"""Checks the disk space that a run needs on this machine, and the disk of its shard cache.

Probes are removed afterwards; nothing else is written.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirl_dist.cli.doctor.machine import Finding, format_bytes
from mirl_dist.cli.doctor.memory import Size
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import nearest_existing, shard_cache_folder
from mirl_dist.config.schema import StoreSection
from mirl_dist.config.schema_training import DataSection
from mirl_dist.data.shards import Shards
from mirl_dist.storage import Folder, Store, open_store
from mirl_dist.storage.configured import options_of

_NETWORK_FILE_SYSTEM = re.compile(r"nfs|lustre|gpfs|beegfs|cifs|smb|ceph|gluster|9p|fuse\.(sshfs|ceph)")


def store_of(section: StoreSection, address: str) -> Store:
    """Open a store without retries, so that checks do not wait for an unavailable server."""
    return open_store(address, replace(options_of(section), patience_seconds=0.0))


@contextmanager
def probe_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary empty folder inside the folder, or inside its nearest existing parent."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=nearest_existing(folder)) as probe:
        yield Path(probe)


def cache_folder(section: DataSection) -> Path | None:
    """Return the folder of this node's shard cache; None if shards are read in place."""
    is_remote = section.shards.startswith(("s3://", "http://", "https://"))
    return shard_cache_folder(section.cache.folder) if is_remote or section.cache.folder else None


def check_cache(folder: Path | None, mounts: Sequence[Any]) -> Finding:
    """Check that the shard cache is writable and on a local disk. mounts: all mounts, as listed by psutil."""
    if folder is None:
        return Finding("ok", "shard cache", "none: shards are read in place")
    try:
        with probe_folder(folder) as probe:
            (probe / "probe").write_bytes(b"probe")
    except OSError as error:
        text = f"{folder}: {error.strerror}; correct the rights, make room, or set data.cache.folder."
        return Finding("FAULT", "shard cache", text)
    kind = file_system_type(nearest_existing(folder), mounts)
    if _NETWORK_FILE_SYSTEM.match(kind):
        text = f"{folder} lies on {kind}, which may not keep locks; set data.cache.folder to a disk of the node."
        return Finding("warning", "shard cache", text)
    return Finding("ok", "shard cache", f"{folder}, on {kind or 'a disk of this node'}")


def file_system_type(folder: Path, mounts: Sequence[Any]) -> str:
    """Return the type of the file system that contains a folder; '' if no mount contains it."""
    # Reversed, because a later mount hides an earlier one at the same mount point.
    around = [mount for mount in reversed(mounts) if folder.is_relative_to(mount.mountpoint)]
    return str(max(around, key=lambda mount: len(mount.mountpoint)).fstype) if around else ""


def _space_needs(config: Config, size: Size, shards: Shards | None) -> Iterator[tuple[str, Path, int]]:
    """Yield what will still be written on this machine: its name, its folder, and an upper bound of its bytes."""
    store, cache = store_of(config.store, config.run.folder), cache_folder(config.data)
    if isinstance(store, Folder):
        # float32 weights; in each commit also two float32 moments; in each mask a bit per prunable weight
        weights, mask = 4 * size.weights, -(-size.prunable // 8)
        commits = (config.checkpoint.keep_last + 1) * (3 * weights + mask)
        rounds = (config.prune.rounds + 1) * (weights + mask)
        initial = weights * (2 if config.rewinds_to() == "step" else 1)
        folder = Path(store.where()).expanduser()
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield f"the run in {folder}", folder, max(0, commits + rounds + initial - used)
    if cache is not None and shards is not None:
        all_bytes = sum(shard.bytes for shard in shards.manifest.shards)
        needed = min(all_bytes, int(config.data.cache.gigabytes * 1e9))
        used = sum(path.stat().st_size for path in cache.glob("*.tar"))
        yield f"the shard cache in {cache}", cache, max(0, needed - used)


def check_space(config: Config, size: Size, shards: Shards | None) -> Iterator[Finding]:
    """Check that each disk has space for all that will be written to it. shards: None if they cannot be read."""
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for need in _space_needs(config, size, shards):
        disks.setdefault(os.stat(nearest_existing(need[1])).st_dev, []).append(need)
    for needs in disks.values():
        free = shutil.disk_usage(nearest_existing(needs[0][1])).free
        missing = sum(needed for _, _, needed in needs) - free
        text = " and ".join(f"{what} needs {format_bytes(needed)}" for what, _, needed in needs)
        text += f", free are {format_bytes(free)}"
        if missing > 0:
            text += f": make room for {format_bytes(missing)}, or choose another disk."
        yield Finding("FAULT" if missing > 0 else "ok", "disk", text)
