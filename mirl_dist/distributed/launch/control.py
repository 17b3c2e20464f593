"""Messages between a launcher and its workers on one machine, through a folder whose name both can derive.

    <tmp>/mirl-dist-<uid>/launch-<machine>-<pid>-<start>/    pid and start time of the process that started the workers
        launcher        the launcher is `mirl-dist train --launch`, which requests a stop by `stop`, never by a signal
        stop            a stop of the run was requested
        word-<code>     a worker exited for good with this code; restarted workers exit with it immediately
        end-<pid>       that worker is about to get a SIGTERM, because another worker failed

A launcher restarts all workers when one fails, whatever the cause. Therefore a worker whose failure a restart cannot
fix reports its exit code. Each message is an empty file, so it cannot be written partially.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from mirl_dist.config.local_paths import process_folder
from mirl_dist.config.process_identity import process_state, this_machine
from mirl_dist.distributed.signals import RESUMABLE
from mirl_dist.errors import UserError
from mirl_dist.observability.console import warn

_EXIT_PREFIX, _END_PREFIX = "word-", "end-"
_STOP_MESSAGE_SECONDS = 2.0
_WAIT_BEFORE_EXIT_SECONDS = 0.5


class ControlChannel:
    """One end of the channel: a launcher's or a worker's. With folder None, a process without a launcher."""

    def __init__(self, folder: Path | None, parent: int | None = None) -> None:
        """parent: process id of the launcher; a worker exits when that process has exited."""
        self._folder, self._parent = folder, parent
        self._was_orphaned = False

    @classmethod
    def of_launcher(cls) -> ControlChannel:
        """Open the launcher's end before starting workers, and remove the folders of dead launchers.

        Raise UserError if the folder cannot be created or belongs to another user.
        """
        folder = process_folder() / _folder_name(os.getpid())
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "launcher").touch()
            _clear_leftovers(folder.parent)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}). Make room, or set TMPDIR.") from None
        return cls(folder)

    @classmethod
    def of_worker(cls) -> ControlChannel:
        """Open a worker's end under `train --launch`, accelerate launch or torchrun. Call this early in the process."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls(None)
        parent = os.getppid()
        if _is_not_launcher(parent):
            return cls(None, 0)
        try:
            return cls(process_folder() / _folder_name(parent), parent)
        except UserError:  # do not use a folder that other users can write
            return cls(None, parent)

    def request_stop(self) -> None:
        """Request a stop of the run, without a restart by its launcher."""
        self._write("stop")

    def stop_requested(self) -> bool:
        """Whether a stop of the run was requested on this machine."""
        return self._folder is not None and os.path.exists(self._folder / "stop")

    def announce_end(self, pid: int) -> None:
        """Tell a worker that the SIGTERM about to be sent to it only ends it because another one failed."""
        self._write(f"{_END_PREFIX}{pid}")

    def report_exit(self, code: int) -> None:
        """Report that this worker is about to exit with `code`, for a reason that a restart cannot fix."""
        self._write(f"{_EXIT_PREFIX}{code}")

    def exit_code(self) -> int | None:
        """Return the code to exit with immediately: the lowest reported, else 75 after a stop request, else None."""
        if self._folder is None or not os.path.isdir(self._folder):
            return None
        names = os.listdir(self._folder)
        codes = [int(name.removeprefix(_EXIT_PREFIX)) for name in names if name.startswith(_EXIT_PREFIX)]
        return min(codes) if codes else RESUMABLE if "stop" in names else None

    def parent_gone(self) -> bool:
        """Whether this worker's launcher has exited."""
        return self._parent is not None and os.getppid() != self._parent

    def leave_if_orphaned(self, stop_requested: Callable[[], bool]) -> bool:
        """Exit with code 1 if the launcher has exited; return False otherwise.

        Do not exit if `stop_requested`: a requested stop completes within its deadline. Do not exit at the first call
        that finds the launcher gone either: the signal that ended it may be about to reach this process too.
        """
        orphaned = self.parent_gone()
        if orphaned and self._was_orphaned and not stop_requested():
            if os.environ.get("RANK", "0") == "0":
                warn("mirl-dist: the launcher has exited; exiting too.")
            os._exit(1)
        self._was_orphaned = orphaned
        return False

    def another_failed(self) -> bool:
        """Whether a SIGTERM just received only ends this worker because another rank failed.

        `train --launch` requests stops through this channel, and announces that it ends a worker. Without either, wait
        up to two seconds for a request, since SIGTERM may be sent to launcher and workers at the same time. Under other
        launchers a SIGTERM always is a stop request.
        """
        if self._folder is None or not os.path.exists(self._folder / "launcher"):
            return False
        deadline = time.monotonic() + _STOP_MESSAGE_SECONDS
        while not self.stop_requested():
            if time.monotonic() > deadline or os.path.exists(self._folder / f"{_END_PREFIX}{os.getpid()}"):
                return True
            time.sleep(0.02)
        return False

    def wait_before_exit(self) -> None:
        """Wait before this worker exits because another one died.

        The launcher polls a few times a second, and thus reports the worker that died, not this one. SIGTERM, with
        which the launcher ends the remaining workers, is ignored meanwhile.
        """
        if self._folder is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(_WAIT_BEFORE_EXIT_SECONDS)

    def restart_notice(self) -> str | None:
        """Return a message with the restart count; None without a restart or if the launcher reports it itself."""
        count, most = (os.environ.get(f"TORCHELASTIC_{key}", "0") for key in ("RESTART_COUNT", "MAX_RESTARTS"))
        if self._folder is None or count == "0" or os.path.exists(self._folder / "launcher"):
            return None
        return f"started again by the launcher ({count} of {most})"

    def remove(self) -> None:
        """Remove the folder. Call this after all workers have exited."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str) -> None:
        """Write a message. Ignore failures: a missing message only costs time, and must not end a run."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError, UserError):
            process_folder()
            if not self._folder.is_dir():
                self._folder.mkdir(exist_ok=True)
                _clear_leftovers(self._folder.parent)
            (self._folder / name).touch()


def _folder_name(pid: int) -> str:
    state = process_state(pid)
    return f"launch-{_machine_id()}-{pid}-{state.started if state else 0}"


def _machine_id() -> str:
    """Return an id of the scope of process ids: machine, boot and container. TMPDIR may be shared between these."""
    return hashlib.sha256(repr(this_machine() or os.uname().nodename).encode()).hexdigest()[:8]


def _is_not_launcher(parent: int) -> bool:
    """Whether `parent` is not this worker's launcher, because the launcher exited before this call.

    torch's launchers start each worker as a session leader. If this process is one and its parent has not loaded torch,
    the worker was reparented.
    """
    if os.getpid() == 1 or os.getsid(0) != os.getpid():  # there is a process between this one and its launcher
        return False
    try:
        return "libtorch" not in Path(f"/proc/{parent}/maps").read_text(errors="replace")
    except PermissionError:
        return parent == 1
    except OSError:
        return False


def _clear_leftovers(folder: Path) -> None:
    """Remove the folders of launchers on this machine that no longer run."""
    for left in folder.glob(f"launch-{_machine_id()}-*"):
        if left.name != _folder_name(int(left.name.split("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
