"""Starts the ranks of `train --launch` and returns how they ended.

Torch's launcher works in a thread. The main thread handles the signals: it asks the ranks to stop, and ends those that
do not. Launcher and ranks talk through a ControlChannel.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from mirl_dist.config.config import Config
from mirl_dist.config.schema_training import BatchSection
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch import elastic, launch_file
from mirl_dist.distributed.launch.control import ControlChannel
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.distributed.signals import INTERRUPTED, RESUMABLE, record_signals
from mirl_dist.errors import UserError
from mirl_dist.observability.console import warn

_POLL_SECONDS = 0.2
_NAME_SECONDS = 60.0
_GRACE_SECONDS = 15.0
"""Left to the ranks, which exit by themselves at preempt.deadline_seconds."""
_LEAST_RENDEZVOUS_SECONDS = 60
_AGAIN = "start the same command again on every node: the run resumes from its last commit"


def choose(config: Config, launch_option: str) -> tuple[LaunchFile, list[str]]:
    """Return how many ranks to start, and accelerate's options for this node; none for one rank in this process.

    launch_option: a launch file for accelerate, or 'auto': one rank per GPU (as many as divide the global batch), or
    two on the CPU where two divide it. Raises UserError as launch_file.read does.
    """
    if launch_option == "auto":
        return _choose_for_machine(config.batch, gpus=0 if config.train.device == "cpu" else hardware.gpus())
    if not launch_option.strip():
        raise UserError("--launch: found an empty name. Give a file from launch/, or auto.")
    file = launch_file.read(Path(launch_option))
    return file, file.options() if file.ranks > 1 or file.engine != "ddp" else []


def launch(
    config: Config,
    file: LaunchFile,
    options: list[str],
    command: list[str],
    sets: Sequence[str],
    resume: str,
    before_signals: Callable[[], None],
) -> None:
    """Start this node's ranks of a run and exit with their code. The caller has checked file and config.

    They are started again `ranks.restarts` times, together, after one of them died. resume: as for the command; 'never'
    was checked by the caller, for ranks that are started again find their own run. before_signals: called when this
    launcher is about to handle signals.
    """
    arguments = [*options, "--max_restarts", str(config.ranks.restarts), "--monitor_interval", "0.1"]
    arguments += _rendezvous_options(config.ranks.timeout_seconds, file)
    arguments += ["-m", "mirl_dist", *command, "--resume", "auto" if resume == "never" else resume]
    for assignment in sets:
        arguments += ["--set", assignment]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, hardware.processes() // file.ranks_per_node)))
    before_signals()
    code = attend(arguments, config.ranks.restarts, config.preempt.deadline_seconds, file)
    if code:
        sys.exit(code)


def attend(arguments: list[str], restarts: int, deadline_seconds: float, file: LaunchFile | None = None) -> int:
    """Run `accelerate launch ARGUMENTS` to its end; return its exit code. Only the main thread may call it.

    That is the code a worker reported (control.py), on this node or another, else the code of the first worker that
    failed, else 0. SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask the ranks to stop: 75. They are killed when they have not
    exited 15 s after the deadline, and at once by a second SIGINT: 130. file: of a launch on several nodes.
    """
    control = ControlChannel.of_launcher()
    several = file if file is not None and file.nodes > 1 else None
    reporter = _LaunchReporter(control, restarts, several)
    address = _find_own_address(several) if several is not None else None
    with record_signals(control.request_stop) as signals, concurrent.futures.ThreadPoolExecutor(1) as pool:
        work = pool.submit(_run_accelerate, arguments, reporter.rank_exited, address)
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


def _run_accelerate(arguments: list[str], on_failure: Callable[[int, int], None], address: str | None) -> int:
    try:
        return elastic.launch(arguments, on_failure, address)
    except (ValueError, ImportError) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"accelerate refuses this launch: {reason}. Compare with launch/cpu_two.yaml.") from None


class _NodeEnd(NamedTuple):
    """The end of another node for good: its exit code, and since when this launcher knows (monotonic seconds)."""

    code: int
    since: float


class _LaunchReporter:
    """Reports that ranks died and are started again, that another node has ended; decides the exit code."""

    def __init__(self, control: ControlChannel, restarts: int, file: LaunchFile | None) -> None:
        """file: of a launch on several nodes."""
        self._control, self._restarts, self._file, self._failures = control, restarts, file, 0
        self._nodes: elastic.NodeChannel | None = None
        self._other_node: _NodeEnd | None = None
        self._prefix = "mirl-dist"
        if file is not None:
            self._nodes = elastic.NodeChannel(str(file.address), int(file.port or 0), file.node_rank, file.nodes)
            self._prefix = f"mirl-dist, node {file.node_rank} ({platform.node()})"

    def say(self, text: str) -> None:
        warn(f"{self._prefix}: {text}")

    def stop_requested(self, number: int) -> None:
        """Report the signal that asked the ranks to stop."""
        name = signal.Signals(number).name
        more = "again" if number == signal.SIGINT else "twice"
        self.say(f"{name}: the ranks were asked to stop; press Ctrl-C {more} to kill them.")

    def rank_exited(self, local: int, code: int) -> None:
        """Report a rank that failed, in the launcher's thread, when the others on this node have ended too.

        local: its number on this node; code: minus the signal, for one that was killed. Raises NoRestart when starting
        the ranks again would not mend it.
        """
        if self._control.exit_code() is not None:  # the rank has said why
            raise elastic.NoRestart
        self._failures += 1
        cause = f"was killed by signal {-code}" if code < 0 else f"failed (code {code})"
        rank = self._rank_name(local)
        if self._nodes is not None and self._nodes.host_gone():
            self.say(f"{rank} {cause}, and the launcher of node 0 has gone; {_AGAIN}.")
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
        if self._file.rendezvous == "c10d":  # which numbers the ranks by the nodes' addresses
            return f"rank {local} of this node"
        return f"rank {self._file.node_rank * self._file.ranks_per_node + local}"

    def other_node_ended(self) -> _NodeEnd | None:
        """Return the end of another node, once there is one. The ranks here then exit with its code too."""
        received = self._nodes.received() if self._nodes is not None else None
        if received is not None and self._other_node is None:
            node, code = received
            self._other_node = _NodeEnd(code, time.monotonic())
            if self._control.exit_code() is None:
                self.say(f"node {node} has ended for good (code {code}): ending here too.")
            self._control.report_exit(code)
        return self._other_node

    def exit_code_of(self, work: concurrent.futures.Future[int]) -> int:
        """Return the exit code of a launch whose ranks have all ended, and send it to the other nodes."""
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


def _rendezvous_options(timeout_seconds: float, file: LaunchFile) -> list[str]:
    """Return how long launchers of several nodes wait for each other: as long as ranks do, so that both outlast one
    network failure."""
    if file.nodes == 1:
        return []
    seconds = max(_LEAST_RENDEZVOUS_SECONDS, int(timeout_seconds))
    if file.rendezvous == "static":
        return ["--rdzv_conf", f"timeout={seconds}"]
    host = int(file.node_rank == 0)
    return ["--rdzv_conf", f"is_host={host},join_timeout={seconds},read_timeout={seconds}"]


def _find_own_address(file: LaunchFile) -> str:
    """Return this node's address on its way to node 0, and name its interface to gloo, which would take the address of
    the host name (often 127.0.1.1). A name may get an address while this waits, as those of pods do. Raises UserError
    for an address that cannot be reached from here."""
    since, warned = time.monotonic(), False
    while True:
        try:
            address = elastic.own_address(str(file.address), int(file.port or 0))
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
    interface = elastic.interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return address


def _kill(work: concurrent.futures.Future[int], control: ControlChannel, code: int) -> None:
    """Kill the ranks, with all that they have started, until their launcher starts no more."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while not concurrent.futures.wait([work], _POLL_SECONDS).done:
        for child in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if os.getpgid(child.pid) == child.pid else os.kill)(child.pid, signal.SIGKILL)
        if time.monotonic() > deadline:  # a rank that not even SIGKILL ends: its thread here would wait for it
            os._exit(code)
    control.remove()


def _choose_for_machine(batch: BatchSection, gpus: int) -> tuple[LaunchFile, list[str]]:
    """Return as many ranks as this machine has GPUs and the global batch allows; without GPUs two where it is even."""
    world = max(n for n in range(1, (gpus or 2) + 1) if batch.global_ % n == 0)
    file = LaunchFile(Path("auto"), world, 1, 0, world, "ddp", False, "none", None, None)
    options = ["--multi_gpu", "--num_processes", str(world), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return file, options if world > 1 else []
