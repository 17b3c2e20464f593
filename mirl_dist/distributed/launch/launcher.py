"""`train --launch`: check everything in this process first, then start the ranks, and pass on how they ended.

The ranks' launcher works in a thread. The main thread hears the signals: it asks the ranks to stop, and ends those that
do not. What launcher and ranks tell each other lies in a slip.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mirl_dist.config.config import Config
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch import elastic, launch_file
from mirl_dist.distributed.launch.control import ControlChannel, child_processes
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.distributed.signals import RESUMABLE
from mirl_dist.errors import UserError
from mirl_dist.observability.console import warn

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_INTERRUPTED = 130
_LOOK_SECONDS = 0.2
_NAME_SECONDS = 60.0
_GRACE_SECONDS = 15.0
"""Left to the ranks, which leave by themselves at preempt.deadline_seconds."""
_LEAST_MEETING_SECONDS = 60
_AGAIN = "start the same command again on every node: the run goes on from its last commit"


def choose(config: Config, how: str) -> tuple[LaunchFile, list[str]]:
    """How many ranks, and accelerate's options to start this node's; none for one rank, which is the calling process.

    how: a launch file for accelerate, or 'auto': one rank per GPU (as many as divide the global batch), or two on
    the CPU where two divide it. Raises UserError as launch_file.read does.
    """
    if how == "auto":
        return _auto(config)
    if not how.strip():
        raise UserError("--launch: found an empty name. Give a file from launch/, or auto.")
    file = launch_file.read(Path(how))
    return file, file.options() if file.ranks > 1 or file.engine != "ddp" else []


def launch(
    config: Config,
    file: LaunchFile,
    options: list[str],
    command: list[str],
    sets: Sequence[str],
    resume: str,
    prepared: Callable[[], None],
) -> None:
    """Start this node's ranks of a run and exit with their code. The caller has checked file and config.

    They are started again `ranks.restarts` times, together, after one of them died. resume: as for the command; 'never'
    is proved here once, for ranks that are started again find their own run. prepared: called when signals are about to
    be heard here.
    """
    arguments = [*options, "--max_restarts", str(config.ranks.restarts), "--monitor_interval", "0.1"]
    arguments += _meeting(config, file)
    arguments += ["-m", "mirl_dist", *command, "--resume", "auto" if resume == "never" else resume]
    for assignment in sets:
        arguments += ["--set", assignment]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, hardware.processes() // file.ranks_per_node)))
    prepared()
    code = attend(arguments, config.ranks.restarts, config.preempt.deadline_seconds, file)
    if code:
        sys.exit(code)


def attend(arguments: list[str], restarts: int, deadline_seconds: float, file: LaunchFile | None = None) -> int:
    """`accelerate launch ARGUMENTS` from its start to its end; its exit code. Only the main thread may call it.

    That is a worker's last word (slip.py), on this node or another, else the code of the first worker that failed, else
    0. SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask the ranks to stop: 75. They are killed when they have not left 15 s after
    the deadline, and at once by a second SIGINT: 130. file: of a launch on several nodes.
    """
    slip = ControlChannel.of_launcher()
    several = file if file is not None and file.nodes > 1 else None
    told = _LaunchReporter(slip, restarts, several)
    address = _place(several) if several is not None else None
    with _heard(slip) as signals, concurrent.futures.ThreadPoolExecutor(1) as pool:
        work = pool.submit(_start, arguments, told.rank_exited, address)
        since: float | None = None
        while not concurrent.futures.wait([work], _LOOK_SECONDS).done:
            if signals.count(signal.SIGINT) > 1:
                _kill(work, slip, _INTERRUPTED)
                return _INTERRUPTED
            if signals and since is None:
                since = time.monotonic()
                told.stop_requested(signals[0])
            if told.another_node_ended() and time.monotonic() - told.since > _GRACE_SECONDS:
                _kill(work, slip, told.code)
                return told.code
            if since is not None and time.monotonic() - since > deadline_seconds + _GRACE_SECONDS:
                told.say("the ranks have not left in time (preempt.deadline_seconds): ending them.")
                _kill(work, slip, RESUMABLE)
                return RESUMABLE
        if signals and since is None:
            told.stop_requested(signals[0])
        return told.code_of(work)


def _start(arguments: list[str], died: Callable[[int, int], None], address: str | None) -> int:
    try:
        return elastic.launch(arguments, died, address)
    except (ValueError, ImportError) as error:
        said = str(error).rstrip(".")
        raise UserError(f"accelerate refuses this launch: {said}. Compare with launch/cpu_two.yaml.") from None


class _LaunchReporter:
    """What this launcher says: that ranks died and are started again, that another node has ended."""

    def __init__(self, slip: ControlChannel, restarts: int, file: LaunchFile | None) -> None:
        """file: of a launch on several nodes."""
        self._slip, self._restarts, self._file, self._deaths = slip, restarts, file, 0
        self._line: elastic.NodeChannel | None = None
        self.who = "mirl-dist"
        self.since, self.code = 0.0, 0
        if file is not None:
            self._line = elastic.NodeChannel(str(file.address), int(file.port or 0), file.node_rank, file.nodes)
            self.who = f"mirl-dist, node {file.node_rank} ({platform.node()})"

    def say(self, text: str) -> None:
        warn(f"{self.who}: {text}")

    def stop_requested(self, number: int) -> None:
        name = signal.Signals(number).name
        self.say(f"{name}: the ranks were asked to stop; Ctrl-C, twice in all, ends them at once.")

    def rank_exited(self, local: int, code: int) -> None:
        """In the launcher's thread, when the others on this node have ended too. code: minus the signal, for one that
        was killed. Raises Over when a new start would not mend it."""
        if self._slip.exit_code() is not None:  # it has said why
            raise elastic.NoRestart
        self._deaths += 1
        how = f"was killed by signal {-code}" if code < 0 else f"failed (code {code})"
        who = self._name(local)
        if self._line is not None and self._line.host_gone():
            self.say(f"{who} {how}, and the launcher of node 0 has gone; {_AGAIN}.")
            raise elastic.NoRestart
        if self._deaths <= self._restarts:
            self.say(f"{who} {how}; starting the ranks again ({self._deaths} of {self._restarts}).")
        elif self._restarts:
            self.say(f"{who} {how}, and the ranks were started again {self._restarts} times (ranks.restarts).")
        elif code < 0:
            self.say(f"{who} {how}.")

    def _name(self, local: int) -> str:
        if self._file is None:
            return f"rank {local}"
        if self._file.rendezvous == "c10d":  # which deals the ranks out by the nodes' addresses
            return f"rank {local} of this node"
        return f"rank {self._file.node_rank * self._file.ranks_per_node + local}"

    def another_node_ended(self) -> bool:
        """Whether a node has ended for good; this one then has the same last word, since `since`, and `code`."""
        heard = self._line.received() if self._line is not None else None
        if heard is not None and not self.since:
            node, self.code = heard
            self.since = time.monotonic()
            if self._slip.exit_code() is None:
                self.say(f"node {node} has ended for good (code {self.code}): ending here too.")
            self._slip.report_exit(self.code)
        return bool(self.since)

    def code_of(self, work: concurrent.futures.Future[int]) -> int:
        """The exit code of a launch whose ranks have all ended; the other nodes are told."""
        self.another_node_ended()
        word = self._slip.exit_code()
        self._slip.remove()
        try:
            code = work.result()
        except elastic.NodesDisconnected as apart:
            code = 1
            if word is None:
                self.say(f"the launchers of the nodes have lost each other ({apart}); {_AGAIN}.")
        code = word if code and word is not None else code
        if code and self._line is not None:
            self._line.send(code)
        return code


def _meeting(config: Config, file: LaunchFile) -> list[str]:
    """How long launchers of several nodes wait for each other: as long as ranks do, so that both outlast one cut."""
    if file.nodes == 1:
        return []
    seconds = max(_LEAST_MEETING_SECONDS, int(config.ranks.timeout_seconds))
    if file.rendezvous == "static":
        return ["--rdzv_conf", f"timeout={seconds}"]
    host = int(file.node_rank == 0)
    return ["--rdzv_conf", f"is_host={host},join_timeout={seconds},read_timeout={seconds}"]


def _place(file: LaunchFile) -> str:
    """This node's address on its way to node 0. Gloo, which would ask for the host name's address (often 127.0.1.1),
    is told the interface that has it. A name may come to have an address while we wait, as those of pods do. Raises
    UserError for an address that cannot be reached from here."""
    since, told = time.monotonic(), False
    while True:
        try:
            address = elastic.own_address(str(file.address), int(file.port or 0))
            break
        except OSError as error:
            passing = isinstance(error, socket.gaierror) and time.monotonic() - since < _NAME_SECONDS
            if not passing:
                raise UserError(
                    f"{file.path}: node 0 is said to be at {file.address}, to which this node finds no way "
                    f"({error.strerror or error}). Correct main_process_ip or {launch_file.ADDRESS}, or the network."
                ) from None
        if not told:
            warn(f"mirl-dist: {file.address} has no address yet; asking again for {_NAME_SECONDS:.0f} s.")
        told = True
        time.sleep(1)
    interface = elastic.interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return address


@contextlib.contextmanager
def _heard(slip: ControlChannel) -> Iterator[list[int]]:
    """The signals that this process gets, as they come; the first asks the ranks to stop."""
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        signals.append(number)
        slip.request_stop()

    # nohup has SIGHUP ignored, and means it.
    mine = [n for n in _ASKING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = [(number, signal.signal(number, handle)) for number in mine]
    try:
        yield signals
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _kill(work: concurrent.futures.Future[int], slip: ControlChannel, code: int) -> None:
    """End the ranks, with all that they have started, until their launcher starts no more."""
    last = time.monotonic() + _GRACE_SECONDS
    while not concurrent.futures.wait([work], _LOOK_SECONDS).done:
        for pid in child_processes(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
        if time.monotonic() > last:  # a rank that not even SIGKILL ends: its thread here would wait for it
            os._exit(code)
    slip.remove()


def _auto(config: Config) -> tuple[LaunchFile, list[str]]:
    gpus = 0 if config.train.device == "cpu" else hardware.gpus()
    share = config.batch.global_
    world = max(n for n in range(1, max(gpus, 1) + 1) if share % n == 0) if gpus else (2 if share % 2 == 0 else 1)
    file = LaunchFile(Path("auto"), world, 1, 0, world, "ddp", False, "none", None, None)
    options = ["--multi_gpu", "--num_processes", str(world), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return file, options if world > 1 else []
