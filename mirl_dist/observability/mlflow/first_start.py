"""The first use of an MLflow server: finds or creates the experiment; one process at a time creates a database.

MLflow creates its tables by a chain of migrations on first use. Two processes that do so at once, or one that is
killed meanwhile, leave a database that no later process can use.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import records

_TEMPORARY = "_alembic_tmp_"  # prefix of the tables that a migration removes at its end


@contextlib.contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Hold the lock file beside the SQLite database of a tracking URI; do nothing for other URIs.

    Raises UserError for a half-made database without runs.
    """
    path = records.database(uri)
    if not uri.startswith("sqlite") or path.is_dir() or not path.parent.is_dir() or path.name == ":memory:":
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a read-only folder, or a file system without locks: as MLflow itself
            fcntl.flock(stack.enter_context(path.with_name(f"{path.name}.lock").open("ab")), fcntl.LOCK_EX)
        _check_complete(path)
        yield


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


def experiment_id(client: Any, uri: str, name: str) -> str:
    """Return the id of the experiment with this name; create it if missing. Raises UserError for a deleted one."""
    if experiment := client.get_experiment_by_name(name):
        if experiment.lifecycle_stage == "deleted":
            remedy = f"Restore it (mlflow experiments restore --experiment-id {experiment.experiment_id})"
            raise UserError(f"tracking.experiment: '{name}' was deleted in MLflow. {remedy}, or choose another name.")
        return str(experiment.experiment_id)
    location = None
    if uri.startswith("sqlite"):  # store artifacts beside the database, independent of the working directory
        location = (records.database(uri).parent / "mlartifacts" / records.legal_name(name)).as_uri()
    kind = {"mlflow.experimentKind": "custom_model_development"}  # otherwise MLflow opens its LLM pages
    return str(client.create_experiment(name, artifact_location=location, tags=kind))
