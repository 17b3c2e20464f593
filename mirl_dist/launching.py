"""`train --launch`: check everything in this process first, then start the ranks, and pass on how they ended.

The ranks' launcher works in a thread. The main thread hears the signals: it asks the ranks to stop, and ends those that
do not. What launcher and ranks tell each other lies in a slip.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mirl_dist import preparing, ranks
from mirl_dist.config import Config
from mirl_dist.faults import Fault
from mirl_dist.slip import Slip, children
from mirl_dist.stopping import RESUMABLE
from mirl_dist.telling import warn
from mirl_dist.yaml_tree import load_file

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_INTERRUPTED = 130
_LOOK_SECONDS = 0.2
_GRACE_SECONDS = 15.0
"""Left to the ranks, which leave by themselves at preempt.deadline_seconds."""


def choose(config: Config, how: str) -> tuple[int, list[str]]:
    """How many ranks, and accelerate's options to start them. Raises Fault for a launch file that says neither.

    how: a launch file for accelerate, or 'auto': one rank per GPU (as many as divide the global batch), or two on
    the CPU where two divide it. One rank needs no launcher: it is the calling process.
    """
    return _auto(config) if how == "auto" else _from_file(Path(how))


def launch(
    config: Config,
    world: int,
    options: list[str],
    command: list[str],
    sets: Sequence[str],
    resume: str,
    prepared: Callable[[], None],
) -> None:
    """Start the ranks of a run and exit with their code. Raises Fault before any process is started.

    They are started again `ranks.restarts` times, together, after one of them died. resume: as for the command; 'never'
    is proved here once, for ranks that are started again find their own run. prepared: called when signals are about to
    be heard here.
    """
    preparing.prepare(config, world, resume)
    arguments = [*options, "--max_restarts", str(config.ranks.restarts), "--monitor_interval", "0.1"]
    arguments += ["-m", "mirl_dist", *command, "--resume", "auto" if resume == "never" else resume]
    for assignment in sets:
        arguments += ["--set", assignment]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    prepared()
    code = attend(arguments, config.ranks.restarts, config.preempt.deadline_seconds)
    if code:
        sys.exit(code)


def attend(arguments: list[str], restarts: int, deadline_seconds: float) -> int:
    """`accelerate launch ARGUMENTS` from its start to its end; its exit code. Only the main thread may call it.

    That is a worker's last word (slip.py), else the code of the first worker that failed, else 0. SIGTERM, SIGINT,
    SIGUSR1 and SIGHUP ask the ranks to stop: 75. They are killed when they have not left 15 s after the deadline, and
    at once by a second SIGINT: 130.
    """
    slip = Slip.of_launcher()
    told = _Told(slip, restarts)
    with _heard(slip) as signals, concurrent.futures.ThreadPoolExecutor(1) as pool:
        work = pool.submit(ranks.launch, arguments, told.died)
        since: float | None = None
        while not concurrent.futures.wait([work], _LOOK_SECONDS).done:
            if signals.count(signal.SIGINT) > 1:
                _kill(work, slip, _INTERRUPTED)
                return _INTERRUPTED
            if signals and since is None:
                since = time.monotonic()
                name = signal.Signals(signals[0]).name
                _say(f"{name}: the ranks were asked to stop; Ctrl-C, twice in all, ends them at once.")
            if since is not None and time.monotonic() - since > deadline_seconds + _GRACE_SECONDS:
                _say("the ranks have not left in time (preempt.deadline_seconds): ending them.")
                _kill(work, slip, RESUMABLE)
                return RESUMABLE
        word = slip.final()
        slip.remove()
        code = work.result()
        return word if code and word is not None else code


class _Told:
    """Says in a line that ranks died and are started again."""

    def __init__(self, slip: Slip, restarts: int) -> None:
        self._slip, self._restarts, self._deaths = slip, restarts, 0

    def died(self, rank: int, code: int) -> None:
        """In the launcher's thread, when the others have ended too. code: minus the signal, for one that was killed."""
        if self._slip.final() is not None:  # it has said why, and those that are started again leave at once
            return
        self._deaths += 1
        how = f"was killed by signal {-code}" if code < 0 else f"failed (code {code})"
        if self._deaths <= self._restarts:
            _say(f"rank {rank} {how}; starting the ranks again ({self._deaths} of {self._restarts}).")
        elif self._restarts:
            _say(f"rank {rank} {how}, and the ranks were started again {self._restarts} times (ranks.restarts).")
        elif code < 0:
            _say(f"rank {rank} {how}.")


@contextlib.contextmanager
def _heard(slip: Slip) -> Iterator[list[int]]:
    """The signals that this process gets, as they come; the first asks the ranks to stop."""
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        signals.append(number)
        slip.ask_to_stop()

    # nohup has SIGHUP ignored, and means it.
    mine = [n for n in _ASKING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = [(number, signal.signal(number, handle)) for number in mine]
    try:
        yield signals
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _kill(work: concurrent.futures.Future[int], slip: Slip, code: int) -> None:
    """End the ranks, with all that they have started, until their launcher starts no more."""
    last = time.monotonic() + _GRACE_SECONDS
    while not concurrent.futures.wait([work], _LOOK_SECONDS).done:
        for pid in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
        if time.monotonic() > last:  # a rank that not even SIGKILL ends: its thread here would wait for it
            os._exit(code)
    slip.remove()


def _say(text: str) -> None:
    warn(f"mirl-dist: {text}")


def _auto(config: Config) -> tuple[int, list[str]]:
    gpus = 0 if config.train.device == "cpu" else ranks.gpus()
    share = config.batch.global_
    world = max(n for n in range(1, max(gpus, 1) + 1) if share % n == 0) if gpus else (2 if share % 2 == 0 else 1)
    options = ["--num_processes", str(world), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return world, ["--multi_gpu", *options]


def _from_file(path: Path) -> tuple[int, list[str]]:
    tree = load_file(path)
    world = tree.get("num_processes")
    if not isinstance(world, int) or world < 1:
        raise Fault(f"{path}: found num_processes {world!r}; give the number of ranks, 1 or more.")
    if tree.get("debug"):
        raise Fault(f"{path}: found debug: {tree['debug']}, with which accelerate hides that ranks failed. Remove it.")
    return world, ["--config_file", str(path)]
