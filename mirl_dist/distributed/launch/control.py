"""Messages between a launcher and its workers on one machine, in a small folder that both can name.

    <tmp>/mirl-dist-<uid>/launch-<machine>-<pid>-<start>/    pid, start: of the process that started the workers
        launcher        it is `mirl-dist train --launch`, which asks by `stop` and never by a signal
        stop            the run was asked to stop
        word-<code>     a worker exited for good with this code; a worker that is started again exits with it at once

A launcher starts all workers again when one fails, whatever it died of. So a worker that a restart cannot help reports
its exit code. Each message is an empty file, so none can be half written.
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

_EXIT_PREFIX = "word-"
_STOP_MESSAGE_SECONDS = 2.0
_WAIT_BEFORE_EXIT_SECONDS = 0.5


class ControlChannel:
    """One end of the channel: a launcher's, a worker's, or (folder None) that of a process which nobody launched."""

    def __init__(self, folder: Path | None, parent: int | None = None) -> None:
        """parent: the launcher's process, with which a worker ends."""
        self._folder, self._parent = folder, parent
        self._was_orphaned = False

    @classmethod
    def of_launcher(cls) -> ControlChannel:
        """Open the launcher's end in a process that is about to start workers. Removes what dead launchers left.

        Raises UserError where the folder cannot be made, or is another user's.
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
        """Open the end of a worker under `train --launch`, accelerate launch or torchrun; to be called early."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls(None)
        parent = os.getppid()
        if _is_not_launcher(parent):
            return cls(None, 0)
        try:
            return cls(process_folder() / _folder_name(parent), parent)
        except UserError:  # nothing is written or believed in a folder that others can write
            return cls(None, parent)

    def request_stop(self) -> None:
        """Ask the run to stop, and its launcher not to start it again."""
        self._write("stop")

    def stop_requested(self) -> bool:
        """Whether anyone on this machine asked the run to stop."""
        return self._folder is not None and os.path.exists(self._folder / "stop")

    def report_exit(self, code: int) -> None:
        """Report that this worker is about to exit with `code`, for a reason that a restart cannot mend."""
        self._write(f"{_EXIT_PREFIX}{code}")

    def exit_code(self) -> int | None:
        """Return the code to exit with at once: the least one reported, else 75 after a stop request, else None."""
        if self._folder is None or not os.path.isdir(self._folder):
            return None
        names = os.listdir(self._folder)
        codes = [int(name.removeprefix(_EXIT_PREFIX)) for name in names if name.startswith(_EXIT_PREFIX)]
        return min(codes) if codes else RESUMABLE if "stop" in names else None

    def parent_gone(self) -> bool:
        """Whether the launcher of this worker has ended."""
        return self._parent is not None and os.getppid() != self._parent

    def leave_if_orphaned(self, stop_requested: Callable[[], bool]) -> bool:
        """Exit with code 1 when the launcher has ended; return False otherwise.

        Not if `stop_requested`: a stop that was asked for is finished within its deadline. And not at the first call
        that finds it: the signal that ended the launcher may be on its way to this process too.
        """
        orphaned = self.parent_gone()
        if orphaned and self._was_orphaned and not stop_requested():
            if os.environ.get("RANK", "0") == "0":
                warn("mirl-dist: the launcher has exited; exiting too.")
            os._exit(1)
        self._was_orphaned = orphaned
        return False

    def another_failed(self) -> bool:
        """Whether a SIGTERM that this worker has just got only ends it because another rank has failed.

        So it is under `train --launch`, which asks through this channel. That is given two seconds, for whoever stops a
        run may send SIGTERM to its launcher and its workers together. Under other launchers a SIGTERM is always a
        request.
        """
        if self._folder is None or not os.path.exists(self._folder / "launcher"):
            return False
        deadline = time.monotonic() + _STOP_MESSAGE_SECONDS
        while not self.stop_requested():
            if time.monotonic() > deadline:
                return True
            time.sleep(0.02)
        return False

    def wait_before_exit(self) -> None:
        """Wait before a worker exits because another has gone: the launcher, which polls a few times a second, then
        names the one that died, not this one. SIGTERM, its way to end the others, is ignored."""
        if self._folder is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(_WAIT_BEFORE_EXIT_SECONDS)

    def restart_notice(self) -> str | None:
        """Say how often the launcher has started this worker again, where the launcher does not say so itself."""
        count, most = (os.environ.get(f"TORCHELASTIC_{key}", "0") for key in ("RESTART_COUNT", "MAX_RESTARTS"))
        if self._folder is None or count == "0" or os.path.exists(self._folder / "launcher"):
            return None
        return f"started again by the launcher ({count} of {most})"

    def remove(self) -> None:
        """Remove the folder, when all workers have ended."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str) -> None:
        """Write a message, or none where that fails: what it would spare is not worth a run's end."""
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
    """Identify where process ids mean the same: this boot of this machine, in this container. TMPDIR may be shared."""
    return hashlib.sha256(repr(this_machine() or os.uname().nodename).encode()).hexdigest()[:8]


def _is_not_launcher(parent: int) -> bool:
    """Whether this worker, which leads a session as torch's launchers start them, has a parent without torch in its
    memory, so not a launcher: that one ended before its worker could look for it."""
    if os.getpid() == 1 or os.getsid(0) != os.getpid():  # something stands between it and its launcher
        return False
    try:
        return "libtorch" not in Path(f"/proc/{parent}/maps").read_text(errors="replace")
    except PermissionError:
        return parent == 1
    except OSError:
        return False


def _clear_leftovers(folder: Path) -> None:
    """Remove the folders of this machine's launchers that no longer run."""
    for left in folder.glob(f"launch-{_machine_id()}-*"):
        if left.name != _folder_name(int(left.name.split("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
