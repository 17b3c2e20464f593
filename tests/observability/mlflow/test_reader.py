"""Tickets read back from MLflow, against a real SQLite store and a real server process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import reader
from mirl_dist.observability.mlflow import tracker as tracking
from mirl_dist.observability.mlflow.reader import RemoteTicket, log_report, read
from tests.services.faulty_proxy import FaultyProxy
from tests.services.mlflow_server import client, tracker_of

pytest.importorskip("mlflow", reason="MLflow is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXPERIMENT = "tickets"
CONFIG = {"run": {"seed": 3}}


def ticket(round_: int) -> bytes:
    return b'{"round": %d}' % round_


def tell(uri: str, folder: Path, name: str, *, rounds: int, experiment: str = EXPERIMENT) -> dict[str, str]:
    """A run as ours are told, of so many rounds; pictures with round 1 alone. Returns its ids."""
    ids: dict[str, str] = {}
    tracker = tracker_of(uri, experiment, folder / experiment / name, ids, run_name=name)
    tracker.begin_run({}, {"method": "MIR-L"})
    tracker.log_file("run.json", json.dumps(CONFIG).encode(), "run")
    for round_ in range(rounds):
        tracker.begin_round(round_, {"round": str(round_)}, {"round": round_})
        tracker.log_ticket(round_, {"alive_weights": 1000 - round_, "psnr/mean": 30.0})
        tracker.log_file(f"tickets/{round_:02d}/ticket.json", ticket(round_), "round")
        tracker.log_file(f"tickets/{round_:02d}/mask.safetensors", b"mask %d" % round_, "round")
        if round_ == 1:
            tracker.log_file(f"tickets/{round_:02d}/pictures.png", b"png", "round")
        tracker.end_round()
    tracker.begin_round(rounds, {})  # trains still
    tracker.log_step(1, {"loss": 0.5})
    tracker.end_run()
    return ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "FAREWELL_SECONDS", 60.0)
        yield tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/own.db"


@pytest.fixture(scope="module")
def run(sqlite: str, folder: Path) -> dict[str, str]:
    """Ids of a run of two rounds in the SQLite store; the experiment has two such runs."""
    ids = tell(sqlite, folder, "first", rounds=2)
    tell(sqlite, folder, "second", rounds=1)
    return ids


@pytest.mark.parametrize("store", ["sqlite", pytest.param("server_url", marks=pytest.mark.long)])
def test_tickets_come_back_as_they_were_told(store: str, request: pytest.FixtureRequest, folder: Path) -> None:
    uri = request.getfixturevalue(store)
    ids = tell(uri, folder, f"told-{store}", rounds=2, experiment="told")
    expected = (
        f"told-{store}",
        ids["run"],
        CONFIG,
        [RemoteTicket(0, ticket(0), b"mask 0", None), RemoteTicket(1, ticket(1), b"mask 1", b"png")],
    )
    assert read(ids["run"], uri) == read("experiment:told", uri) == [expected]


def test_an_experiment_gives_its_runs_in_their_order_and_no_report(sqlite: str, run: dict[str, str]) -> None:
    log_report(sqlite, EXPERIMENT, "comparison", {"comparison.html": b"<p>"})
    found = read("experiment:tickets", sqlite)
    assert [(f.run_name, [k.round for k in f.tickets]) for f in found] == [("first", [0, 1]), ("second", [0])]


def test_a_reference_that_is_no_run_of_ours_says_what_it_is(sqlite: str, run: dict[str, str], folder: Path) -> None:
    look = client(sqlite)
    place = look.get_run(run["run"]).info.experiment_id
    foreign = look.create_run(place, run_name="of others").info.run_id
    deleted = look.create_run(place, run_name="gone").info.run_id
    look.delete_run(deleted)
    young = tell(sqlite, folder, "young", rounds=0, experiment="empty")
    for reference, said in (
        ("f" * 32, "found no run 'ffff.* at sqlite.* Give a run's id as its page shows it, or experiment:NAME"),
        (run["round/01"], f"found the run 'first, round 01' .* is one round of the run {run['run']}. Give that id"),
        (foreign, "found the run 'of others' .* which mirl-dist has not tracked"),
        (deleted, "found the run 'gone' .* deleted at .*Restore it"),
        (young["run"], "found no ticket yet in the run 'young'"),
        ("experiment:empty", "found no run with tickets in the experiment 'empty'"),
        ("experiment:nobody", "found no experiment 'nobody' at .*There are: Default, .*tickets"),
    ):
        with pytest.raises(UserError, match=said) as fault:
            read(reference, sqlite)
        assert not fault.value.resumable


def test_files_that_are_missing_damaged_or_no_tickets_of_ours_are_told(
    sqlite: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tell(sqlite, folder, "torn", rounds=1, experiment="torn")
    mask = next(folder.glob(f"mlartifacts/torn/{ids['round/00']}/**/mask.safetensors"))
    mask.unlink()
    assert read(ids["run"], sqlite)[0].tickets == [RemoteTicket(0, ticket(0), None, None)]

    monkeypatch.setitem(reader._LARGEST, "ticket.json", 5)
    with pytest.raises(
        UserError, match=r"found tickets/00/ticket.json of the run 'torn, round 00' .* 0.0 MiB, where ours"
    ):
        read(ids["run"], sqlite)
    monkeypatch.undo()

    config = next(folder.glob(f"mlartifacts/torn/{ids['run']}/**/run.json"))
    for content in (b"{torn", b"[]", b"[" * 100_000):
        config.write_bytes(content)
        with pytest.raises(UserError, match="found run.json of the run 'torn' .* damaged"):
            read(ids["run"], sqlite)
    config.unlink()
    assert read(ids["run"], sqlite)[0].config is None

    (mask.parent / "ticket.json").unlink()
    with pytest.raises(
        UserError, match="found no tickets/00/ticket.json with the run 'torn, round 00' .*track resend RUN"
    ):
        read(ids["run"], sqlite)


def test_a_store_that_is_away_is_told_and_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="found http://127.0.0.1:9 unavailable or refusing requests .*refused.*Check the server"
    ) as away:
        read("f" * 32, "http://ada:hunter22@127.0.0.1:9")
    assert away.value.resumable and "hunter22" not in str(away.value)
    with pytest.raises(UserError, match="found http://127.0.0.1:9 unavailable or refusing requests"):
        log_report("http://127.0.0.1:9", EXPERIMENT, "comparison", {"a.html": b"<p>"})
    with pytest.raises(UserError, match=f"found no file {tmp_path}/no.db for the tracking URI"):
        read("experiment:x", f"sqlite:///{tmp_path}/no.db")
    assert not list(tmp_path.iterdir()), "who reads makes no store"


def test_a_silent_server_is_not_waited_for_longer_than_the_environment_says(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with FaultyProxy(server_url) as proxy:
        proxy.silent = True
        with pytest.raises(UserError, match="unavailable or refusing requests .*timed out"):
            read("f" * 32, proxy.url)


@pytest.mark.parametrize("store", ["sqlite", pytest.param("server_url", marks=pytest.mark.long)])
def test_a_report_is_a_run_of_its_own(store: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    uri = request.getfixturevalue(store)
    files = {"comparison.html": b"<h1>Tickets</h1>", "tables/psnr.csv": b"a,b\n"}
    address = log_report(uri, "reports", "comparison", files, {"psnr/mean": 31.5}, {"runs": "first, second"})
    look = client(uri)
    (found,) = look.search_runs([look.get_experiment_by_name("reports").experiment_id])
    assert found.info.run_name == "comparison" and found.info.status == "FINISHED"
    assert found.data.metrics == {"psnr/mean": 31.5} and found.data.tags["runs"] == "first, second"
    for name, content in files.items():
        assert Path(look.download_artifacts(found.info.run_id, name, str(tmp_path))).read_bytes() == content
    assert address.startswith(f"{uri}/#/experiments/" if store == "server_url" else f"{uri} (to see it: ")


def test_a_report_that_breaks_off_leaves_no_half_run(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def breaks(*_: Any) -> None:
        raise ConnectionResetError("the line broke")

    monkeypatch.setattr(MlflowClient, "log_artifacts", breaks)
    with pytest.raises(UserError, match="the line broke") as away:
        log_report(sqlite, "broken", "comparison", {"a.html": b"<p>"})
    assert away.value.resumable
    look = client(sqlite)
    assert list(look.search_runs([look.get_experiment_by_name("broken").experiment_id])) == []
