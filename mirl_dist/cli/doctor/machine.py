"""What a launch needs of this machine: ranks that add up, a port, devices, engines, limits. Nothing is started."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import torch

from mirl_dist.cli.doctor.memory import GIB
from mirl_dist.config.config import Config
from mirl_dist.data.sampler import ranks_in_words, split_batch
from mirl_dist.distributed import hardware
from mirl_dist.distributed.engines import requirements
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.errors import UserError

_LAUNCHED = ("RANK", "LOCAL_RANK")
_MASTER_SECONDS = 3.0
_FILES = 1024


class Finding(NamedTuple):
    """One thing that was looked at. kind: 'FAULT' when the run would fail of it; text: what was found, what to do."""

    kind: Literal["ok", "warning", "FAULT"]
    about: str
    text: str

    def line(self) -> str:
        return f"{self.kind:8} {self.about:12} {self.text}"


def sized(size: int) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    return f"{size / 1e9:.3g} GB" if size >= 10**8 else f"{size / 1e6:.3g} MB"


def world(config: Config, said: LaunchFile, env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the ranks can share the global batch, and whether the environment speaks of another launch."""
    try:
        shares = split_batch(config.batch.global_, config.batch.forward, said.ranks)
        passes = "pass" if shares.passes == 1 else "passes"
        text = f"{ranks_in_words(said.ranks)} x {shares.passes} {passes} x {shares.forward} samples"
        yield Finding("ok", "world", f"{text} = batch.global {config.batch.global_}")
    except UserError as fault:
        yield Finding("FAULT", "world", str(fault))
    told = env.get("WORLD_SIZE")
    if told is not None and told != str(said.ranks):
        text = f"WORLD_SIZE={told} is set, {said.path} has {ranks_in_words(said.ranks)}; unset it, or correct the file."
        yield Finding("FAULT", "environment", text)
    elif left := [name for name in _LAUNCHED if name in env]:
        text = f"{' and '.join(left)} set, as inside a launched rank; unset, or call this outside a launch."
        yield Finding("warning", "environment", text)


def port(said: LaunchFile) -> Iterator[Finding]:
    """Whether the ranks can meet: the port free on node 0, which the others reach."""
    here = said.node_rank == 0
    if said.address is not None:
        try:
            found = socket.getaddrinfo(said.address, said.port, type=socket.SOCK_STREAM)
        except OSError as error:
            text = f"{said.address} has no address ({error.strerror}); correct main_process_ip, or the name service."
            yield Finding("FAULT", "address", text)
            return
        if not here:
            yield _answers(said)
            return
        if not any(_is_mine(family, at[0]) for family, _, _, _, at in found):
            text = f"{said.address} is no address of this machine, which is node 0; is machine_rank right?"
            yield Finding("warning", "address", text)
    if not said.port:
        yield Finding("ok", "port", "chosen when ranks start")
    elif _is_free(said.port):
        yield Finding("ok", "port", f"{said.port} is free here")
    else:
        text = f"{said.port} is in use on this machine; give another main_process_port"
        yield Finding("FAULT", "port", f"{text}{', or 0: any' if said.nodes == 1 else ''}.")


def _answers(said: LaunchFile) -> Finding:
    where = f"{said.address}:{said.port}"
    try:
        socket.create_connection((str(said.address), int(said.port or 0)), timeout=_MASTER_SECONDS).close()
    except OSError as error:
        text = f"{where} does not answer ({error.strerror or 'no time'}); start node 0, or open the port between nodes."
        return Finding("warning", "port", text)
    return Finding("ok", "port", f"{where} answers")


def _is_mine(family: int, host: object) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def _is_free(number: int) -> bool:
    """Whether nobody listens there; connections that are closing do not count, as for torch's store."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError:
            return False
    return True


def devices(config: Config, said: LaunchFile, needed: int | None) -> Iterator[Finding]:
    """A GPU for each rank of this node, with room for `needed` bytes (None: unknown), and what connects the ranks."""
    cpu, count = config.train.device == "cpu", said.ranks_per_node
    gpus = 0 if cpu else hardware.gpus()
    if cpu or not gpus:
        where = f"{ranks_in_words(count)} on {hardware.processes()} processors"
        if cpu:
            yield Finding("ok", "devices", f"train.device cpu: {where}")
        else:
            yield Finding("warning", "devices", f"no GPU here: {where}; call this on the node that is to train.")
    elif gpus < count:
        text = f"{ranks_in_words(count)} per node, but {gpus} GPUs here; lower num_processes, or show more GPUs to"
        text += " this process."
        yield Finding("FAULT", "devices", text)
    else:
        yield from _room_on_gpus(count, needed)
    wanted = "nccl" if gpus else "gloo"
    if said.ranks > 1 and not hardware.backends().get(wanted):
        yield Finding("FAULT", "backend", f"this torch has no {wanted}; install a torch that is built with it.")


def _room_on_gpus(count: int, needed: int | None) -> Iterator[Finding]:
    free = [torch.cuda.mem_get_info(number)[0] for number in range(count)]
    least = min(free)
    if needed is None or least >= needed:
        text = f"{count} x {torch.cuda.get_device_name(0)}, {least / GIB:.1f} GiB free on the fullest"
        yield Finding("ok", "devices", text)
        return
    full = ", ".join(f"GPU {n} ({f / GIB:.1f} GiB)" for n, f in enumerate(free) if f < needed)
    text = f"a rank needs about {needed / GIB:.1f} GiB, free are {full}; lower batch.forward, or end what runs there."
    yield Finding("FAULT", "devices", text)


def engine(said: LaunchFile) -> Iterator[Finding]:
    """What the engine of a launch file needs of this environment."""
    try:
        yield Finding("ok", "engine", requirements.require(said.engine))
    except LookupError as error:
        yield Finding("FAULT", "engine", str(error))


def limits(config: Config, said: LaunchFile, shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Shared memory for what loader processes hand over, and open files."""
    per_rank, workers = -(-config.batch.global_ // said.ranks), config.data.workers
    needed = said.ranks_per_node * workers * 3 * per_rank * 6 * 4 * config.data.patch_pixels**2
    if workers and shm.is_dir():
        free = shutil.disk_usage(shm).free
        text = f"{sized(free)} of {shm} free, loader processes pass on about {sized(needed)}"
        if free < needed:
            yield Finding("FAULT", "memory", f"{text}; enlarge it (docker: --shm-size), or lower data.workers.")
        else:
            yield Finding("ok", "memory", text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES:
        most = "any number" if hard == resource.RLIM_INFINITY else hard
        text = f"{soft} open files per process are few; ulimit -n {_FILES} or more ({most} allowed)."
        yield Finding("warning", "open files", text)


def host(needed: int, said: LaunchFile) -> Iterator[Finding]:
    """The machine's memory for what an engine keeps there. needed: bytes per rank."""
    if needed:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        whole = min([whole, *memory_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
        wanted = needed * said.ranks_per_node
        text = f"{sized(wanted)} offloaded by {ranks_in_words(said.ranks_per_node)}, of {sized(whole)} here"
        if wanted < whole:
            yield Finding("ok", "host memory", text)
        else:
            yield Finding("FAULT", "host memory", f"{text}; leave out the offload, or start fewer ranks per node.")


def memory_limits(groups: Path, root: Path) -> list[int]:
    """Bytes that the control groups of a process, and those around them, leave to it: memory.max, or
    memory.limit_in_bytes in version 1. groups: as /proc/self/cgroup; root: as /sys/fs/cgroup."""
    found = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # no Linux
        return []
    for line in lines:
        _, kinds, place = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if kinds else (root, "memory.max")
        here = PurePosixPath("/", *(part for part in place.split("/") if part != ".."))
        for group in (here, *here.parents):
            try:
                said = (top / str(group).lstrip("/") / name).read_text().strip()
            except OSError:  # not of this container's view, or without a limit
                continue
            found += [int(said)] if said.isdecimal() else []
    return found
