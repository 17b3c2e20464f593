"""Where a command is to write on this machine: refused before its work, not after."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from mirl_dist.errors import Fault


def refuse_file(out: Path | None, option: str = "--out") -> None:
    """Raise Fault for a file that cannot be written there; None is no file."""
    if out is None:
        return
    _refuse_odd(out, option)
    if out.is_dir():
        raise Fault(f"{option}: found {out}, which is a folder, where a file is to be written. Name a file in it.")
    _refuse_rights(out.parent, option)


def refuse_folder(out: Path | None, option: str = "--out") -> None:
    """Raise Fault for a folder that cannot be written into; None is no folder."""
    if out is not None:
        _refuse_odd(out, option)
        _refuse_rights(out, option)


def _refuse_odd(out: Path, option: str) -> None:
    """Raise Fault for an address (a Path has one slash where that had two), and for a name that no disk takes."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(out))
    if found:
        raise Fault(
            f"{option}: found an address of {found[1]}://, but this is written on this machine. Name a path, and copy "
            "what is written there."
        )
    try:
        os.lstat(out)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise Fault(f"{option}: found {str(out)[:60]}..., which is too long a name. Shorten it.") from None


def _refuse_rights(folder: Path, option: str) -> None:
    """Raise Fault where a folder neither is one that may be written, nor can be made."""
    here = folder.absolute()
    while not os.path.lexists(here):
        here = here.parent
    if not here.is_dir():
        raise Fault(f"{option}: found {here}, which is no folder, where one is needed. Choose another place.")
    if not os.access(here, os.W_OK | os.X_OK):
        raise Fault(f"{option}: found {here}, which may not be written. Correct the rights, or choose another place.")
