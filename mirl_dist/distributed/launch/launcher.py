"""Starts the ranks of `train --launch` and returns their exit code.

torch's launcher runs in a thread. The main thread handles signals: it requests a stop of the ranks, and kills those
that do not exit in time. Launcher and ranks communicate through a ControlChannel.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from mirl_dist.config.config import Config
from mirl_dist.distributed import environment, hardware
from mirl_dist.distributed.launch import elastic, launch_file
from mirl_dist.distributed.launch.control import ControlChannel
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.distributed.signals import INTERRUPTED, RESUMABLE, record_signals
from mirl_dist.errors import UserError
from mirl_dist.observability.console import warn

_POLL_SECONDS = 0.2
_NAME_SECONDS = 60.0
_GRACE_SECONDS = 15.0
"""Extra time for the ranks, which exit by themselves at preempt.deadline_seconds."""
_AUTO_FILE = Path(__file__).with_name("auto.yaml")
_AGAIN = "start the same command again on every node: the run resumes from its last commit"


def choose(config: Config, launch_option: str) -> tuple[LaunchFile, list[str]]:
    """Return the launch file and accelerate's options for this node; no options for one DDP rank in this process.

    launch_option: path of a launch file, or 'auto': one rank per GPU, as many as divide the global batch, or on the CPU
    two if two divides it. Raise UserError for an empty option and as launch_file.read does.
    """
    if launch_option == "auto":
        return _choose_for_machine(config, gpus=hardware.gpus_for(config.train.device))
    if not launch_option.strip():
        raise UserError("--launch: found an empty name. Give a file from launch/, or auto.")
    file = launch_file.read(Path(launch_option))
    return file, file.options(config.ranks.timeout_seconds) if file.ranks > 1 or file.engine != "ddp" else []


def launch(config: Config, file: LaunchFile, options: list[str], command: Sequence[str]) -> None:
    """Start this node's ranks of a command; exit with their code if it is not 0.

    All ranks are restarted together after one died, up to `ranks.restarts` times. The caller has checked file and
    config, and closed its signal handlers: this installs others.
    """
    environment.check_interfaces(os.environ, nccl=hardware.gpus_for(config.train.device) > 0)
    arguments = [*options, "--max_restarts", str(config.ranks.restarts), "--monitor_interval", "0.1"]
    arguments += ["-m", "mirl_dist", *command]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, hardware.processes() // file.ranks_per_node)))
    code = attend(arguments, config.ranks.restarts, config.preempt.deadline_seconds, file)
    if code:
        sys.exit(code)


def attend(arguments: list[str], restarts: int, deadline_seconds: float, file: LaunchFile | None = None) -> int:
    """Run `accelerate launch ARGUMENTS` until it exits and return its exit code. Only the main thread may call this.

    The code is the one that a worker reported (control.py) on this or another node, else that of the first failed
    worker, else 0. SIGTERM, SIGINT, SIGUSR1 and SIGHUP request a stop of the ranks: code 75. Ranks that have not exited
    15 s after the deadline are killed. A second SIGINT kills them immediately: code 130. file: the launch file, needed
    for several nodes.
    """
    control = ControlChannel.of_launcher()
    several = file if file is not None and file.nodes > 1 else None
    reporter = _LaunchReporter(control, restarts, several)
    address = _find_own_address(several) if several is not None else None
    with record_signals(control.request_stop) as signals, concurrent.futures.ThreadPoolExecutor(1) as pool:
        work = pool.submit(elastic.launch, arguments, reporter.rank_exited, control.announce_end, address)
        stop_since: float | None = None
        while not concurrent.futures.wait([work], _POLL_SECONDS).done:
            if signals.count(signal.SIGINT) > 1:
                _kill(work, control, INTERRUPTED)
                return INTERRUPTED
            if signals and stop_since is None:
                stop_since = time.monotonic()
                reporter.stop_requested(signals[0])
            ended = reporter.other_node_ended()
            if ended is not None and time.monotonic() - ended.since > _GRACE_SECONDS:
                _kill(work, control, ended.code)
                return ended.code
            if stop_since is not None and time.monotonic() - stop_since > deadline_seconds + _GRACE_SECONDS:
                reporter.say("the ranks have not left in time (preempt.deadline_seconds): ending them.")
                _kill(work, control, RESUMABLE)
                return RESUMABLE
        if signals and stop_since is None:
            reporter.stop_requested(signals[0])
        return reporter.exit_code_of(work)


class _LaunchReporter:
    """Reporter of failed and restarted ranks and of ended nodes; it also determines the launch's exit code."""

    def __init__(self, control: ControlChannel, restarts: int, file: LaunchFile | None) -> None:
        """file: launch file of a launch on several nodes, else None."""
        self._control, self._restarts, self._file, self._failures = control, restarts, file, 0
        self._nodes: elastic.NodeChannel | None = None
        self._told_of_node = False
        self._prefix = "mirl-dist"
        if file is not None:
            self._nodes = elastic.NodeChannel(str(file.address), int(file.port or 0), file.node_rank, file.nodes)
            self._prefix = f"mirl-dist, node {file.node_rank} ({platform.node()})"

    def say(self, text: str) -> None:
        warn(f"{self._prefix}: {text}")

    def stop_requested(self, number: int) -> None:
        """Report the signal that requested a stop of the ranks."""
        name = signal.Signals(number).name
        more = "again" if number == signal.SIGINT else "twice"
        self.say(f"{name}: the ranks were asked to stop; press Ctrl-C {more} to kill them.")

    def rank_exited(self, local: int, code: int) -> None:
        """Report a failed rank after all ranks of this node have exited. Called in the launcher's thread.

        local: local rank; code: exit code, or minus the signal number of a killed rank. Raise NoRestart if a restart
        would not help.
        """
        if self._control.exit_code() is not None:  # the rank has reported the cause itself
            raise elastic.NoRestart
        self._failures += 1
        cause = f"was killed by signal {-code}" if code < 0 else f"failed (code {code})"
        rank = self._rank_name(local)
        if self._nodes is not None and self._nodes.host_gone:
            self.say(f"{rank} {cause}, and the launcher of node 0 has exited; {_AGAIN}.")
            raise elastic.NoRestart
        if self._failures <= self._restarts:
            self.say(f"{rank} {cause}; starting the ranks again ({self._failures} of {self._restarts}).")
        elif self._restarts:
            self.say(f"{rank} {cause}, and the ranks were started again {self._restarts} times (ranks.restarts).")
        elif code < 0:
            self.say(f"{rank} {cause}.")

    def _rank_name(self, local: int) -> str:
        if self._file is None:
            return f"rank {local}"
        if self._file.rendezvous == "c10d":  # c10d numbers ranks by node address, so the global rank is unknown here
            return f"rank {local} of this node"
        return f"rank {self._file.node_rank * self._file.ranks_per_node + local}"

    def other_node_ended(self) -> elastic.NodeEnd | None:
        """Return the final exit of another node, or None. The ranks of this node then exit with the same code."""
        ended = self._nodes.ended if self._nodes is not None else None
        if ended is not None and not self._told_of_node:
            self._told_of_node = True
            if self._control.exit_code() is None:
                self.say(f"node {ended.node} has ended for good (code {ended.code}): ending here too.")
            self._control.report_exit(ended.code)
        return ended

    def exit_code_of(self, work: concurrent.futures.Future[int]) -> int:
        """Return the exit code of a launch whose ranks have all exited, and send a nonzero code to the other nodes."""
        self.other_node_ended()
        reported = self._control.exit_code()
        self._control.remove()
        try:
            code = work.result()
        except elastic.NodesDisconnected as error:
            code = 1
            if reported is None:
                self.say(f"the launchers of the nodes have lost each other ({error}); {_AGAIN}.")
        code = reported if code and reported is not None else code
        if code and self._nodes is not None:
            self._nodes.send(code)
        return code


def _find_own_address(file: LaunchFile) -> str:
    """Return this node's address on the route to node 0, and let gloo and NCCL use its interface unless one is named.

    gloo would otherwise use the address of the host name, often 127.0.1.1. Node 0's name is resolved repeatedly for 60
    s, because the names of pods may not resolve at first. Raise UserError if there is no route to the address.
    """
    since, warned = time.monotonic(), False
    while True:
        try:
            family, _, _, _, endpoint = socket.getaddrinfo(file.address, file.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(endpoint)  # sends no packet
                address = str(probe.getsockname()[0])
            break
        except OSError as error:
            temporary = isinstance(error, socket.gaierror) and time.monotonic() - since < _NAME_SECONDS
            if not temporary:
                raise UserError(
                    f"{file.path}: node 0 is said to be at {file.address}, to which this node finds no way "
                    f"({error.strerror or error}). Correct main_process_ip or {launch_file.ADDRESS}, or the network."
                ) from None
        if not warned:
            warn(f"mirl-dist: {file.address} has no address yet; asking again for {_NAME_SECONDS:.0f} s.")
        warned = True
        time.sleep(1)
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", str(interface))
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    return address


def _kill(work: concurrent.futures.Future[int], control: ControlChannel, code: int) -> None:
    """Kill the ranks and their process groups until torch's launcher has returned."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while not concurrent.futures.wait([work], _POLL_SECONDS).done:
        for child in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if os.getpgid(child.pid) == child.pid else os.kill)(child.pid, signal.SIGKILL)
        if time.monotonic() > deadline:  # SIGKILL has no effect on a rank; a normal exit would wait for its thread
            os._exit(code)
    control.remove()


def _choose_for_machine(config: Config, gpus: int) -> tuple[LaunchFile, list[str]]:
    """Return a launch with as many ranks as GPUs that divide the global batch; without GPUs, two if it is even."""
    world = max(n for n in range(1, (gpus or 2) + 1) if config.batch.global_ % n == 0)
    file = LaunchFile(Path("auto"), world, 1, 0, world, "ddp", False, "none", None, None)
    # Without a config file accelerate would read the user's default one.
    options = file._replace(path=_AUTO_FILE).options(config.ranks.timeout_seconds)
    return file, options if world > 1 else []
