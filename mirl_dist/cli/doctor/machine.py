"""Checks what a launch needs on this machine: number of ranks, port, devices, engine, limits and disks.

Starts nothing. Probes on disks are removed afterwards; nothing else is written.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import psutil
import torch

from mirl_dist.cli.doctor.memory import GIB, Size
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import nearest_existing, shard_cache_folder
from mirl_dist.config.schema import StoreSection
from mirl_dist.config.schema_training import DataSection
from mirl_dist.data.sampler import BatchSplit, ranks_in_words, split_batch
from mirl_dist.data.shards import Shards
from mirl_dist.distributed import environment, hardware
from mirl_dist.distributed.engines.spec import require
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, Store, open_store
from mirl_dist.storage.configured import options_of

_MASTER_SECONDS = 3.0
_OPEN_FILES = 1024
_NETWORK_FILE_SYSTEM = re.compile(r"nfs|lustre|gpfs|beegfs|cifs|smb|ceph|gluster|9p|fuse\.(sshfs|ceph)")


class Finding(NamedTuple):
    """The result of one check. kind: 'FAULT' if the run would fail because of it. text: what was found, what to do."""

    kind: Literal["ok", "warning", "FAULT"]
    about: str
    text: str

    def line(self) -> str:
        return f"{self.kind:8} {self.about:12} {self.text}"


def run_check(about: str, check: Callable[[], str]) -> Finding:
    """Return the finding of a check that returns what it found, or raises UserError for a fault."""
    try:
        return Finding("ok", about, check())
    except UserError as fault:
        return Finding("FAULT", about, str(fault))


def format_bytes(size: int) -> str:
    """Format a number of bytes with decimal units, as disk sizes are given."""
    return f"{size / 1e9:.3g} GB" if size >= 10**8 else f"{size / 1e6:.3g} MB"


def split_in_words(ranks: int, split: BatchSplit, what: str = "pass") -> str:
    """Return '2 ranks x 1 pass x 4 samples'."""
    passes = f"{split.passes} {what if split.passes == 1 else f'{what}es'}"
    return f"{ranks_in_words(ranks)} x {passes} x {split.forward} samples"


def check_world(config: Config, launch_file: LaunchFile, env: Mapping[str, str]) -> Iterator[Finding]:
    """Check that the ranks can split the global batch, and that the environment does not belong to another launch."""
    batch, ranks = config.batch, launch_file.ranks

    def check_split() -> str:
        split = split_batch(batch.global_, batch.forward, ranks)
        return f"{split_in_words(ranks, split)} = batch.global {batch.global_}"

    yield run_check("world", check_split)
    if names := ", ".join(environment.foreign_variables(env)):
        yield Finding("warning", "environment", f"{names} set, for another launch: --launch ignores them; unset them.")
    try:
        environment.check_interfaces(env, nccl=hardware.gpus_for(config.train.device) > 0)
    except UserError as fault:
        yield Finding("FAULT", "environment", str(fault))


def check_port(launch_file: LaunchFile) -> Iterator[Finding]:
    """Check the rendezvous: the port is free on node 0, and reachable from the other nodes."""
    address, port = launch_file.address, launch_file.port
    if address is not None:
        try:
            sockets = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        except OSError as error:
            text = f"{address} has no address ({error.strerror}); correct main_process_ip, or the name service."
            yield Finding("FAULT", "address", text)
            return
        if launch_file.node_rank != 0:
            try:
                socket.create_connection((address, int(port or 0)), timeout=_MASTER_SECONDS).close()
                yield Finding("ok", "port", f"{address}:{port} answers")
            except OSError as error:
                text = f"{address}:{port} does not answer ({error.strerror or 'no time'})"
                yield Finding("warning", "port", f"{text}; start node 0, or open the port between nodes.")
            return
        # An address is of this machine if a socket can bind to it.
        if all(_bind_error(family, (place[0], 0)) == errno.EADDRNOTAVAIL for family, _, _, _, place in sockets):
            text = f"{address} is no address of this machine, which is node 0; is machine_rank right?"
            yield Finding("warning", "address", text)
    if not port:
        yield Finding("ok", "port", "chosen when ranks start")
    elif _bind_error(socket.AF_INET, ("", port)) is None:
        yield Finding("ok", "port", f"{port} is free here")
    else:
        text = f"{port} is in use on this machine; give another main_process_port"
        yield Finding("FAULT", "port", f"{text}{', or 0: any' if launch_file.nodes == 1 else ''}.")


def _bind_error(family: int, place: tuple[object, int]) -> int | None:
    """Return the error number of binding a socket to (host, port), or None. Closing connections do not count."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's TCPStore
        try:
            probe.bind(place)
        except OSError as error:
            return error.errno
    return None


def check_devices(config: Config, launch_file: LaunchFile, needed: int | None) -> Iterator[Finding]:
    """Check that each rank of this node has a GPU with `needed` free bytes (None: unknown), and the ranks' backend."""
    count = launch_file.ranks_per_node
    gpus = hardware.gpus_for(config.train.device)
    placement = f"{ranks_in_words(count)} on {hardware.processes()} processors"
    if config.train.device == "cpu":
        yield Finding("ok", "devices", f"train.device cpu: {placement}")
    elif not gpus and config.train.device == "cuda":
        yield Finding("FAULT", "devices", hardware.choose_device("cuda").fault)
    elif not gpus:
        text = f"no GPU here ({hardware.why_no_cuda()}): {placement}; call this on the node that is to train."
        yield Finding("warning", "devices", text)
    elif gpus < count:
        text = f"{ranks_in_words(count)} per node, but {gpus} GPUs here"
        yield Finding("FAULT", "devices", f"{text}; lower num_processes, or show more GPUs to this process.")
    else:
        free, least = [torch.cuda.mem_get_info(number)[0] for number in range(count)], needed or 0
        if full := ", ".join(f"GPU {n} ({f / GIB:.1f} GiB)" for n, f in enumerate(free) if f < least):
            text = f"a rank needs about {least / GIB:.1f} GiB, free are {full}"
            yield Finding("FAULT", "devices", f"{text}; lower batch.forward, or end what runs there.")
        else:
            text = f"{count} x {torch.cuda.get_device_name(0)}, {min(free) / GIB:.1f} GiB free on the fullest"
            yield Finding("ok", "devices", text)
    backend = "nccl" if gpus else "gloo"
    if launch_file.ranks > 1 and not hardware.backends().get(backend):
        yield Finding("FAULT", "backend", f"this torch has no {backend}; install a torch that is built with it.")


def check_engine(launch_file: LaunchFile) -> Finding:
    """Check that the packages for the engine of a launch file are installed."""
    try:
        return Finding("ok", "engine", require(launch_file.engine))
    except LookupError as error:
        return Finding("FAULT", "engine", str(error))


def check_limits(config: Config, launch_file: LaunchFile, shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check the shared memory for batches of loader processes, and the limit on open files."""
    per_rank, workers = -(-config.batch.global_ // launch_file.ranks), config.data.workers
    needed = launch_file.ranks_per_node * workers * 3 * per_rank * 6 * 4 * config.data.patch_pixels**2
    if workers and shm.is_dir():
        free = shutil.disk_usage(shm).free
        text = f"{format_bytes(free)} of {shm} free, loader processes pass on about {format_bytes(needed)}"
        if free < needed:
            yield Finding("FAULT", "memory", f"{text}; enlarge it (docker: --shm-size), or lower data.workers.")
        else:
            yield Finding("ok", "memory", text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES:
        most = "any number" if hard == resource.RLIM_INFINITY else hard
        text = f"{soft} open files per process are few; ulimit -n {_OPEN_FILES} or more ({most} allowed)."
        yield Finding("warning", "open files", text)


def check_host_memory(needed: int, launch_file: LaunchFile) -> Iterator[Finding]:
    """Check the host memory for what the engine offloads to it. needed: bytes per rank."""
    if needed:
        limits = memory_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
        total, offloaded = min([psutil.virtual_memory().total, *limits]), needed * launch_file.ranks_per_node
        text = f"{format_bytes(offloaded)} offloaded by {ranks_in_words(launch_file.ranks_per_node)}"
        text += f", of {format_bytes(total)} here"
        if offloaded < total:
            yield Finding("ok", "host memory", text)
        else:
            yield Finding("FAULT", "host memory", f"{text}; leave out the offload, or start fewer ranks per node.")


def memory_limits(groups: Path, root: Path) -> list[int]:
    """Return the memory limits, in bytes, of a process's control groups and their ancestors.

    Reads memory.max, or memory.limit_in_bytes in cgroup v1. groups: as /proc/self/cgroup. root: as /sys/fs/cgroup.
    """
    limits = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        own_group = PurePosixPath("/", *(part for part in path.split("/") if part != ".."))
        for group in (own_group, *own_group.parents):
            try:
                limit = (top / str(group).lstrip("/") / name).read_text().strip()
            except OSError:  # not visible in this container, or without a limit
                continue
            limits += [int(limit)] if limit.isdecimal() else []
    return limits


# -- disks --------------------------------------------------------------------------------------------------------


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
        text = f"{folder} is on {kind}, which may not support file locks; set data.cache.folder to a local disk."
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
        folder = Path(store.where())
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
