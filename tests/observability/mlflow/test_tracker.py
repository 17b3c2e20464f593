"""The MLflow door, against a real SQLite store and a real server process."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import outbox, records, sender
from mirl_dist.observability.mlflow import tracker as tracking
from mirl_dist.observability.mlflow.tracker import MlflowTracker, Tracker, pending_records
from tests.services.faulty_proxy import FaultyProxy
from tests.services.mlflow_client_program import picture
from tests.services.mlflow_server import client, curve, runs_of, tracker_of
from tests.services.waiting import until

pytest.importorskip("mlflow", reason="MLflow is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/m.db"


@pytest.fixture(params=["sqlite", pytest.param("server_url", marks=pytest.mark.long)])
def uri(request: pytest.FixtureRequest) -> str:
    """Both kinds of store keep the same laws."""
    return str(request.getfixturevalue(request.param))


class Begin:
    """Begins trackers in an experiment named after the test, each on a machine of its own.

    `ids` plays the memory that survives a restart; `journals` are their folders.
    """

    def __init__(self, experiment: str, folder: Path) -> None:
        self._experiment, self._folder = experiment, folder
        self.journals: dict[MlflowTracker, Path] = {}

    def __call__(self, uri: str, ids: dict[str, str] | None = None, **params: object) -> MlflowTracker:
        journal = self._folder / f"journal{len(self.journals)}"
        tracker = tracker_of(uri, self._experiment, journal, {} if ids is None else ids)
        self.journals[tracker] = journal
        tracker.begin_run(params, {"fingerprint": "9f3c"})
        return tracker

    def settle(self, tracker: MlflowTracker) -> None:
        """Until the store has all that waited."""
        tracker.flush()
        until(lambda: pending_records(self.journals[tracker]).since is None)


@pytest.fixture
def begin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Begin]:
    made = Begin(request.node.name, tmp_path)
    yield made
    for tracker in made.journals:
        tracker.end_run(seconds=0.0)


@pytest.fixture(autouse=True)
def farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end waits long for a store, for this machine may be busy."""
    monkeypatch.setattr(tracking, "FAREWELL_SECONDS", 60.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that failed is asked again at once."""
    monkeypatch.setattr(sender, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_SECONDS", 0.05)


def test_rounds_hang_below_their_run(uri: str, begin: Begin) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids, model={"name": "promptir", "dim": 48}, prune={"fraction": 0.2, "scope": None})
    tracker.end_round("FAILED")  # before any round: there is nothing to end
    for round_ in (0, 1):
        tracker.begin_round(round_, {"sparsity": "0.2"}, {"round": round_, "method": "MIR-L"})
        tracker.end_round()
    tracker.end_round("FAILED")  # between rounds: the finished one stays finished
    tracker.end_run("FAILED")
    parent, nested = client(uri).get_run(ids["run"]), client(uri).get_run(ids["round/01"])
    assert parent.info.run_name == "demo" and parent.info.status == "FAILED"
    assert parent.data.tags["fingerprint"] == "9f3c"
    assert parent.data.params == {
        "model.name": "promptir",
        "model.dim": "48",
        "prune.fraction": "0.2",
        "prune.scope": "null",
    }
    assert nested.info.run_name == "demo, round 01" and nested.info.status == "FINISHED"
    assert nested.data.tags["sparsity"] == "0.2" and nested.data.params == {"round": "1", "method": "MIR-L"}
    children = [run for run in runs_of(uri, ids["run"]) if run.data.tags.get("mlflow.parentRunId") == ids["run"]]
    assert {run.info.run_id for run in children} == {ids["round/00"], ids["round/01"]}


def test_every_step_arrives_once_in_few_deliveries(uri: str, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(sender, "SECONDS_PER_DELIVERY", 1e9)
    calls: list[int] = []
    real = MlflowClient.log_batch

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs.get("metrics", ())))
        return real(self, *args, **kwargs)

    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    tracker.begin_round(0, {})
    begin.settle(tracker)
    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    for step in range(1, 50):
        tracker.log_step(step, {"loss": 1 / step, "rate": 2e-4})
    assert calls == [] and pending_records(begin.journals[tracker]).points == 98, "49 steps are gathered"
    tracker.log_step(50, {"loss": 1 / 50, "rate": 2e-4})
    until(lambda: pending_records(begin.journals[tracker]).since is None)
    assert calls == [100], "fifty steps of two values each"
    for step in range(51, 1001):
        tracker.log_step(step, {"loss": 1 / step, "rate": 2e-4})
    begin.settle(tracker)
    assert sum(calls) == 2000 and max(calls) <= 1000
    assert curve(uri, ids["round/00"], "loss") == [(step, 1 / step) for step in range(1, 1001)]


def test_a_ticket_shows_on_its_round_and_on_the_run_by_alive_weights_and_by_round(uri: str, begin: Begin) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    for round_, alive, score in ((0, 1000, 27.5), (1, 800, 27.25), (2, 640, 28.0)):
        tracker.begin_round(round_, {})
        values = {"alive_weights": alive, "psnr/denoise_15/BSD68": score, "psnr.mioir/denoise_15/BSD68": score + 1}
        tracker.log_ticket(
            round_, values | {"ssim/denoise_15/BSD68": 0.5, "psnr/mean": score, "weights/density/o": alive / 1000}
        )
    begin.settle(tracker)
    run, nested = ids["run"], ids["round/01"]
    for name, more in (("psnr/denoise_15/BSD68", 0), ("psnr.mioir/denoise_15/BSD68", 1), ("psnr/mean", 0)):
        assert curve(uri, run, name) == [(640, 28.0 + more), (800, 27.25 + more), (1000, 27.5 + more)]
        assert curve(uri, run, f"round/{name}") == [(0, 27.5 + more), (1, 27.25 + more), (2, 28.0 + more)]
        assert curve(uri, nested, name) == [(1, 27.25 + more)]
    assert curve(uri, run, "round/alive_weights") == [(0, 1000), (1, 800), (2, 640)]
    assert curve(uri, nested, "weights/density/o") == [(1, 0.8)]
    names = client(uri).get_run(run).data.metrics
    assert {name for name in names if "/" not in name or "density" in name} == set()
    assert list(names)[:2] == ["round/psnr/mean", "psnr/mean"], "what MLflow's plots begin with"


def test_a_ticket_of_more_scores_than_one_delivery_takes_parts_no_twins(uri: str, begin: Begin) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    for round_, alive in ((0, 1000), (1, 800)):
        tracker.begin_round(round_, {})
        tracker.log_ticket(round_, {"alive_weights": alive} | {f"psnr/t/{n}": 30.0 for n in range(600)})
    begin.settle(tracker)
    for n in (0, 499, 500, 599):
        assert curve(uri, ids["run"], f"psnr/t/{n}") == [(800, 30.0), (1000, 30.0)]
        assert curve(uri, ids["run"], f"round/psnr/t/{n}") == [(0, 30.0), (1, 30.0)]


def test_pictures_stand_in_the_image_grid_of_the_run_once_per_round(uri: str, begin: Begin, tmp_path: Path) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    for round_, shade in ((0, 1), (1, 2), (1, 3)):
        tracker.begin_round(round_, {})
        tracker.log_image("denoise_25/cbsd68 3096", picture(shade), round_)
    begin.settle(tracker)
    look = client(uri)
    paths = sorted(file.path for file in look.list_artifacts(ids["run"], "images"))
    # What MLflow's page takes apart: key, step, time, number.
    form = re.compile(
        r"images/denoise_25~cbsd68 3096\+step\+([01])\+timestamp\+\d+\+[-0-9a-f]{36}(\+compressed.webp|.png)"
    )
    assert [found.groups() for path in paths if (found := form.fullmatch(path))] == [
        ("0", "+compressed.webp"),
        ("0", ".png"),
        ("1", "+compressed.webp"),
        ("1", ".png"),
    ]
    assert Path(look.download_artifacts(ids["run"], paths[3], str(tmp_path))).read_bytes() == picture(3), "the last one"
    assert look.get_run(ids["run"]).data.tags["mlflow.loggedImages"] == "true"


def test_files_lie_with_their_round_or_their_run(uri: str, begin: Begin, tmp_path: Path) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    tracker.begin_round(3, {})
    tracker.log_file("tickets/03/ticket.json", b"{}", "round")
    tracker.log_file("config.yaml", b"seed: 0\n", "run")
    tracker.log_file("config.yaml", b"seed: 1\n", "run")
    begin.settle(tracker)
    look = client(uri)
    ticket = look.download_artifacts(ids["round/03"], "tickets/03/ticket.json", str(tmp_path))
    assert Path(ticket).read_bytes() == b"{}"
    config = look.download_artifacts(ids["run"], "config.yaml", str(tmp_path))
    assert Path(config).read_bytes() == b"seed: 1\n", "the second writing stands"
    assert [file.path for file in look.list_artifacts(ids["run"])] == ["config.yaml"]


def test_files_of_a_sqlite_store_lie_beside_it(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, store = tmp_path / "here", tmp_path / "store"
    here.mkdir()
    monkeypatch.chdir(here)
    tracker = begin(f"sqlite:///{store}/m.db")
    tracker.log_file("config.yaml", b"seed: 0\n", "run")
    tracker.end_run()
    assert [path.name for path in store.rglob("config.yaml")] == ["config.yaml"]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("remembered", [("key", "run", "round/00"), ("key",)], ids=["by its id", "by its key"])
def test_a_reopened_run_is_found_and_holds_no_point_twice(remembered: tuple[str, ...], uri: str, begin: Begin) -> None:
    ids: dict[str, str] = {}
    ticket = {"psnr/BSD68": 27.5, "alive_weights": 900.0, "weights/density/a": 0.9}
    first = begin(uri, ids, ranks=4)
    first.begin_round(0, {})
    for step in range(1, 31):
        first.log_step(step, {"loss": 1 / step})
    first.log_ticket(0, ticket)
    first.log_ticket(0, ticket)
    begin.settle(first)
    before, ids = ids, {name: ids[name] for name in remembered}

    second = begin(uri, ids, ranks=8)  # resumes from the commit at step 20
    second.begin_round(0, {"resumed": "1"})
    for step in range(21, 41):
        second.log_step(step, {"loss": 1 / step})
    second.log_ticket(0, ticket)
    begin.settle(second)
    assert ids == before and len(runs_of(uri, ids["run"])) == 2
    assert curve(uri, ids["round/00"], "loss") == [(step, 1 / step) for step in range(1, 41)]
    assert curve(uri, ids["run"], "psnr/BSD68") == [(900, 27.5)]
    assert curve(uri, ids["run"], "round/psnr/BSD68") == curve(uri, ids["round/00"], "psnr/BSD68") == [(0, 27.5)]
    assert curve(uri, ids["round/00"], "weights/density/a") == [(0, 0.9)]
    parent = client(uri).get_run(ids["run"])
    assert parent.data.params["ranks"] == "4" and parent.data.tags["changed.ranks"] == "8"
    assert client(uri).get_run(ids["round/00"]).data.tags["resumed"] == "1"


@pytest.mark.parametrize("clock", [0, -3600])
def test_an_ended_run_is_running_again_when_reopened_whatever_the_clock_says(
    clock: int, uri: str, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: dict[str, str] = {}
    begin(uri, ids).end_run("KILLED")
    assert client(uri).get_run(ids["run"]).info.status == "KILLED"
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + clock * 10**9)
    again = begin(uri, ids)
    begin.settle(again)
    assert client(uri).get_run(ids["run"]).info.status == "RUNNING"
    again.end_run("FAILED")
    assert client(uri).get_run(ids["run"]).info.status == "FAILED"


@pytest.mark.usefixtures("impatient")
def test_a_run_that_the_store_lost_gets_a_new_one_and_says_so_once(
    uri: str, begin: Begin, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    ids: dict[str, str] = {}
    begin.settle(begin(uri, ids))
    old, real, lost = ids["run"], MlflowClient.create_run, list[int]()

    def create(*args: Any) -> Any:
        lost.append(0)
        if len(lost) < 3:
            raise ConnectionResetError("the line broke")
        return real(*args)

    monkeypatch.setattr(MlflowClient, "create_run", create)
    client(uri).delete_run(old)
    begin.settle(begin(uri, ids))
    assert ids["run"] != old and caplog.text.count(f"has no run {old} any more") == 1


@pytest.mark.usefixtures("impatient")
def test_a_run_that_a_slow_server_makes_too_late_is_not_left_beside_its_twin(
    uri: str, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    real, late = MlflowClient.create_run, list[Any]()

    def create(self: Any, *args: Any) -> Any:
        late.append(args)
        if len(late) == 1:
            raise TimeoutError("no answer yet")
        made = real(self, *args)
        if len(late) == 2:
            real(self, *late[0])
        return made

    monkeypatch.setattr(MlflowClient, "create_run", create)
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    tracker.begin_round(0, {})
    tracker.end_run()
    assert len(late) == 3 and {run.info.run_id for run in runs_of(uri, ids["run"])} == {ids["run"], ids["round/00"]}


@pytest.mark.usefixtures("impatient")
def test_a_dead_server_stops_nothing_and_gets_everything_later(
    server_url: str, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyProxy(server_url) as proxy:
        proxy.refuse()
        ids: dict[str, str] = {}
        tracker = begin(proxy.url.replace("//", "//user:hunter22@"), ids, seed=0)
        tracker.begin_round(0, {})
        for step in range(1, 121):
            tracker.log_step(step, {"loss": 1 / step})
        tracker.log_ticket(0, {"psnr/BSD68": 27.5, "alive_weights": 900})
        tracker.log_file("ticket.json", b"{}", "round")
        until(lambda: caplog.records)
        told = [(record.name, record.levelno) for record in caplog.records]
        assert told == [("mirl_dist.tracking", logging.WARNING)], "one outage, one warning"
        assert f"{proxy.url} is unavailable or refuses requests" in caplog.text
        assert "Connection refused" in caplog.text
        assert "Training continues; points are kept and sent when it is back. Check the server" in caplog.text
        assert tracker.address() == proxy.url and "run" not in ids

        proxy.accept()
        begin.settle(tracker)
    assert [record.message for record in caplog.records[1:]] == [f"{proxy.url} is back: all pending records are sent"]
    assert "hunter22" not in caplog.text
    assert curve(server_url, ids["round/00"], "loss") == [(step, 1 / step) for step in range(1, 121)]
    assert curve(server_url, ids["run"], "psnr/BSD68") == [(900, 27.5)]
    assert client(server_url).get_run(ids["run"]).data.params == {"seed": "0"}
    assert [file.path for file in client(server_url).list_artifacts(ids["round/00"])] == ["ticket.json"]
    assert tracker.address().endswith(f"/runs/{ids['run']}")


def test_a_dead_server_is_asked_after_pauses_that_double(
    begin: Begin,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow import MlflowClient

    asked: list[float] = []

    def refuse(self: Any, name: str) -> None:
        asked.append(time.monotonic())
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", refuse)
    monkeypatch.setattr(sender, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_SECONDS", 0.3)
    tracker = begin("http://127.0.0.1:9")
    while len(asked) < 6:
        tracker.flush()  # in vain: it does not shorten a pause
        time.sleep(0.001)
    pauses = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2, 0.3, 0.3), strict=False)), pauses
    assert len(caplog.records) == 1

    monkeypatch.setattr(sender, "LONGEST_PAUSE_SECONDS", 1e9)
    monkeypatch.setattr(sender, "FIRST_PAUSE_SECONDS", 1e9)
    now = len(asked)
    until(lambda: len(asked) > now)
    monkeypatch.setattr(tracking, "FAREWELL_SECONDS", 0.2)
    tracker.end_run()
    assert len(asked) >= now + 2, "the end tries once more, pause or not"
    folder = begin.journals[tracker]
    assert f"the run ends while 0 points and 2 other records wait for http://127.0.0.1:9 in {folder}" in caplog.text
    assert "Send them with `mirl-dist track resend RUN`" in caplog.text


def test_a_store_that_was_back_is_asked_soon_again(sqlite: str, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    real, answers = MlflowClient.log_batch, [False] * 7 + [True] + [False] * 7 + [True] * 99

    def batch(*args: Any, **kwargs: Any) -> Any:
        if not answers.pop(0):
            raise ConnectionResetError("the line broke")
        return real(*args, **kwargs)

    tracker = begin(sqlite)
    tracker.begin_round(0, {})
    begin.settle(tracker)
    monkeypatch.setattr(sender, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_SECONDS", 1e9)
    monkeypatch.setattr(MlflowClient, "log_batch", batch)
    for step in (1, 2):
        tracker.log_step(step, {"loss": 1.0})
        begin.settle(tracker)  # in vain, if pauses went on from where they were: the longest would be minutes
    assert len(answers) == 98


@pytest.mark.usefixtures("impatient")
def test_without_a_journal_what_waits_is_bounded_and_the_oldest_points_go_first(
    begin: Begin,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    server_url: str,
) -> None:
    monkeypatch.setattr(outbox, "MEMORY_BYTES", 120_000)
    (tmp_path / "journal0").write_text("a file where the folder should be")
    with FaultyProxy(server_url) as proxy:
        proxy.refuse()
        ids: dict[str, str] = {}
        tracker = begin(proxy.url, ids, seed=0)
        assert f"the journal {tmp_path / 'journal0'} takes no more (File exists)" in caplog.text
        assert "wait in memory only" in caplog.text
        tracker.begin_round(0, {})
        for step in range(50):
            tracker.log_step(step, {f"v{i}": 1.0 for i in range(100)})
        assert caplog.text.count("the oldest is being forgotten") == 1
        waits, _ = records.parse_all(tracker.pending())
        assert [record.kind for record in waits[:3]] == ["open", "params", "open"], "runs and params are kept"
        proxy.accept()
        tracker.end_run()
    steps = [step for step, _ in curve(server_url, ids["round/00"], "v0")]
    assert 10 < len(steps) < 40 and steps == list(range(50 - len(steps), 50))
    assert client(server_url).get_run(ids["run"]).data.params == {"seed": "0"}


def test_a_refused_record_does_not_hold_up_the_others(uri: str, begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    tracker.begin_round(0, {})
    begin.settle(tracker)
    client(uri).delete_run(ids["round/00"])
    tracker.log_step(1, {"loss": 0.5})
    tracker.log_ticket(0, {"psnr/BSD68": 27.5})
    tracker.end_run()
    assert "did not take points '' of round/00" in caplog.text
    client(uri).restore_run(ids["round/00"])
    assert curve(uri, ids["run"], "round/psnr/BSD68") == [(0, 27.5)]
    assert client(uri).get_run(ids["run"]).info.status == "FINISHED"


@pytest.mark.usefixtures("impatient")
def test_a_file_that_finds_no_place_waits_and_points_pass(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    place = tmp_path / "mlartifacts"
    place.write_text("a file where the folder should be")
    uri, ids = f"sqlite:///{tmp_path}/m.db", dict[str, str]()
    tracker = begin(uri, ids)
    tracker.begin_round(0, {})
    tracker.log_file("ticket.json", b"{}", "round")
    for step in (1, 2):
        tracker.log_step(step, {"loss": 0.5})
    tracker.flush()
    until(lambda: caplog.records and pending_records(begin.journals[tracker])[:2] == (0, 1))
    assert curve(uri, ids["round/00"], "loss") == [(1, 0.5), (2, 0.5)]
    assert len(caplog.records) == 1 and f"{uri} accepts points but no files (" in caplog.text
    place.unlink()
    begin.settle(tracker)
    assert f"{uri} accepts files again: all that waited are sent" in caplog.text and len(caplog.records) == 2
    assert [path.name for path in place.rglob("ticket.json")] == ["ticket.json"]


def test_names_values_and_texts_are_made_fit_for_mlflow(uri: str, begin: Begin) -> None:
    ids: dict[str, str] = {}
    long = {f"p{i}": i for i in range(250)} | {"steps": list(range(9000))}
    tracker = begin(uri, ids, data={"train σ": [15, 25], "empty": {}}, **long)
    tracker.begin_round(0, {})
    tracker.log_step(1, {"loss/σ=15 (dB)": 1.5, "/a//../b": 2.0, "x" * 400: 3.0})
    tracker.log_step(1, {"infinite": float("inf"), "nan": float("nan"), "fine": 0.0})
    tracker.log_ticket(0, {f"weights/density/t{i}": 0.5 for i in range(1500)})
    begin.settle(tracker)
    metrics = client(uri).get_run(ids["round/00"]).data.metrics
    steps = {name for name in metrics if not name.startswith("weights/density/")}
    assert steps == {"loss/σ_15 _dB_", "a/b", "x" * 250, "fine"}
    assert len(metrics) - len(steps) == 1500
    params = client(uri).get_run(ids["run"]).data.params
    assert len(params) == 253 and params["data.train σ"] == "[15, 25]" and params["data.empty"] == "{}"
    assert len(params["steps"]) == 6000 and params["steps"].startswith("[0, 1, 2")


def test_no_secret_reaches_a_run_a_reader_or_the_journal(
    begin: Begin,
    sqlite: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sesame-open")
    uri, ids = sqlite, dict[str, str]()
    tracker = begin(uri, ids, tracking={"uri": "https://ada:hunter22@example.org/x"}, note="with sesame-open inside")
    begin.settle(tracker)
    params = client(uri).get_run(ids["run"]).data.params
    assert params == {"tracking.uri": "https://***@example.org/x", "note": "with *** inside"}
    assert tracker.address().startswith(f"{uri} (to see it: ")
    assert tracker.address().endswith(f"mlflow ui --backend-store-uri {uri})"), "this environment's own, where near"

    for secret_uri, clean in (
        ("http://ada:hunt%40r22@127.0.0.1:9/base", "http://127.0.0.1:9/base"),
        ("http://tokentoken@127.0.0.1:9", "http://127.0.0.1:9"),
        ("nosuchdb://ada:hunter22@127.0.0.1:9/runs?key=wordpass", "nosuchdb://ada@127.0.0.1:9/runs"),
    ):
        away = begin(secret_uri, ids, note=f"see {secret_uri}")
        away.begin_round(0, {"also": f"tags see {secret_uri}"})
        monkeypatch.setattr(tracking, "FAREWELL_SECONDS", 0.2)
        away.end_run()
        assert away.address().startswith(clean)
        files = sorted(map(str, begin.journals[away].iterdir()))  # closed by this process, they would lose their locks
        kept = subprocess.run(["cat", *files], capture_output=True, check=False).stdout + away.pending()
        assert b'"see ' in kept and b"tags see " in kept
        told = caplog.text + away.address() + kept.decode(errors="replace")
        assert clean in told
        for secret in ("hunter22", "hunt%40r22", "hunt@r22", "tokentoken", "wordpass", "sesame-open"):
            assert secret not in told


def test_a_folder_as_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for uri in ("./mlruns", "file:///srv/mlruns"):
        with pytest.raises(UserError, match="the tracking URI .*mlruns.*keeps no runs in plain folders. Use sqlite"):
            tracker_of(uri, "e", tmp_path / "j", {})


def test_without_an_address_the_environment_decides_then_a_file_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for setting, address in (("http://127.0.0.1:9", "http://127.0.0.1:9"), ("", "sqlite:///mlflow.db (to see it")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", setting)
        tracker = tracker_of(None, "e", tmp_path / "journal", {})
        assert tracker.address().startswith(address)
        tracker.end_run(seconds=0.0)


def test_the_silent_twin_answers_to_the_same_words() -> None:
    twin = Tracker()
    twin.log_step(1, {"loss": 1.0})
    assert twin.pending() == b"" and twin.address() == ""
    assert {word for word in vars(Tracker) if not word.startswith("_")} <= set(vars(MlflowTracker))


@pytest.mark.long
def test_mlflow_is_imported_late_and_keeps_quiet(tmp_path: Path) -> None:
    story = """
import sys
from mirl_dist.observability.mlflow import tracker as tracking
from mirl_dist.observability.mlflow.tracker import MlflowTracker
from mirl_dist.observability.mlflow import sender
tracking.FAREWELL_SECONDS = sender.FIRST_STEP_SECONDS = 60.0
from pathlib import Path
names = {"experiment": "e", "run_name": "r"}
tracker = MlflowTracker(uri=None, **names, remembered={}, remember=lambda ids: None, journal=Path("j"))
tracker.begin_run({}, {})
tracker.begin_round(0, {})
tracker.log_file("a.txt", b"a", "run")
assert "mlflow" not in sys.modules, "the import must not delay the first step"
tracker.log_step(1, {"loss": 1.0})
tracker.end_round()
tracker.end_run()
import mlflow
assert mlflow.active_run() is None
"""
    settings = {name: text for name, text in os.environ.items() if not name.startswith(("MLFLOW", "GIT"))}
    settings["PYTHONPATH"] = str(Path(tracking.__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", story], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j", "mlartifacts", "mlflow.db", "mlflow.db.lock"]


@pytest.mark.parametrize(
    ("address", "clean"),
    [
        ("http://bob:hunt/er2secret@127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://hunt/er2secret@127.0.0.1:9/base", "http://127.0.0.1:9/base"),
        ("http://bob:hunt@er2/secret@host/base?key=hunt", "http://host/base"),
        ("https://bob:/hunt?er2secret@host", "https://***"),
        ("postgresql://bob:hunt/er2#secret@host/db", "postgresql://***"),
        ("postgresql://bob:hunt/er2secret@host/db", "postgresql://bob@host/db"),
    ],
)
def test_a_password_with_a_slash_is_refused_and_never_shown(
    address: str, clean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert records.redact_uri(address) == clean
    assert records.redact(f"{address} is away", address) == f"{clean.replace('bob@', '***@')} is away"
    other = records.redact(f"see {address}", "sqlite:///mlflow.db")
    assert "hunt" not in other.partition("?key")[0] and "er2" not in other
    with pytest.raises(UserError, match="Write a / in a password as %2F") as fault:
        tracking.check_reachable(None)
    assert not re.search("bob|hunt|er2", str(fault.value))


def test_addresses_whose_parts_are_clear_stay_as_they_are() -> None:
    for address in (
        "sqlite:////home/me@work/mlflow.db",
        "http://host:5000/base",
        "postgresql://bob@host/db",
        "databricks",
        "http://[::1]:5000",
    ):
        records.check_uri(address)
        assert records.redact_uri(address) == address
    records.check_uri("http://bob:hunt%2Fer2@host")
    records.check_uri("mssql://host/db?user=me@server")
    for address in ("http://host:99999", "postgresql://bob@host:65536/db"):
        with pytest.raises(UserError, match=r"found the port \d+, which is out of range"):
            records.check_uri(address)
    with pytest.raises(UserError, match="found no host and port in the tracking URI"):
        records.check_uri("http://[::1:5000")
