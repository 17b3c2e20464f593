"""Checks of a command's local output paths, made before its work instead of after it.

An output never replaces a file that the command reads, nor a file of a run; another existing file only if asked to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mirl_dist.config.local_paths import nearest_existing
from mirl_dist.errors import UserError

_RUN_FILE = "run.json"
"""The file that makes a folder a run (training/checkpointing/checkpoint.py)."""


def check_file(
    out: Path | None, option: str = "--out", *, overwrite: bool = False, reads: Iterable[str | Path] = ()
) -> None:
    """Raise UserError if a file cannot or must not be written at `out`; do nothing for None.

    reads: the command's input files and folders. overwrite: whether an existing file, unless it is one of these or
    belongs to a run, may be replaced.
    """
    if out is None:
        return
    _check_path(out, option)
    if out.is_dir():
        raise UserError(f"{option}: found {out}, which is a folder, where a file is to be written. Name a file in it.")
    _check_rights(out.parent, option)
    _check_replaced(out, option, overwrite, reads)


def check_folder(
    out: Path | None,
    option: str = "--out",
    *,
    names: Iterable[str] = (),
    overwrite: bool = False,
    reads: Iterable[str | Path] = (),
) -> None:
    """Raise UserError if `out` cannot be used as an output folder for files of these names; do nothing for None."""
    if out is None:
        return
    _check_path(out, option)
    _check_rights(out, option)
    for name in names:
        _check_replaced(out / name, option, overwrite, reads)


def check_outside_runs(out: Path, option: str = "--out", complaint: str | None = None) -> None:
    """Raise UserError if the folder `out` is a run's, or lies in one. complaint: how the message begins."""
    resolved = out.resolve()
    for folder in (resolved, *resolved.parents):
        if (folder / _RUN_FILE).is_file():
            beginning = complaint or f"found {out}, which belongs to the run in"
            raise UserError(f"{option}: {beginning} {folder}. Choose a place outside the run.")


def _check_replaced(out: Path, option: str, overwrite: bool, reads: Iterable[str | Path]) -> None:
    """Raise UserError if writing `out` would replace an input, a file of a run, or, unless `overwrite`, any file."""
    if not os.path.lexists(out):
        return
    if out.is_dir():
        raise UserError(f"{option}: found {out}, which is a folder, where a file is to be written. Move it away.")
    for path in map(Path, reads):
        with contextlib.suppress(OSError):
            if out.samefile(path):
                raise UserError(f"{option}: {out} is {path}, which this command reads. Choose another place.")
            if path.is_dir() and path.resolve() in out.resolve().parents:
                raise UserError(f"{option}: {out} is in {path}, which this command reads. Choose a place outside.")
    check_outside_runs(out.parent, option, f"{out} is a file of the run in")
    if not overwrite:
        raise UserError(f"{option}: {out} exists already. Choose another name, or add --overwrite to replace it.")


def _check_path(out: Path, option: str) -> None:
    """Raise UserError for an address (whose '//' Path has collapsed to '/'), and for a name that is too long."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(out))
    if scheme:
        raise UserError(
            f"{option}: found an address of {scheme[1]}://, but this is written on this machine. Name a path, and copy "
            "what is written there."
        )
    try:
        os.lstat(out)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{option}: found {str(out)[:60]}..., which is too long a name. Shorten it.") from None


def _check_rights(folder: Path, option: str) -> None:
    """Raise UserError unless `folder` is writable or can be created."""
    here = nearest_existing(folder)
    if not here.is_dir():
        raise UserError(f"{option}: found {here}, which is no folder, where one is needed. Choose another place.")
    if not os.access(here, os.W_OK | os.X_OK):
        raise UserError(
            f"{option}: found {here}, which is not writable. Correct its permissions, or choose another place."
        )
