"""Several processes start at once with one new MLflow database; and one that was left half-made is named."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import first_start, reader

_PROGRAM = """
import sys
from mirl_dist.observability.mlflow import reader
reader.log_report(sys.argv[1], "first", sys.argv[2], {"a.txt": b"a"})
"""


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(2))
def test_processes_that_start_together_share_a_new_database(tmp_path: Path, attempt: int) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", _PROGRAM, uri]
    started = [subprocess.Popen([*command, str(n)], cwd=tmp_path, stderr=subprocess.PIPE) for n in range(4)]
    for process in started:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err.decode()[-2000:]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (4,)
        assert not database.execute("SELECT name FROM sqlite_master WHERE name LIKE '!_alembic%' ESCAPE '!'").fetchall()


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE runs (id)", "CREATE TABLE alembic_version (v)", "INSERT INTO alembic_version VALUES ('a')"]
        + ["CREATE TABLE _alembic_tmp_metrics (id)"],
        ["CREATE TABLE experiments (id)"],
    ],
    ids=["within a migration", "before the first"],
)
def test_a_half_made_database_without_runs_is_refused_with_its_remedy(tmp_path: Path, statements: list[str]) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as database:
        for statement in statements:
            database.execute(statement)
    database.close()
    with pytest.raises(UserError, match=f"{path} was left half-made .* Remove it"):
        reader.check_server(f"sqlite:///{path}", "x", 5)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE IF NOT EXISTS runs (id)")
        database.execute("INSERT INTO runs VALUES (1)")
    database.close()
    with first_start.one_at_a_time(f"sqlite:///{path}"):
        pass  # a database with runs is left to MLflow, whatever else it holds


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "file:///tmp/mlruns", "sqlite://", "sqlite:///:memory:"])
def test_other_addresses_have_no_lock(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with first_start.one_at_a_time(uri):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_deleted_experiment_and_a_schema_of_another_version_name_their_remedies(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    reader.log_report(uri, "gone", "first", {"a.txt": b"a"})
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(UserError, match="tracking.experiment: 'gone' was deleted in MLflow. Restore it .mlflow exper"):
        reader.log_report(uri, "gone", "second", {"a.txt": b"a"})
    program = "import sys; sys.argv[2:] = ['x']; " + _PROGRAM.replace('"first"', '"other"')
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'cfd24bdc0731'")
    database.close()
    ended = subprocess.run(
        [sys.executable, "-c", program, uri], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "the database has the schema of another MLflow version; back it up" in ended.stderr, ended.stderr[-2000:]
    assert f"mlflow db upgrade {uri}" in ended.stderr
