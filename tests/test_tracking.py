"""The MLflow door, against a real SQLite store and a real server process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mirl_dist import tracking
from mirl_dist.faults import Fault
from mirl_dist.tracking import Mlflow, Silent, Tracker

pytest.importorskip("mlflow", reason="MLflow is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
OUTBOX = sys.modules[tracking.Outbox.__module__]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/m.db"]
    command += ["--artifacts-destination", str(folder / "files")]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/m.db"


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    """Both kinds of store keep the same laws."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def begin(request: pytest.FixtureRequest) -> Callable[..., Mlflow]:
    """A tracker in an experiment named after the test; `ids` plays the memory that survives a restart."""

    def make(uri: str, ids: dict[str, str] | None = None, **params: object) -> Mlflow:
        kept = {} if ids is None else ids
        tracker = Mlflow(uri=uri, experiment=request.node.name, run_name="demo", remembered=kept, remember=kept.update)
        tracker.begin_run(params, {"fingerprint": "9f3c"})
        return tracker

    return make


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def curve(uri: str, run: str, name: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client(uri).get_metric_history(run, name))


def runs_of(uri: str, run: str) -> list[Any]:
    look = client(uri)
    experiment = look.get_run(run).info.experiment_id
    return list(look.search_runs([experiment]))


def test_rounds_hang_below_their_run(uri: str, begin: Callable[..., Mlflow]) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids, model={"name": "promptir", "dim": 48}, prune={"fraction": 0.2, "scope": None})
    for round_ in (0, 1):
        assert tracker.begin_round(round_, {"sparsity": "0.2"}) == -1
        tracker.end_round()
    tracker.end_run()
    parent, nested = client(uri).get_run(ids["run"]), client(uri).get_run(ids["round/01"])
    assert parent.info.run_name == "demo" and parent.info.status == "FINISHED"
    assert parent.data.tags["fingerprint"] == "9f3c"
    assert parent.data.params == {
        "model.name": "promptir",
        "model.dim": "48",
        "prune.fraction": "0.2",
        "prune.scope": "null",
    }
    assert nested.info.run_name == "round 01" and nested.info.status == "FINISHED"
    assert nested.data.tags["sparsity"] == "0.2"
    children = [run for run in runs_of(uri, ids["run"]) if run.data.tags.get("mlflow.parentRunId") == ids["run"]]
    assert {run.info.run_id for run in children} == {ids["round/00"], ids["round/01"]}


def test_every_step_arrives_once_in_few_deliveries(
    uri: str, begin: Callable[..., Mlflow], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "SECONDS_PER_DELIVERY", 1e9)
    calls: list[int] = []
    real = MlflowClient.log_batch

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs.get("metrics", ())))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    tracker.begin_round(0, {})
    calls.clear()
    for step in range(1, 121):
        tracker.log_step(step, {"loss": 1 / step, "rate": 2e-4})
    assert calls == [100, 100], "fifty steps of two values each, twice"
    tracker.flush()
    assert calls == [100, 100, 40]
    assert curve(uri, ids["round/00"], "loss") == [(step, 1 / step) for step in range(1, 121)]


def test_a_ticket_shows_on_its_round_on_the_run_and_against_alive_weights(
    uri: str, begin: Callable[..., Mlflow]
) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    for round_, alive, score in ((0, 1000, 27.5), (1, 800, 27.25), (2, 640, 28.0)):
        tracker.begin_round(round_, {})
        tracker.log_ticket(
            round_, {"psnr/BSD68 s15": score, "alive_weights": alive, "weights/density/output.weight": alive / 1000}
        )
    run, nested = ids["run"], ids["round/01"]
    assert curve(uri, run, "psnr/BSD68 s15") == [(0, 27.5), (1, 27.25), (2, 28.0)]
    assert curve(uri, run, "alive_weights") == [(0, 1000), (1, 800), (2, 640)]
    assert curve(uri, run, "by_alive/psnr/BSD68 s15") == [(640, 28.0), (800, 27.25), (1000, 27.5)]
    assert curve(uri, nested, "psnr/BSD68 s15") == [(1, 27.25)]
    assert curve(uri, nested, "weights/density/output.weight") == [(1, 0.8)]
    assert not any(
        "density" in name or name == "by_alive/alive_weights" for name in client(uri).get_run(run).data.metrics
    )


def test_files_lie_with_their_round_or_their_run(uri: str, begin: Callable[..., Mlflow], tmp_path: Path) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    tracker.begin_round(3, {})
    tracker.log_file("tickets/03/ticket.json", b"{}", "round")
    tracker.log_file("config.yaml", b"seed: 0\n", "run")
    tracker.log_file("config.yaml", b"seed: 1\n", "run")
    look = client(uri)
    ticket = look.download_artifacts(ids["round/03"], "tickets/03/ticket.json", str(tmp_path))
    assert Path(ticket).read_bytes() == b"{}"
    config = look.download_artifacts(ids["run"], "config.yaml", str(tmp_path))
    assert Path(config).read_bytes() == b"seed: 1\n", "the second writing stands"
    assert [file.path for file in look.list_artifacts(ids["run"])] == ["config.yaml"]


def test_files_of_a_sqlite_store_lie_beside_it(
    begin: Callable[..., Mlflow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, store = tmp_path / "here", tmp_path / "store"
    here.mkdir()
    monkeypatch.chdir(here)
    tracker = begin(f"sqlite:///{store}/m.db")
    tracker.log_file("config.yaml", b"seed: 0\n", "run")
    tracker.end_run()
    assert [path.name for path in store.rglob("config.yaml")] == ["config.yaml"]
    assert list(here.iterdir()) == []


def test_a_reopened_run_holds_no_point_twice(uri: str, begin: Callable[..., Mlflow]) -> None:
    ids: dict[str, str] = {}
    ticket = {"psnr/BSD68": 27.5, "alive_weights": 900.0, "weights/density/a": 0.9}
    first = begin(uri, ids, ranks=4)
    first.begin_round(0, {})
    for step in range(1, 31):
        first.log_step(step, {"loss": 1 / step})
    first.log_ticket(0, ticket)
    first.log_ticket(0, ticket)
    before = dict(ids)

    second = begin(uri, ids, ranks=8)  # resumes from the commit at step 20
    assert second.begin_round(0, {"resumed": "1"}) == 30
    for step in range(21, 41):
        second.log_step(step, {"loss": 1 / step})
    second.log_ticket(0, ticket)
    second.flush()
    assert ids == before and len(runs_of(uri, ids["run"])) == 2
    assert curve(uri, ids["round/00"], "loss") == [(step, 1 / step) for step in range(1, 41)]
    for run in (ids["run"], ids["round/00"]):
        assert curve(uri, run, "psnr/BSD68") == [(0, 27.5)]
    assert curve(uri, ids["run"], "by_alive/psnr/BSD68") == [(900, 27.5)]
    assert curve(uri, ids["round/00"], "weights/density/a") == [(0, 0.9)]
    parent = client(uri).get_run(ids["run"])
    assert parent.data.params["ranks"] == "4" and parent.data.tags["changed.ranks"] == "8"
    assert client(uri).get_run(ids["round/00"]).data.tags["resumed"] == "1"


def test_an_ended_run_is_running_again_when_reopened(uri: str, begin: Callable[..., Mlflow]) -> None:
    ids: dict[str, str] = {}
    begin(uri, ids).end_run("KILLED")
    assert client(uri).get_run(ids["run"]).info.status == "KILLED"
    begin(uri, ids)
    assert client(uri).get_run(ids["run"]).info.status == "RUNNING"


def test_a_run_whose_id_got_lost_is_found_by_its_key(uri: str, begin: Callable[..., Mlflow]) -> None:
    ids: dict[str, str] = {}
    begin(uri, ids).begin_round(0, {})
    again = {"key": ids["key"]}
    begin(uri, again).begin_round(0, {})
    assert again == ids


def test_a_run_that_the_store_lost_gets_a_new_one_and_says_so(
    uri: str, begin: Callable[..., Mlflow], caplog: pytest.LogCaptureFixture
) -> None:
    ids: dict[str, str] = {}
    begin(uri, ids)
    old = ids["run"]
    client(uri).delete_run(old)
    begin(uri, ids)
    assert ids["run"] != old and f"has no run {old} any more" in caplog.text


def test_an_answer_lost_on_the_way_doubles_nothing(
    uri: str, begin: Callable[..., Mlflow], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def loses_the_first_answer(name: str) -> None:
        real, lost = getattr(MlflowClient, name), []

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            answer = real(self, *args, **kwargs)
            if not lost:
                lost.append(name)
                raise ConnectionResetError("the line broke after the server had done it")
            return answer

        monkeypatch.setattr(MlflowClient, name, call)

    monkeypatch.setattr(OUTBOX, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(OUTBOX, "LONGEST_PAUSE_SECONDS", 0.0)
    ids: dict[str, str] = {}
    loses_the_first_answer("create_run")
    tracker = begin(uri, ids)
    tracker.begin_round(0, {})
    loses_the_first_answer("log_batch")
    for step in (1, 2, 3):
        tracker.log_step(step, {"loss": 0.5})
        tracker.flush()
    tracker.end_run()
    assert len(runs_of(uri, ids["run"])) == 2
    assert curve(uri, ids["round/00"], "loss") == [(1, 0.5), (2, 0.5), (3, 0.5)]


class Line:
    """A wire from a port of our own to the server, laid late."""

    def __init__(self, port: int, target: str) -> None:
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._door = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._door.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(65536):
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()

    def close(self) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()


def test_a_dead_server_stops_nothing_and_gets_everything_later(
    server: str,
    begin: Callable[..., Mlflow],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(OUTBOX, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(OUTBOX, "LONGEST_PAUSE_SECONDS", 0.0)
    port = free_port()
    ids: dict[str, str] = {}
    tracker = begin(f"http://user:hunter22@127.0.0.1:{port}", ids, seed=0)
    assert tracker.begin_round(0, {}) == -1
    for step in range(1, 121):
        tracker.log_step(step, {"loss": 1 / step})
    tracker.log_ticket(0, {"psnr/BSD68": 27.5, "alive_weights": 900})
    tracker.log_file("ticket.json", b"{}", "round")
    assert len(caplog.records) == 1, "one outage, one warning"
    assert f"http://127.0.0.1:{port} is away or refuses" in caplog.text
    assert "Connection refused" in caplog.text
    assert "Training goes on; points are kept and sent when it is back. Check the server" in caplog.text
    assert "hunter22" not in caplog.text
    assert tracker.address() == f"http://127.0.0.1:{port}" and "run" not in ids

    line = Line(port, server)
    try:
        tracker.flush()
    finally:
        line.close()
    assert len(caplog.records) == 1, caplog.text
    assert curve(server, ids["round/00"], "loss") == [(step, 1 / step) for step in range(1, 121)]
    assert curve(server, ids["run"], "by_alive/psnr/BSD68") == [(900, 27.5)]
    assert client(server).get_run(ids["run"]).data.params == {"seed": "0"}
    assert [file.path for file in client(server).list_artifacts(ids["round/00"])] == ["ticket.json"]
    assert tracker.address().endswith(f"/runs/{ids['run']}")


def test_points_of_a_restart_during_an_outage_are_sorted_out_on_delivery(
    server: str, begin: Callable[..., Mlflow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OUTBOX, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(OUTBOX, "LONGEST_PAUSE_SECONDS", 0.0)
    ids: dict[str, str] = {}
    first = begin(server, ids)
    first.begin_round(0, {})
    for step in (1, 2, 3):
        first.log_step(step, {"loss": 1 / step})
    first.flush()
    port = free_port()
    second = begin(f"http://127.0.0.1:{port}", ids)
    assert second.begin_round(0, {}) == -1, "nobody there to ask"
    for step in (2, 3, 4):
        second.log_step(step, {"loss": 1 / step})
    line = Line(port, server)
    try:
        second.flush()
    finally:
        line.close()
    assert curve(server, ids["round/00"], "loss") == [(step, 1 / step) for step in (1, 2, 3, 4)]


def test_a_dead_server_is_not_asked_again_before_the_pause_is_over(
    begin: Callable[..., Mlflow], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    asked: list[str] = []

    def refuse(self: Any, name: str) -> None:
        asked.append(name)
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", refuse)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tracker = begin("http://127.0.0.1:9")
    assert len(asked) == 1
    counts = []
    for now[0] in (1.0, 4.9, 5.1, 14.9, 15.2, 34.9, 35.3):
        tracker.flush()
        counts.append(len(asked))
    assert counts == [1, 1, 2, 2, 3, 3, 4], "pauses of 5, 10 and 20 seconds"
    tracker.end_run()
    assert len(asked) == 5, "the end tries once more, pause or not"
    assert "the run ends while 0 points and 2 other records wait" in caplog.text


def test_what_waits_is_bounded_and_the_oldest_points_go_first(
    begin: Callable[..., Mlflow],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    server: str,
) -> None:
    monkeypatch.setattr(OUTBOX, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(OUTBOX, "LONGEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(OUTBOX, "OUTBOX_BYTES", 3000 * OUTBOX.POINT_BYTES)
    port = free_port()
    ids: dict[str, str] = {}
    tracker = begin(f"http://127.0.0.1:{port}", ids, seed=0)
    tracker.begin_round(0, {})
    for step in range(50):
        tracker.log_step(step, {f"v{i}": 1.0 for i in range(100)})
    assert caplog.text.count("the oldest is being forgotten") == 1
    line = Line(port, server)
    try:
        tracker.flush()
    finally:
        line.close()
    assert [step for step, _ in curve(server, ids["round/00"], "v0")] == list(range(20, 50))
    assert client(server).get_run(ids["run"]).data.params == {"seed": "0"}, "runs and params are never forgotten"


def test_a_refused_record_does_not_hold_up_the_others(
    uri: str, begin: Callable[..., Mlflow], caplog: pytest.LogCaptureFixture
) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    tracker.begin_round(0, {})
    client(uri).delete_run(ids["round/00"])
    tracker.log_step(1, {"loss": 0.5})
    tracker.log_ticket(0, {"psnr/BSD68": 27.5})
    tracker.end_run()
    assert "did not take points '' of round/00" in caplog.text
    client(uri).restore_run(ids["round/00"])
    assert curve(uri, ids["run"], "psnr/BSD68") == [(0, 27.5)]
    assert client(uri).get_run(ids["run"]).info.status == "FINISHED"


def test_a_file_that_cannot_be_kept_is_given_up_and_points_pass(
    begin: Callable[..., Mlflow],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(OUTBOX, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(OUTBOX, "LONGEST_PAUSE_SECONDS", 0.0)
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    uri, ids = f"sqlite:///{tmp_path}/m.db", dict[str, str]()
    tracker = begin(uri, ids)
    tracker.begin_round(0, {})
    tracker.log_file("ticket.json", b"{}", "round")
    for step in (1, 2):
        tracker.log_step(step, {"loss": 0.5})
        tracker.flush()
    assert curve(uri, ids["round/00"], "loss") == [(1, 0.5), (2, 0.5)]
    tracker.flush()
    assert "did not take file 'ticket.json' of round/00" in caplog.text
    tracker.end_run()
    assert "the run ends while" not in caplog.text


def test_names_values_and_texts_are_made_fit_for_mlflow(uri: str, begin: Callable[..., Mlflow]) -> None:
    ids: dict[str, str] = {}
    long = {f"p{i}": i for i in range(250)} | {"steps": list(range(9000))}
    tracker = begin(uri, ids, data={"train σ": [15, 25], "empty": {}}, **long)
    tracker.begin_round(0, {})
    tracker.log_step(1, {"loss/σ=15 (dB)": 1.5, "/a//../b": 2.0, "x" * 400: 3.0})
    tracker.log_step(1, {"infinite": float("inf"), "nan": float("nan"), "fine": 0.0})
    tracker.log_ticket(0, {f"weights/density/t{i}": 0.5 for i in range(1500)})
    tracker.flush()
    metrics = client(uri).get_run(ids["round/00"]).data.metrics
    steps = {name for name in metrics if not name.startswith("weights/density/")}
    assert steps == {"loss/σ_15 _dB_", "a/b", "x" * 250, "fine"}
    assert len(metrics) - len(steps) == 1500
    params = client(uri).get_run(ids["run"]).data.params
    assert len(params) == 253 and params["data.train σ"] == "[15, 25]" and params["data.empty"] == "{}"
    assert len(params["steps"]) == 6000 and params["steps"].startswith("[0, 1, 2")


def test_no_secret_reaches_a_run_or_a_reader(
    begin: Callable[..., Mlflow],
    sqlite: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sesame-open")
    uri, ids = sqlite, dict[str, str]()
    tracker = begin(uri, ids, tracking={"uri": "https://ada:hunter22@example.org/x"}, note="with sesame-open inside")
    params = client(uri).get_run(ids["run"]).data.params
    assert params == {"tracking.uri": "https://***@example.org/x", "note": "with *** inside"}
    assert tracker.address().startswith(f"{uri} (to see it: ")
    assert tracker.address().endswith(f"mlflow ui --backend-store-uri {uri})"), "this environment's own, where near"

    for secret_uri, clean in (
        ("http://ada:hunt%40r22@127.0.0.1:9/base", "http://127.0.0.1:9/base"),
        ("http://tokentoken@127.0.0.1:9", "http://127.0.0.1:9"),
        ("nosuchdb://ada:hunter22@127.0.0.1:9/runs?key=wordpass", "nosuchdb://ada@127.0.0.1:9/runs"),
    ):
        away = begin(secret_uri, ids)
        away.end_run()
        assert away.address().startswith(clean)
        told = caplog.text + away.address()
        assert clean in told
        for secret in ("hunter22", "hunt%40r22", "hunt@r22", "tokentoken", "wordpass", "sesame-open"):
            assert secret not in told


def test_a_folder_as_store_is_refused_with_the_way_out() -> None:
    for uri in ("./mlruns", "file:///srv/mlruns"):
        with pytest.raises(Fault, match="found the tracking URI .*mlruns.*keeps no runs in plain folders. Use sqlite"):
            Mlflow(uri=uri, experiment="e", run_name="r", remembered={}, remember=lambda ids: None)


def test_without_an_address_the_environment_decides_then_a_file_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for setting, address in (
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("", "sqlite:///mlflow.db (to see it"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", setting)
        tracker = Mlflow(uri=None, experiment="e", run_name="r", remembered={}, remember=lambda ids: None)
        assert tracker.address().startswith(address)


def test_the_silent_twin_answers_to_the_same_words() -> None:
    twin: Tracker = Silent()
    twin.begin_run({"seed": 0}, {})
    assert twin.begin_round(0, {}) == -1
    twin.log_step(1, {"loss": 1.0})
    twin.log_ticket(0, {"psnr": 1.0})
    twin.log_file("a", b"", "run")
    twin.flush()
    twin.end_round()
    twin.end_run("FAILED")
    assert twin.address() == ""
    words = [name for name in vars(Tracker) if not name.startswith("_")]
    assert all(callable(getattr(Mlflow, word)) for word in words) and len(words) == 9


def test_mlflow_is_imported_late_and_keeps_quiet(tmp_path: Path) -> None:
    story = """
import sys
from mirl_dist.tracking import Mlflow
assert "mlflow" not in sys.modules
tracker = Mlflow(uri=None, experiment="e", run_name="r", remembered={}, remember=lambda ids: None)
tracker.begin_run({}, {})
tracker.begin_round(0, {})
tracker.log_step(1, {"loss": 1.0})
tracker.log_file("a.txt", b"a", "run")
tracker.end_round()
tracker.end_run()
import mlflow
assert mlflow.active_run() is None
"""
    settings = {name: text for name, text in os.environ.items() if not name.startswith(("MLFLOW", "GIT"))}
    settings["PYTHONPATH"] = str(Path(tracking.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", story], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlartifacts", "mlflow.db"]


def test_warnings_are_told_on_our_own_logger(begin: Callable[..., Mlflow], caplog: pytest.LogCaptureFixture) -> None:
    begin("http://127.0.0.1:9")
    assert [(record.name, record.levelno) for record in caplog.records] == [("mirl_dist.tracking", logging.WARNING)]


def test_a_fault_between_rounds_leaves_the_finished_round_finished(uri: str, begin: Callable[..., Mlflow]) -> None:
    ids: dict[str, str] = {}
    tracker = begin(uri, ids)
    tracker.end_round("FAILED")  # before any round: there is nothing to end
    tracker.begin_round(0, {})
    tracker.end_round()
    tracker.end_round("FAILED")
    tracker.end_run("FAILED")
    assert client(uri).get_run(ids["round/00"]).info.status == "FINISHED"
    assert client(uri).get_run(ids["run"]).info.status == "FAILED"
