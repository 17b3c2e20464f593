"""Checks of a command's local output paths, made before its work instead of after it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from mirl_dist.config.local_paths import nearest_existing
from mirl_dist.errors import UserError


def check_file(out: Path | None, option: str = "--out") -> None:
    """Raise UserError if a file cannot be written at `out`; do nothing for None."""
    if out is None:
        return
    _check_path(out, option)
    if out.is_dir():
        raise UserError(f"{option}: found {out}, which is a folder, where a file is to be written. Name a file in it.")
    _check_rights(out.parent, option)


def check_folder(out: Path | None, option: str = "--out") -> None:
    """Raise UserError if `out` cannot be used as an output folder; do nothing for None."""
    if out is not None:
        _check_path(out, option)
        _check_rights(out, option)


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
