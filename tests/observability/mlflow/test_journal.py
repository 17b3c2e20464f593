"""The journal, alone and with real processes that are killed, real servers that die, and networks that lie."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import outbox, records, sender
from mirl_dist.observability.mlflow import tracker as tracking
from mirl_dist.observability.mlflow.journal import Journal, pending_records
from mirl_dist.observability.mlflow.outbox import Outbox
from mirl_dist.observability.mlflow.records import DamagedRecord, Record
from mirl_dist.observability.mlflow.resend import resend
from mirl_dist.observability.mlflow.segments import PendingRecord, Segment
from mirl_dist.observability.mlflow.tracker import MlflowTracker
from mirl_dist.storage.base import Unavailable
from tests.services import mlflow_client_program
from tests.services.faulty_proxy import FORBIDDEN, FaultyProxy, answer
from tests.services.mlflow_client_program import ROUNDS, STEPS, get
from tests.services.mlflow_server import MlflowServer, client, curve, runs_of

LIFE = "0123456789abcdef" * 2


def item(number: int, do: str = "points", **more: Any) -> Record:
    usual = {"points": [("loss", 1 / (number + 1), 5 * number, number)]} if do == "points" else {}
    return Record(do, "run", at_ms=1000 * number, id=f"{LIFE}-{number}", **(usual | more))


def read(entries: list[PendingRecord]) -> list[Record]:
    return [entry.read() for entry in entries]


def numbers(entries: list[PendingRecord]) -> list[int]:
    return [int(entry.id.rpartition("-")[2]) for entry in entries]


def until(holds: Callable[[], object]) -> None:
    last = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < last, "it never happened"
        time.sleep(0.01)


# -- the files --------------------------------------------------------------------------------------------------------


def test_a_later_life_reads_exactly_what_was_kept(tmp_path: Path) -> None:
    kept = [
        item(0, "open", name="demo", texts={"tag σ": "line\nbreak \ud800"}),
        item(1, points=[("loss/σ", 0.1 + 0.2, 1795273217019, 7), ("tiny", 5e-324, 0, 2**53)]),
        item(2, "file", name="tickets/00/ticket.json", data=bytes(range(256)) * 3),
        item(3, "file", name="empty", data=b""),
        item(4, "end", name="KILLED"),
    ]
    journal = Journal(tmp_path / "outbox")
    for one in kept:
        journal.append(one)
    later = Journal(tmp_path / "outbox")
    later.append(item(5))
    found = read(later.read_older())
    assert [vars(one) for one in found] == [vars(one) for one in kept]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "outbox").iterdir()}
    assert modes == {0o600} and (tmp_path / "outbox").stat().st_mode & 0o777 == 0o700


def test_a_segment_cut_anywhere_holds_all_that_was_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ends = [line.end for number in range(2) if (line := journal.append(item(number)).line)]
    path = tmp_path / "00000001.jsonl"
    whole = path.read_bytes()
    assert len(whole) == ends[-1]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert numbers(Journal(tmp_path).read_older()) == [n for n, end in enumerate(ends) if end <= cut]


def test_a_damaged_line_is_left_out_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    entries = [journal.append(item(number)) for number in range(4)]
    path = tmp_path / "00000001.jsonl"
    text = bytearray(path.read_bytes())
    assert entries[1].line is not None
    start = entries[1].line.start
    text[start + 5 : start + 40] = bytes(35)
    path.write_bytes(text)
    journal.close()
    later = Journal(tmp_path)
    assert pending_records(tmp_path).points == 3 and caplog.text == "", "who only looks tells nothing"
    assert later.lock() and numbers(later.read_older()) == [0, 2, 3]
    assert [record.message for record in caplog.records] == [f"{path}: 1 damaged lines are left out"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_line_however_damaged_is_more_than_damaged(data: st.DataObject) -> None:
    line = bytearray(records.to_line(item(3, "file", name="a/b", data=b"content")))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(line) - 1))
        line[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
        line = line or bytearray(b"0")
    try:
        found, _ = records.parse(bytes(line))
    except DamagedRecord:
        return
    assert found.kind in ("open", "params", "points", "ticket", "file", "end")
    assert ".." not in Path(found.name).parts and not Path(found.name).is_absolute()


@pytest.mark.parametrize(
    "said",
    [
        {"do": "file", "name": "../../x", "data": ""},
        {"do": "file", "name": "/etc/x", "data": ""},
        {"do": "file", "name": "x", "file": "../key", "size": 32},
        {"do": "run away"},
        {"where": "round/../x"},
        {"id": "7"},
        {"points": [["loss", float("inf"), 0, 0]]},
        {"points": [["loss", 1.0]]},
        [],
    ],
)
def test_a_line_that_no_run_has_said_is_damaged(said: Any) -> None:
    usual = {"do": "points", "where": "run", "id": f"{LIFE}-0", "at_ms": 0}
    with pytest.raises(DamagedRecord):
        records.parse(json.dumps(usual | said if isinstance(said, dict) else said).encode())
    records.parse(json.dumps(usual).encode())


def test_what_was_delivered_is_not_read_again_and_segments_that_are_through_go(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    entries = [first.append(item(n)) for n in range(5)] + [first.append(item(5, "file", name="a", data=b"a"))]
    first.note_sent(entries[:2])
    first.note_sent([entries[3], entries[5]])
    assert not list(tmp_path.glob("*.data")), "contents go with their delivery"
    sent = tmp_path / "00000001.sent"
    whole = sent.read_bytes()
    for cut in range(len(whole)):
        sent.write_bytes(whole[:cut])
        left = numbers(Journal(tmp_path).read_older())
        assert set(left) >= {2, 4}, "a torn note delivers again, and never forgets"
    with sent.open("ab") as stream:
        stream.write(b"\n[0, 1")  # killed while it noted
    second = Journal(tmp_path)
    second.append(item(9))
    left = second.read_older()
    assert numbers(left) == [2, 4]
    first.close()
    assert second.lock()
    second.note_sent(left[:1])
    assert numbers(Journal(tmp_path).read_older()) == [4, 9]
    second.note_sent(left[1:])
    assert [path.name for path in sorted(tmp_path.glob("0*"))] == ["00000002.jsonl"]
    assert second.known_ids([f"{LIFE}-{n}" for n in range(12)]) == {f"{LIFE}-{n}" for n in (0, 1, 2, 3, 4, 5, 9)}


def test_what_a_kill_left_of_a_removed_segment_is_cleared_up(tmp_path: Path) -> None:
    for name in ("00000003.sent", "00000003-12.data"):
        (tmp_path / name).write_text("[0, 10]")
    journal = Journal(tmp_path)
    assert journal.lock() and journal.read_older() == []
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_long_life_writes_several_segments_and_leaves_none_that_is_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirl_dist.observability.mlflow.journal.SEGMENT_BYTES", 300)
    journal = Journal(tmp_path)
    entries = [journal.append(item(number)) for number in range(10)]
    count = len(list(tmp_path.glob("*.jsonl")))
    assert count > 2
    assert numbers(Journal(tmp_path).read_older()) == list(range(10))
    journal.note_sent(entries[:9])
    assert len(list(tmp_path.glob("0*.jsonl"))) == 1
    assert numbers(Journal(tmp_path).read_older()) == [9]


def test_a_life_that_begins_its_segment_does_not_take_it_for_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, found, real = Journal(tmp_path), list[PendingRecord](), Segment.new
    assert journal.lock()
    sends = threading.Thread(target=lambda: found.extend(journal.read_older()))

    def slowly(folder: Path) -> Segment:
        made = real(folder)
        sends.start()
        sends.join(0.1)
        return made

    monkeypatch.setattr(Segment, "new", slowly)
    journal.append(item(0))
    sends.join()
    assert found == [] and numbers(Journal(tmp_path).read_older()) == [0]


def test_one_delivers_and_the_next_one_may_when_it_has_gone(tmp_path: Path) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)
    assert first.lock() and first.lock() and not second.lock()
    first.close()
    assert second.lock()


def test_all_lives_of_a_folder_know_one_key(tmp_path: Path) -> None:
    key = Journal(tmp_path).read_key()
    assert Journal(tmp_path).read_key() == key and Journal(tmp_path / "other").read_key() != key
    (tmp_path / "key").write_bytes(b"")  # a power cut
    again = Journal(tmp_path).read_key()
    assert len(again) == 32 and Journal(tmp_path).read_key() == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "other"]


def test_a_full_disk_costs_one_warning_and_nothing_half_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    box = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path))
    box.put_points("points", "run", [("loss", 1.0, 1)])
    full, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "00000001.jsonl").stat().st_size + 50, hard))
    try:
        box.put_points("points", "run", [("loss", 1.0, 2)])
        box.put(Record("file", "run", "a", data=bytes(4000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, hard))
    assert caplog.text.count(f"the journal {tmp_path} takes no more (File too large)") == 1
    assert "what the store is to hear waits in memory only. Make room" in caplog.text
    assert box.count_in_memory()[:2] == (1, 1)
    box.put_points("points", "run", [("loss", 1.0, 3)])
    assert [one.points[0][3] for one in read(Journal(tmp_path).read_older())] == [1, 3], "room again, journal again"
    lines, damaged = records.parse_all(box.pending_lines())
    assert [one.kind for one in lines] == ["points", "points", "file", "points"] and damaged == 0
    assert not list(tmp_path.glob("*.data"))


def test_the_clock_of_a_life_never_runs_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path))
    clock = iter([5_000, 9_000, 3_000, 8_000, 9_500])
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 1_000_000)
    for step in range(5):
        box.put_points("points", "run", [("loss", 1.0, step)])
    times = [one.points[0][2] for one in read(Journal(tmp_path).read_older())]
    assert times == [5_000, 9_000, 9_000, 9_000, 9_500]


# -- the backlog ------------------------------------------------------------------------------------------------------


def test_a_backlog_brings_all_that_waits_to_another_machine(tmp_path: Path) -> None:
    here = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path / "a"))
    assert here.pending_lines() == b""
    here.put(Record("open", "round/00", "round 00"))
    here.put_points("points", "round/00", [("loss", 0.5, 7)])
    here.put(Record("file", "round/00", "ticket.json", data=b"{}"))
    there = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path / "b"), here.pending_lines())
    assert records.parse_all(there.pending_lines())[0][2].data == b"{}"
    assert there.pending_lines() == here.pending_lines()
    assert numbers(Journal(tmp_path / "b").read_older()) == [0, 1, 2], "and it is in the journal there"


def test_a_backlog_leaves_out_the_largest_files_first_and_never_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path))
    for size in (2000, 9000, 4000, 10):
        box.put(Record("file", "run", f"f{size}", data=bytes(size)))
        box.put_points("points", "run", [(f"v{i}", 0.5, size) for i in range(20)])

    def kept() -> list[str]:
        return [one.name or "points" for one in records.parse_all(box.pending_lines())[0]]

    assert kept() == ["f2000", "points", "f9000", "points", "f4000", "points", "f10", "points"]
    monkeypatch.setattr(outbox, "MAX_PENDING_BYTES", 14_000)
    assert kept() == ["f2000", "points", "points", "f4000", "points", "f10", "points"]
    assert len(box.pending_lines()) <= 14_000
    monkeypatch.setattr(outbox, "MAX_PENDING_BYTES", 0)
    assert kept() == ["points"] * 4


def test_records_that_a_folder_knows_are_not_inherited_again_in_commit_order(tmp_path: Path) -> None:
    def steps(lines: bytes) -> list[int]:
        return [one.points[0][3] for one in records.parse_all(lines)[0]]

    here = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path / "here"))
    for step in range(6):
        here.put_points("points", "run", [("loss", 1.0, step)])
    everything = here.pending_lines().splitlines(True)
    here.mark_sent(here.next_batch(files=False, others=True)[:2])  # 0 and 1 are delivered
    committed = b"".join(everything[2:4])  # 4 and 5 came after the commit
    away = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path / "away"), committed)
    for step in (4, 5, 6):
        away.put_points("points", "run", [("loss", 2.0, step)])
    here.close()

    back = Outbox(
        "the store", uuid.uuid4().hex, Journal(tmp_path / "here"), b"".join(everything[:1]) + away.pending_lines()
    )
    back.put_points("points", "run", [("loss", 3.0, 7)])
    before = back.pending_lines()
    assert back.claim_older() and back.pending_lines() == before
    assert steps(before) == [2, 3, 4, 5, 6, 4, 5, 7], "those that were trained again after 2 and 3, as there"
    assert pending_records(tmp_path / "here").points == 8, "nothing is kept twice"
    back.close()
    turned = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path / "here"), b"".join(before.splitlines(True)[::-1]))
    assert turned.claim_older() and steps(turned.pending_lines()) == [7, 5, 4, 6, 5, 4, 3, 2]


def test_damage_in_a_commit_is_told_and_the_rest_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = records.to_line(item(0)) + b'{"torn\n' + records.to_line(item(1))
    box = Outbox("the store", uuid.uuid4().hex, Journal(tmp_path), lines)
    assert box.count()[:2] == (2, 0)
    assert "1 damaged lines that a commit kept for the store are left out" in caplog.text


# -- where it lies, and what it says ----------------------------------------------------------------------------------


def test_anybody_may_look_what_waits_while_the_run_lives_and_when_it_is_dead(tmp_path: Path) -> None:
    assert pending_records(tmp_path / "none") == (0, 0, None)
    journal = Journal(tmp_path)
    assert journal.lock()
    journal.append(item(3))
    journal.append(item(4, "end", name="FINISHED"))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert pending_records(tmp_path) == (1, 1, 3.0)
    journal.close()
    assert pending_records(tmp_path) == (1, 1, 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="found the journal .*file, which cannot be read: Not a directory. Ask its owner"
    ):
        pending_records(tmp_path / "file")


# -- with a server ----------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.url, seed=4) as between:
        yield between


class Run:
    """A run in an experiment named after the test; `ids` plays its store's memory."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.ids = name, folder, dict[str, str]()
        self.trackers: list[MlflowTracker] = []

    def tracker(
        self,
        uri: str,
        journal: str = "outbox",
        inherited: bytes = b"",
        remember: Callable[[dict[str, str]], None] | None = None,
    ) -> MlflowTracker:
        tracker = MlflowTracker(
            uri=uri,
            experiment=self.name,
            run_name="demo",
            remembered=self.ids,
            remember=remember or self.ids.update,
            journal=self.folder / journal,
            inherited=inherited,
        )
        self.trackers.append(tracker)
        return tracker

    def begin(self, *arguments: Any, **more: Any) -> MlflowTracker:
        tracker = self.tracker(*arguments, **more)
        tracker.begin_run({"seed": 0}, {})
        return tracker

    def waits(self, journal: str = "outbox") -> tuple[int, int]:
        return pending_records(self.folder / journal)[:2]

    def resend(self, uri: str, journal: str = "outbox", inherited: bytes = b"") -> tuple[str, list[str]]:
        said: list[str] = []
        resend(uri, self.name, "demo", self.ids, self.ids.update, self.folder / journal, inherited, said.append)
        return said[-1], said


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Its trackers are patient at the end, and impatient before."""
    monkeypatch.setattr(sender, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(sender, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(sender, "LOCK_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "FAREWELL_SECONDS", 60.0)
    made = Run(request.node.name, tmp_path)
    yield made
    for tracker in made.trackers:
        tracker.end_run(seconds=0.0)


def log(tracker: MlflowTracker, steps: range, value: float = 1.0) -> None:
    for step in steps:
        tracker.log_step(step, {"loss": value / step})


def whole(uri: str, run: str, last: int) -> bool:
    return curve(uri, run, "loss") == [(step, 1 / step) for step in range(1, last + 1)]


def test_the_caller_never_waits_for_a_server_that_is_silent(run: Run, proxy: FaultyProxy) -> None:
    proxy.silent = True
    tracker = run.begin(proxy.url)
    tracker.begin_round(0, {})
    until(lambda: proxy.silences)  # the other thread waits for an answer that never comes
    log(tracker, range(1, 201))
    tracker.log_ticket(0, {"psnr/BSD68": 27.5, "alive_weights": 900})
    tracker.log_file("ticket.json", b"{}", "round")
    tracker.flush()
    tracker.end_round()
    tracker.end_run(seconds=0.0)
    assert run.waits() == (200 + 2 + 3, 6), "all of it is in the journal"
    proxy.drop()


def test_a_server_killed_in_the_middle_of_a_round_gets_every_step_once(run: Run, server: MlflowServer) -> None:
    tracker = run.begin(server.url)
    tracker.begin_round(0, {})
    log(tracker, range(1, 51))
    tracker.flush()
    server.kill()
    log(tracker, range(51, 101))
    tracker.log_file("ticket.json", b"{}", "round")
    server.start()
    log(tracker, range(101, 121))
    tracker.end_round()
    tracker.end_run()
    assert run.waits() == (0, 0) and whole(server.url, run.ids["round/00"], 120)
    assert [file.path for file in client(server.url).list_artifacts(run.ids["round/00"])] == ["ticket.json"]
    assert sorted(path.name for path in run.folder.joinpath("outbox").iterdir()) == ["gone.jsonl", "key", "lock"]


def test_a_slow_server_gets_everything(run: Run, server: MlflowServer, proxy: FaultyProxy) -> None:
    proxy.latency = 0.05
    tracker = run.begin(proxy.url)
    tracker.begin_round(0, {})
    log(tracker, range(1, 101))
    assert run.waits()[0] > 0, "it is behind"
    tracker.end_run()
    assert run.waits() == (0, 0) and whole(server.url, run.ids["round/00"], 100)


def test_a_refusing_server_is_asked_again_and_gives_one_warning(
    run: Run, server: MlflowServer, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = run.begin(proxy.url)
    tracker.begin_round(0, {})
    for step, (status, code) in enumerate(((500, "InternalError"), FORBIDDEN, (502, "BadGateway"), (404, "NotFound"))):
        until(lambda: run.waits() == (0, 0))
        caplog.clear()
        said, proxy.always = proxy.answered, answer(status, code)
        log(tracker, range(step + 1, step + 2))
        tracker.flush()
        until(lambda said=said: proxy.answered > said + 3)
        assert [f"{status}" in record.message for record in caplog.records] == [True], caplog.text
        proxy.always = None
        until(lambda: "is back: all that waited is sent" in caplog.text)
    assert whole(server.url, run.ids["round/00"], 4)


def test_answers_that_get_lost_double_nothing(run: Run, server: MlflowServer, proxy: FaultyProxy) -> None:
    proxy.cut_every, proxy.cut_within = 5, 60
    tracker = run.begin(proxy.url)
    tracker.begin_round(0, {})
    for start in range(1, 100, 10):
        log(tracker, range(start, start + 10))
        tracker.flush()
        left = run.waits()
        until(lambda left=left: run.waits() < left or run.waits() == (0, 0))
    tracker.log_file("ticket.json", b"{}", "round")
    tracker.end_run()
    assert proxy.cuts > 3 and run.waits() == (0, 0)
    assert len(runs_of(server.url, run.ids["run"])) == 2
    assert whole(server.url, run.ids["round/00"], 100)


@pytest.mark.parametrize("lost", ["everything", "runs"])
def test_a_server_that_was_emptied_gets_the_run_anew(
    lost: str, run: Run, server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = run.begin(server.url)
    tracker.begin_round(0, {"sparsity": "0.2"}, {"round": 0})
    log(tracker, range(1, 11))
    tracker.flush()
    until(lambda: run.waits() == (0, 0))
    old = dict(run.ids)
    with sqlite3.connect(server.database) as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs", "experiment_tags"):
            database.execute(f"DELETE FROM {table}")
        if lost == "everything":
            database.execute("DELETE FROM experiments WHERE name = ?", (run.name,))
    database.close()
    tracker.begin_round(1, {})
    log(tracker, range(11, 21))
    tracker.log_ticket(0, {"psnr/BSD68": 27.5})
    tracker.end_run()
    assert run.waits() == (0, 0) and "did not take" not in caplog.text
    assert old["run"] != run.ids["run"] and old["key"] == run.ids["key"]
    look = client(server.url)
    assert look.get_run(run.ids["run"]).data.params == {"seed": "0"}
    assert look.get_run(run.ids["round/00"]).data.tags["sparsity"] == "0.2"
    assert look.get_run(run.ids["round/00"]).data.params == {"round": "0"}
    for nested in ("round/00", "round/01"):
        assert look.get_run(run.ids[nested]).data.tags["mlflow.parentRunId"] == run.ids["run"]
    assert [step for step, _ in curve(server.url, run.ids["round/01"], "loss")] == list(range(11, 21))
    assert curve(server.url, run.ids["run"], "round/psnr/BSD68") == [(0, 27.5)]


def test_ids_that_cannot_be_remembered_are_remembered_later(
    run: Run, server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def remember(new: dict[str, str]) -> None:
        tries.append(new)
        if len(tries) % 3:
            raise Unavailable("the bucket is away. Start again.")
        run.ids.update(new)

    tracker = run.begin(server.url, remember=remember)
    tracker.begin_round(0, {})
    log(tracker, range(1, 11))
    tracker.end_run()
    assert "because the ids of its runs could not be kept (the bucket is away. Start again.)" in caplog.text
    assert run.waits() == (0, 0) and len(runs_of(server.url, run.ids["run"])) == 2
    assert whole(server.url, run.ids["round/00"], 10) and len(tries) >= 9


def test_a_life_waits_for_a_dying_one_to_let_the_journal_go(run: Run, server: MlflowServer, proxy: FaultyProxy) -> None:
    proxy.refuse()
    dying = run.begin(proxy.url)
    dying.begin_round(0, {})
    log(dying, range(1, 31))
    next_ = run.begin(server.url)
    next_.begin_round(0, {})
    log(next_, range(21, 41), value=7.0)
    next_.flush()
    assert run.waits()[0] == 50 and run.ids == {}, "two deliver never at once"
    dying.end_run(seconds=0.0)
    next_.end_run()
    assert run.waits() == (0, 0) and len(runs_of(server.url, run.ids["run"])) == 2
    assert curve(server.url, run.ids["round/00"], "loss") == [
        (step, 1 / step if step <= 30 else 7 / step) for step in range(1, 41)
    ], "a point that was trained again replaces nothing, although nobody had heard the first one"


def test_a_new_life_sends_what_was_left_before_it_says_anything_itself(run: Run, server: MlflowServer) -> None:
    left = Outbox("the store", uuid.uuid4().hex, Journal(run.folder / "outbox"))
    left.put(Record("open", "run", "demo"))
    left.put_points("points", "run", [("loss", 1.0, 1)])
    left.close()
    run.tracker(server.url)
    until(lambda: run.waits() == (0, 0))
    assert curve(server.url, run.ids["run"], "loss") == [(1, 1.0)]


def test_a_life_that_began_before_the_run_was_known_finds_what_a_dying_one_has_made(
    run: Run, server: MlflowServer, proxy: FaultyProxy
) -> None:
    proxy.refuse()
    dying = run.begin(proxy.url)
    assert run.ids == {}
    next_ = run.begin(server.url)
    proxy.accept()
    dying.end_run("KILLED")
    made = dict(run.ids)
    next_.end_run()
    assert run.ids == made and len(runs_of(server.url, made["run"])) == 1
    assert client(server.url).get_run(made["run"]).info.status == "FINISHED"


def test_a_backlog_goes_on_elsewhere_and_the_old_journal_does_no_harm(
    run: Run, server: MlflowServer, proxy: FaultyProxy
) -> None:
    proxy.refuse()
    first = run.begin(proxy.url, "machine-a")
    first.begin_round(0, {})
    first.log_file("config.yaml", b"seed: 0", "run")
    log(first, range(1, 21))
    commit = first.pending()
    log(first, range(21, 31))
    first.end_run("KILLED", seconds=0.0)
    second = run.begin(server.url, "machine-b", commit)
    second.begin_round(0, {})
    log(second, range(21, 41), value=7.0)
    second.end_run()
    expected = [(step, (1 if step <= 20 else 7) / step) for step in range(1, 41)]
    assert curve(server.url, run.ids["round/00"], "loss") == expected
    assert [file.path for file in client(server.url).list_artifacts(run.ids["run"])] == ["config.yaml"]
    assert run.resend(server.url, "machine-a")[0] == f"sent 30 points and 5 other records to {server.url}"
    assert curve(server.url, run.ids["round/00"], "loss") == expected
    assert client(server.url).get_run(run.ids["run"]).info.status == "FINISHED", "the last word stands"
    assert len(runs_of(server.url, run.ids["run"])) == 2


# -- lives that are killed --------------------------------------------------------------------------------------------


class Lives:
    """Starts lives of a run (tests/services/mlflow_client_program.py) as processes."""

    def __init__(self) -> None:
        script = str(Path(mlflow_client_program.__file__))
        settings = {name: text for name, text in os.environ.items() if not name.startswith("MLFLOW")}
        self._warm = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings
        )

    def _ask(self, question: Mapping[str, Any]) -> int:
        assert self._warm.stdin and self._warm.stdout
        print(json.dumps(question), file=self._warm.stdin, flush=True)
        return int(self._warm.stdout.readline())

    def begin(self, uri: str, folder: Path, journal: Path, **more: Any) -> int:
        folder.mkdir(exist_ok=True)
        return self._ask({"uri": uri, "run": str(folder), "journal": str(journal)} | more)

    def end(self, pid: int) -> int:
        """The exit code, once it has one."""
        return self._ask({"ended": pid})

    def close(self) -> None:
        self._warm.kill()
        self._warm.communicate()


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    started = Lives()
    try:
        yield started
    finally:
        started.close()


def expect_whole(uri: str, ids: Mapping[str, str]) -> None:
    """Every step of every curve exactly once, every file, one parent and one nested run per round, all ended."""
    look = client(uri)
    everything = runs_of(uri, ids["run"])
    assert sorted(run.info.run_id for run in everything) == sorted(ids[name] for name in ids if name != "key")
    assert {run.info.status for run in everything} == {"FINISHED"}
    assert look.get_run(ids["run"]).data.params == {"seed": "0"}
    assert [file.path for file in look.list_artifacts(ids["run"])] == ["config.yaml", "images"]
    assert len(look.list_artifacts(ids["run"], "images")) == 2 * ROUNDS, "each picture and its small one, once"
    assert curve(uri, ids["run"], "round/psnr/BSD68") == [(n, 27.0 + n) for n in range(ROUNDS)]
    assert curve(uri, ids["run"], "psnr/BSD68") == [(1000 - 100 * n, 27.0 + n) for n in reversed(range(ROUNDS))]
    for round_ in range(ROUNDS):
        nested = ids[f"round/{round_:02d}"]
        assert look.get_run(nested).data.tags["mlflow.parentRunId"] == ids["run"]
        assert look.get_run(nested).data.params == {"round": str(round_)}
        for name in ("loss", "rate", "life"):
            assert [step for step, _ in curve(uri, nested, name)] == list(range(1, STEPS + 1)), (round_, name)
        assert [step for step, _ in curve(uri, nested, "psnr/BSD68")] == [round_]
        assert [f.path for f in look.list_artifacts(nested, f"tickets/{round_:02d}")] == [
            f"tickets/{round_:02d}/ticket.json"
        ]


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.long
def test_a_job_killed_again_and_again_tells_every_step_once(
    machines: int, lives: Lives, tmp_path: Path, server: MlflowServer, proxy: FaultyProxy
) -> None:
    chance = random.Random(machines)
    folder = tmp_path / f"job-{machines}"
    proxy.cut_every, proxy.cut_within = 7, 60
    for life in range(8):
        if life == 3:
            proxy.refuse()
        if life == 5:
            proxy.accept()
        pid = lives.begin(
            proxy.url,
            folder,
            tmp_path / f"outbox-{life % machines}",
            die_at=chance.randrange(25),
            linger=chance.choice([0.0, 0.0, 0.1, 0.3]),
        )
        assert lives.end(pid) == -signal.SIGKILL
    pid = lives.begin(proxy.url, folder, tmp_path / "outbox-0")
    assert lives.end(pid) == 0
    ids = get(folder / "tracking.json", {})
    expect_whole(server.url, ids)
    if machines == 1:
        assert pending_records(tmp_path / "outbox-0") == (0, 0, None)
        assert not list((tmp_path / "outbox-0").glob("0*")), "nothing is left of it"


def test_what_a_dead_job_left_can_be_sent_but_not_while_it_lives(
    lives: Lives, tmp_path: Path, server: MlflowServer, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.refuse()
    folder, journal = tmp_path / "left", tmp_path / "outbox"
    pid = lives.begin(proxy.url, folder, journal, die_at=20, hold=True)
    until(lambda: pending_records(journal).points == 60)
    monkeypatch.setattr("mirl_dist.observability.mlflow.resend.RESEND_SECONDS", 0.2)
    monkeypatch.setattr(sender, "FIRST_PAUSE_SECONDS", 0.02)
    ids, said = dict[str, str](), list[str]()

    def send(uri: str) -> Any:
        return resend(uri, "left", "demo", ids, ids.update, journal, b"", said.append)

    with pytest.raises(UserError, match=f"found the journal {journal} in use: the run lives and sends by itself.*Wait"):
        send(server.url)
    os.kill(pid, signal.SIGKILL)
    assert lives.end(pid) == -signal.SIGKILL
    with pytest.raises(
        UserError, match="away or refusing .*refused.*: 60 points and 5 other records still wait"
    ) as away:
        send(proxy.url)
    assert away.value.resumable and pending_records(journal)[:2] == (60, 5)

    assert send(server.url)[:2] == (60, 5)
    assert said.pop() == f"sent 60 points and 5 other records to {server.url}"
    assert [step for step, _ in curve(server.url, ids["round/00"], "loss")] == list(range(1, 21))
    assert client(server.url).get_run(ids["run"]).info.status == "RUNNING", "nobody has said how it ended"
    assert send(server.url)[:2] == (0, 0) and said.pop() == f"nothing waits for {server.url} in {journal}"

    pid = lives.begin(proxy.url, folder, journal, farewell=0.0)
    assert lives.end(pid) == 0
    assert pending_records(journal).points > 0
    send(server.url)
    expect_whole(server.url, ids)
