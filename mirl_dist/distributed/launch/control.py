"""What a launcher and its workers on one machine tell each other, in a small folder that both can name.

    <tmp>/mirl-dist-<uid>/launch-<machine>-<pid>-<start>/    pid, start: of the process that started the workers
        launcher        it is `mirl-dist train --launch`, which asks by `stop` and never by a signal
        stop            the run was asked to stop
        word-<code>     a worker left for good with this code; a worker that is started again leaves with it at once

A launcher starts all workers again when one fails, whatever it died of. So a worker that a restart cannot help leaves a
word. Every message is the existence of an empty file: nothing can be half written.
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
from mirl_dist.distributed.signals import RESUMABLE
from mirl_dist.errors import UserError
from mirl_dist.observability.console import warn

_EXIT_PREFIX = "word-"
_DOUBT_SECONDS = 2.0
_LINGER_SECONDS = 0.5


class ControlChannel:
    """One end of the talk: a launcher's, a worker's, or (folder None) that of a process which nobody launched."""

    def __init__(self, folder: Path | None, parent: int | None = None) -> None:
        """parent: the process that a worker ends with."""
        self._folder, self._parent = folder, parent
        self._gone_before = False

    @classmethod
    def of_launcher(cls) -> ControlChannel:
        """That of the process which is about to start workers. Removes what dead launchers left.

        Raises UserError where the folder cannot be made, or is another user's.
        """
        folder = process_folder() / _name(os.getpid())
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
        """That of a worker under `train --launch`, accelerate launch or torchrun; to be called as early as possible."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls(None)
        parent = os.getppid()
        if _is_no_launcher(parent):
            return cls(None, 0)
        try:
            return cls(process_folder() / _name(parent), parent)
        except UserError:  # nothing is said or believed in a folder that others can write
            return cls(None, parent)

    def request_stop(self) -> None:
        """The run shall stop, and not be started again by its launcher."""
        self._write("stop")

    def stop_requested(self) -> bool:
        """Whether anyone on this machine asked so."""
        return self._folder is not None and os.path.exists(self._folder / "stop")

    def report_exit(self, code: int) -> None:
        """This worker is about to leave with `code`, for a reason that a restart cannot mend."""
        self._write(f"{_EXIT_PREFIX}{code}")

    def exit_code(self) -> int | None:
        """The code to leave with at once: the least last word, else 75 once a stop was asked for, else None."""
        if self._folder is None or not os.path.isdir(self._folder):
            return None
        names = os.listdir(self._folder)
        words = [int(name.removeprefix(_EXIT_PREFIX)) for name in names if name.startswith(_EXIT_PREFIX)]
        return min(words) if words else RESUMABLE if "stop" in names else None

    def parent_gone(self) -> bool:
        """Whether the launcher of this worker has ended."""
        return self._parent is not None and os.getppid() != self._parent

    def leave_if_orphaned(self, asked: Callable[[], bool]) -> bool:
        """End this process, code 1, when its launcher has gone; False otherwise.

        Not if `asked`: a stop that was asked for is finished within its deadline. And not at the first look: the
        signal that ended the launcher may be on its way to this process too.
        """
        gone = self.parent_gone()
        if gone and self._gone_before and not asked():
            if os.environ.get("RANK", "0") == "0":
                warn("mirl-dist: the launcher has gone; leaving.")
            os._exit(1)
        self._gone_before = gone
        return False

    def another_failed(self) -> bool:
        """Whether a SIGTERM that this worker has just got only ends it because another rank has failed.

        So it is where `train --launch` asks by the slip: two seconds are left to that, for whoever stops a run may send
        SIGTERM to its launcher and its workers together. Under other launchers a SIGTERM is always a request.
        """
        if self._folder is None or not os.path.exists(self._folder / "launcher"):
            return False
        last = time.monotonic() + _DOUBT_SECONDS
        while not self.stop_requested():
            if time.monotonic() > last:
                return True
            time.sleep(0.02)
        return False

    def wait_before_exit(self) -> None:
        """Before a worker leaves because another has gone: the launcher, which looks a few times a second, then names
        the one that died, not this one. SIGTERM, its way to end the others, is no longer heard."""
        if self._folder is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(_LINGER_SECONDS)

    def restart_notice(self) -> str | None:
        """How often the launcher has started this worker again, where the launcher does not say so itself."""
        count, most = (os.environ.get(f"TORCHELASTIC_{key}", "0") for key in ("RESTART_COUNT", "MAX_RESTARTS"))
        if self._folder is None or count == "0" or os.path.exists(self._folder / "launcher"):
            return None
        return f"started again by the launcher ({count} of {most})"

    def remove(self) -> None:
        """All workers have ended: nothing is left to be said."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str) -> None:
        """A message that cannot be written is not sent: what it would spare is not worth a run's end."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError, UserError):
            process_folder()
            if not self._folder.is_dir():
                self._folder.mkdir(exist_ok=True)
                _clear_leftovers(self._folder.parent)
            (self._folder / name).touch()


def child_processes(pid: int) -> list[int]:
    """The processes that `pid` has started and that live; none where there is no /proc."""
    found = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return [child for child in found if (said := _stat(child)) and said[1] == str(pid) and said[0] != "Z"]


def _name(pid: int) -> str:
    said = _stat(pid)
    return f"launch-{_machine()}-{pid}-{said[19] if said else 0}"


def _machine() -> str:
    """Where process ids mean the same: this boot of this machine, in this container. TMPDIR may be a shared folder."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = os.uname().nodename
    return hashlib.sha256(boot.encode()).hexdigest()[:8]


def _stat(pid: int) -> list[str] | None:
    """State, parent and so on, as /proc counts them from its third field: [1] is the parent, [19] the start time."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _is_no_launcher(parent: int) -> bool:
    """Whether this worker, which leads a session as torch's launchers start them, has another parent than one of these:
    they have torch in their memory. So the launcher ended before its worker could look for it."""
    if os.getpid() == 1 or os.getsid(0) != os.getpid():  # something stands between it and its launcher
        return False
    try:
        return "libtorch" not in Path(f"/proc/{parent}/maps").read_text(errors="replace")
    except PermissionError:
        return parent == 1
    except OSError:
        return False


def _clear_leftovers(folder: Path) -> None:
    """Remove the slips of this machine's launchers that no longer run."""
    for left in folder.glob(f"launch-{_machine()}-*"):
        if left.name != _name(int(left.name.split("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
