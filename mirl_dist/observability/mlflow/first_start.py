"""Lets one process at a time create MLflow's SQLite database, and recognises one that was left half-made.

MLflow creates its tables by a chain of migrations on first use. Two processes that do so at once, or one that is
killed meanwhile, leave a database that no later process can use.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from mirl_dist.errors import UserError

_TEMPORARY = "_alembic_tmp_"  # prefix of the tables that a migration removes at its end


@contextlib.contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Hold the lock file beside the SQLite database of a tracking URI; do nothing for other URIs.

    Raises UserError for a half-made database without runs.
    """
    path = sqlite_path(uri)
    if path is None or not path.parent.is_dir():
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a read-only folder, or a file system without locks: as MLflow itself
            fcntl.flock(stack.enter_context(path.with_name(f"{path.name}.lock").open("ab")), fcntl.LOCK_EX)
        _check_complete(path)
        yield


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a URI such as sqlite:///mlflow.db, or None for other URIs and for databases in memory."""
    scheme, _, path = uri.partition("://")
    path = path.partition("?")[0].removeprefix("/")
    return Path(path) if scheme.partition("+")[0] == "sqlite" and path not in ("", ":memory:") else None


def _check_complete(path: Path) -> None:
    """Raise UserError for a database that a first start left half-made; it has no runs that could be lost."""
    if not path.is_file() or not path.stat().st_size:
        return
    address = f"{path.resolve().as_uri()}?mode=ro"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(address, uri=True)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        half_made = sorted(name for name in tables if name.startswith(_TEMPORARY))
        version = db.execute("SELECT count(*) FROM alembic_version").fetchone()[0] if "alembic_version" in tables else 0
        runs = db.execute("SELECT count(*) FROM runs").fetchone()[0] if "runs" in tables else 0
        if runs == 0 and tables and (half_made or not version):
            left = f" ({half_made[0]} is left)" if half_made else ""
            raise UserError(
                f"tracking.uri: {path} was left half-made by a first start that was killed or ran twice{left}; it has "
                f"no runs. Remove it (rm '{path}'), and start again."
            )
