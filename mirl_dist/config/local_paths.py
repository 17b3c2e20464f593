"""Local folders for data that is not part of a run: pending records, rank logs, crash markers, cached shards.

Folders outside a run are named `mirl-dist` below the user's XDG folders (pending records: cache, rank logs: state), or
`mirl-dist-UID` below the temporary folder (shards, launch messages, crash markers).
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import platformdirs

from mirl_dist.errors import UserError

_NAME = "mirl-dist"


def expand_home(path: str | Path) -> Path:
    """Expand a leading ~ or ~user. Raise UserError if there is no such home, instead of making a folder named ~."""
    if not str(path).startswith("~"):
        return Path(path)
    expanded = os.path.expanduser(path)
    has_home = str(path).partition("/")[0] != "~" or os.environ.get("HOME") != ""
    if not has_home or expanded.startswith("~") or not os.path.isabs(expanded):
        who = "this user has no home folder" if str(path).partition("/")[0] == "~" else "there is no such user here"
        raise UserError(f"found {path}, but {who}. Write the whole path, or set HOME.")
    return Path(expanded)


def local_folder(address: str) -> Path | None:
    """Return the local folder of an address (a path or file://), or None for other kinds of address."""
    kind, is_url, _ = address.partition("://")
    if not is_url:
        return expand_home(address)
    return Path(unquote(urlsplit(address).path)) if kind == "file" else None


def journal_folder(run_folder: str, configured: str | None, run_id: str = "") -> Path:
    """Return the folder for a run's records that MLflow has not received yet. Creates nothing.

    run_folder: address of the run. configured: tracking.journal, in which each run gets its own subfolder. run_id:
    distinguishes the run from earlier runs at the same address.
    """
    folder = local_folder(run_folder)
    local = folder.resolve() if folder is not None else None
    address = str(local or run_folder.rstrip("/"))
    name = hashlib.sha256(f"{address}#{run_id}".encode()).hexdigest()[:16]
    if configured is not None:
        return expand_home(configured) / name
    usual = local / "outbox" if local else _user_folder(platformdirs.user_cache_path) / "outbox" / name
    existing = nearest_existing(usual)
    is_writable = usual.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return usual if is_writable else _shared_folder() / "outbox" / name


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing parent."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))


def log_folder(run_folder: str, configured: str | None) -> Path:
    """Return the folder for the rank logs of a run. Creates nothing. configured: ranks.logs."""
    if configured is not None:
        return expand_home(configured)
    folder = local_folder(run_folder)
    if folder is not None:
        return folder / "logs"
    address = run_folder.rstrip("/")
    name = f"{address.rpartition('/')[2]}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
    return _user_folder(platformdirs.user_state_path, "logs") / name


def shard_cache_folder(configured: str | None = None) -> Path:
    """Return the folder for cached shards. Default: a folder per user below SLURM_TMPDIR or the temporary folder.

    configured: data.cache.folder.
    """
    return expand_home(configured) if configured else _shared_folder(os.environ.get("SLURM_TMPDIR")) / "shards"


def process_folder() -> Path:
    """Create and return this user's folder for launch messages and crash markers, with mode 0700.

    Raise UserError if it cannot be created or belongs to another user.
    """
    try:
        folder = _shared_folder()
    except FileNotFoundError as error:
        raise UserError(f"found no folder for temporary files: {error.strerror}. Set TMPDIR to one.") from None
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            if status.st_mode & 0o077:
                folder.chmod(0o700)
            return folder
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({error.strerror}). Set TMPDIR to a folder of yours.") from None
    raise UserError(f"{folder}: found what is not a folder of this user. Remove it, or set TMPDIR to one of yours.")


def _user_folder(of_user: Callable[[str], Path], instead: str = "") -> Path:
    """Return a folder of platformdirs, or for a user without a home one below the temporary folder."""
    try:
        usual = of_user(_NAME)
    except RuntimeError:
        return _shared_folder() / instead
    return usual if usual.is_absolute() else _shared_folder() / instead


def _shared_folder(base: str | None = None) -> Path:
    return Path(base or tempfile.gettempdir()) / f"{_NAME}-{os.getuid()}"
