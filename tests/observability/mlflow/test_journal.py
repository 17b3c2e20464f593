"""The journal, alone and with real processes that are killed, real servers that die, and networks that lie."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirl_dist.errors import UserError
from mirl_dist.observability.mlflow import database, outbox, records, sender
from mirl_dist.observability.mlflow import tracker as tracking
from mirl_dist.observability.mlflow.database import FILE
from mirl_dist.observability.mlflow.journal import Journal, pending_records
from mirl_dist.observability.mlflow.outbox import Outbox
from mirl_dist.observability.mlflow.records import DamagedRecord, Record
from mirl_dist.observability.mlflow.tracker import MlflowTracker, resend
from mirl_dist.storage.base import Unavailable
from tests.services import mlflow_client_program
from tests.services.faulty_proxy import FORBIDDEN, FaultyProxy, answer
from tests.services.mlflow_client_program import ROUNDS, STEPS, get
from tests.services.mlflow_server import MlflowServer, client, curve, runs_of, tracker_of
from tests.services.waiting import until

SESSION = "0123456789abcdef" * 2


def item(number: int, do: str = "points", **more: Any) -> Record:
    usual = {"points": [("loss", 1 / (number + 1), 5 * number, number)]} if do == "points" else {}
    return Record(do, "run", at_ms=1000 * number, id=f"{SESSION}-{number}", **(usual | more))


def new_outbox(folder: Path, inherited: bytes = b"") -> Outbox:
    return Outbox("the store", uuid.uuid4().hex, Journal(folder), inherited)


def put_steps(box: Outbox, *steps: int, value: float = 1.0) -> None:
    for step in steps:
        box.put_points("points", "run", [("loss", value, step)])


def steps_of(lines: bytes) -> list[int]:
    return [record.points[0][3] for record in records.parse_all(lines)[0] if record.points]


def read(journal: Journal) -> list[Record]:
    """What waits."""
    waiting, damaged = records.parse_all(journal.lines(2**30))
    assert damaged == 0
    return waiting


def numbers(journal: Journal) -> list[int]:
    return [int(record.id.rpartition("-")[2]) for record in read(journal)]


# -- the database -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "networked"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system of the tests is taken for: it decides whether there is a write-ahead log."""
    if request.param == "networked":
        monkeypatch.setattr(database, "LOCAL_DISKS", set[str]())
    return str(request.param)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_later_process_reads_exactly_what_was_kept(tmp_path: Path, disk: str) -> None:
    kept = [
        item(0, "open", name="demo", texts={"tag σ": "line\nbreak \ud800"}),
        item(1, points=[("loss/σ", 0.1 + 0.2, 1795273217019, 7), ("tiny", 5e-324, 0, 2**53)]),
        item(2, "end", name="KILLED"),
        item(3, "file", name="tickets/00/ticket.json", data=bytes(range(256)) * 3),
        item(4, "file", name="empty", data=b""),
    ]
    folder = tmp_path / "outbox"
    journal = Journal(folder)
    journal.append(kept[:2])
    journal.append(kept[2:])
    assert folder.joinpath(f"{FILE}-wal").exists() == (disk == "local")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    later = Journal(folder)
    assert [vars(one) for one in read(later)] == [vars(one) for one in kept]
    assert later.read_key() == journal.read_key() != Journal(tmp_path / "other").read_key()


def test_what_append_has_returned_for_survives_the_death_of_its_process(tmp_path: Path, disk: str) -> None:
    program = """
import sys
from pathlib import Path
from mirl_dist.observability.mlflow import database
from mirl_dist.observability.mlflow.journal import Journal
from mirl_dist.observability.mlflow.records import Record
if sys.argv[2] == "networked":
    database.LOCAL_DISKS.clear()
journal = Journal(Path(sys.argv[1]))
first = int(sys.argv[3])
for number in range(first, first + 10**6):
    points = [("loss", 1.0, 0, number)]
    journal.append([Record("points", "run", points=points, id=f"{'0' * 32}-{number}")])
    print(number, flush=True)
"""
    chance, returned = random.Random(disk), -1
    for _ in range(5):
        command = [sys.executable, "-c", program, str(tmp_path), disk, str(returned + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.1))
            process.kill()
            rest = process.stdout.read()
        returned = int(rest.split("\n")[-2]) if "\n" in rest else returned + 1
        waiting = pending_records(tmp_path).points
        assert waiting - (returned + 1) in (0, 1), "all that append returned for, and perhaps the one under way"
        returned = waiting - 1
    assert numbers(Journal(tmp_path)) == list(range(returned + 1))


def test_what_was_delivered_is_not_delivered_again(tmp_path: Path, disk: str) -> None:
    first = Journal(tmp_path)
    everything = [item(n) for n in range(6)] + [item(6, "file", name="a", data=bytes(10**6))]
    first.append(everything)
    for sent in (everything[:2], [everything[3], everything[6]], [everything[2]]):
        first.mark_sent(sent)
    second = Journal(tmp_path)
    assert numbers(first) == numbers(second) == [4, 5]
    second.inherit([*everything, item(9)])
    assert numbers(second) == [4, 5, 9], "nor what a commit had pending before"
    second.mark_sent(second.next_batch(is_file=False))
    first.close()
    second.close()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert tmp_path.joinpath(FILE).stat().st_size < 100_000, "and no room is taken for it"


def test_processes_deliver_in_turn_and_leave_alone_what_later_ones_append(tmp_path: Path, disk: str) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)
    assert first.lock() and first.lock() and not second.lock()
    first.append([item(0)])
    second.append([item(10)])
    first.append([item(1)])
    assert numbers(first) == [0, 1] and numbers(second) == [0, 1, 10]
    first.close()
    assert second.lock()


def test_a_forked_process_leaves_the_journal_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([item(0)])
    child = os.fork()
    if child == 0:
        try:
            journal.append([item(1)])
        except OSError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert numbers(journal) == [0]


@pytest.mark.long
def test_a_hundred_thousand_records_are_sent_in_little_memory(tmp_path: Path) -> None:
    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    journal, count = Journal(tmp_path), 100_000
    for start in range(0, count, 10_000):
        journal.append([item(number) for number in range(start, start + 10_000)])
    journal.close()
    box, sent, before = new_outbox(tmp_path), 0, memory()
    assert box.claim() and box.count().points == count
    while batch := box.next_batch(files=True, others=True):
        assert [int(record.id[33:]) for record in batch] == list(range(sent, sent + 1000))
        sent += len(batch)
        box.mark_sent(batch)
        assert memory() < before + 16 * 2**20
    assert sent == count
    box.journal.close()


def test_a_damaged_record_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    journal.append([item(number) for number in range(4)])
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE records SET line = '{\"id' WHERE number = 1")
    connection.close()
    assert [record.id[33:] for record in journal.next_batch(is_file=False)] == ["0", "2", "3"]
    assert caplog.text.count(f"{tmp_path}: record {SESSION}-1 is damaged") == len(caplog.records) == 1
    assert journal.count().points == 3


@pytest.mark.parametrize("damage", ["another file", "cut short", "overwritten", "overwritten while open"])
def test_a_damaged_database_is_set_aside_with_one_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, path = Journal(tmp_path), tmp_path / FILE
    before.append([item(number) for number in range(1000)])
    box = new_outbox(tmp_path)
    if damage == "overwritten while open":
        put_steps(box, 0)
        before.checkpoint()
        before.append([item(1000)])  # the pages that `box` has read are out of date
    else:
        before.close()
    whole = path.read_bytes()
    path.write_bytes(
        {"another file": b"no database" * 1000, "cut short": whole[: len(whole) // 2 // 4096 * 4096]}.get(
            damage, whole[:4096] + random.Random(0).randbytes(100_000) + whole[104_096:]
        )
    )
    if damage != "overwritten while open":
        with pytest.raises(UserError, match=rf"found the journal {path} damaged .*The next launch .*`mirl-dist track"):
            pending_records(tmp_path)
    box.next_batch(files=True, others=True)
    put_steps(box, 1, 2)
    assert box.count_in_memory().points == 0 and steps_of(box.pending_lines()) == [1, 2]
    [aside] = [path for path in tmp_path.glob(f"{FILE}.damaged-*") if path.name.count("-") == 1]
    assert len(caplog.records) == 1, caplog.text
    assert f"the journal {path} is damaged (" in caplog.text and f"set aside as {aside}. MLflow does" in caplog.text
    assert f"Read what is left with `sqlite3 {aside} .recover`, or remove it." in caplog.text
    before.close()
    box.journal.close()
    assert pending_records(tmp_path).points == 2


def test_a_full_disk_costs_one_warning_and_stops_no_delivery(
    small: Path, disk: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "DISK_PAUSE_SECONDS", 0.0)
    earlier = Journal(small / "outbox")
    earlier.append([item(number) for number in range(1200)])
    earlier.close()
    box = new_outbox(small / "outbox")
    assert box.claim() and box.count().points == 1200
    with small.joinpath("filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
        while filler.write(bytes(512)):
            pass
    put_steps(box, 1200)
    box.put(Record("file", "run", "a", data=bytes(100_000)))
    put_steps(box, 1201)
    waits = box.count_in_memory()
    assert waits.points >= 1 and waits.records == 1, caplog.text
    assert caplog.text.count(f"the journal {small / 'outbox'} takes no more (") == len(caplog.records) == 1
    assert "records for the store wait in memory only. Make room" in caplog.text
    assert steps_of(box.pending_lines()) == list(range(1202))

    box.mark_sent(box.next_batch(files=False, others=True))
    assert steps_of(box.pending_lines()) == list(range(1000, 1202)), "delivered, whether the disk knows it or not"
    small.joinpath("filler").unlink()
    put_steps(box, 1202)
    box.move_to_disk()
    assert box.count_in_memory().since is None, "room again, journal again"
    box.mark_sent(box.next_batch(files=True, others=False))
    box.journal.close()
    assert steps_of(new_outbox(small / "outbox").pending_lines()) == list(range(1000, 1203))


def test_a_database_that_another_process_blocks_holds_up_nobody(
    tmp_path: Path, disk: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = new_outbox(tmp_path)
    put_steps(box, 0)
    blocker = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    put_steps(box, *range(1, 100))
    assert time.monotonic() - start < 2.0, "one wait for all of them"
    assert box.count_in_memory().points == 99 and "(database is locked)" in caplog.text
    blocker.execute("ROLLBACK")
    blocker.close()
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + outbox.DISK_PAUSE_SECONDS)
    put_steps(box, 100)
    box.move_to_disk()
    assert steps_of(Journal(tmp_path).lines(2**30)) == list(range(101)) and len(caplog.records) == 1


@pytest.mark.parametrize("ended", ["not yet", "by a kill", "well"])
def test_anybody_may_look_what_waits_and_nothing_is_touched(ended: str, small: Path, disk: str) -> None:
    def state() -> dict[str, bytes]:
        return {path.name: b"" if path.name.endswith("-shm") else path.read_bytes() for path in folder.iterdir()}

    folder = small / "outbox"
    assert pending_records(folder) == (0, 0, None)
    journal = Journal(small / "first")
    journal.append([item(3), item(4, "end", name="FINISHED")])
    if ended == "well":
        journal.close()
    if ended == "by a kill":  # as the kernel leaves the files; nobody has them open
        shutil.copytree(small / "first", folder)
    else:
        folder = small / "first"
    for folder_mode in ("rw", "ro"):
        if folder_mode == "ro" and ended != "not yet":
            journal.close()
            subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        before = {} if ended == "not yet" else state()  # to open a file here would drop SQLite's locks on it
        assert pending_records(folder) == (1, 1, 3.0)
        assert before == ({} if ended == "not yet" else state())


def test_a_journal_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="journal .*file, which cannot be read: Not a directory. Ask its owner"):
        pending_records(tmp_path / "file")


# -- lines ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_line_however_damaged_is_more_than_damaged(data: st.DataObject) -> None:
    line = bytearray(records.to_line(item(3, "file", name="a/b", data=b"content")))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(line) - 1))
        line[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
        line = line or bytearray(b"0")
    try:
        record = records.parse(bytes(line))
    except DamagedRecord:
        return
    assert record.kind in ("open", "params", "points", "ticket", "file", "end")
    assert ".." not in Path(record.name).parts and not Path(record.name).is_absolute()


@pytest.mark.parametrize(
    "changes",
    [
        {"do": "file", "name": "../../x", "data": ""},
        {"do": "file", "name": "/etc/x", "data": ""},
        {"do": "run away"},
        {"where": "round/../x"},
        {"id": "7"},
        {"at_ms": 2**64},
        {"points": [["loss", float("inf"), 0, 0]]},
        {"points": [["loss", 1.0]]},
        [],
    ],
)
def test_a_line_that_no_run_writes_is_damaged(changes: Any) -> None:
    usual = {"do": "points", "where": "run", "id": f"{SESSION}-0", "at_ms": 0}
    with pytest.raises(DamagedRecord):
        records.parse(json.dumps(usual | changes if isinstance(changes, dict) else changes).encode())
    records.parse(json.dumps(usual).encode())


def test_a_backlog_brings_all_that_waits_to_another_machine(tmp_path: Path) -> None:
    here = new_outbox(tmp_path / "a")
    assert here.pending_lines() == b""
    here.put(Record("open", "run", "demo"))
    put_steps(here, 7)
    here.put(Record("file", "run", "ticket.json", data=b"{}"))
    there = new_outbox(tmp_path / "b", here.pending_lines())
    assert records.parse_all(there.pending_lines())[0][2].data == b"{}"
    assert there.pending_lines() == here.pending_lines()
    assert numbers(Journal(tmp_path / "b")) == [0, 1, 2], "and it is in the journal there"


def test_a_backlog_leaves_out_the_largest_files_first_and_never_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = new_outbox(tmp_path)
    for size in (2000, 9000, 4000, 10):
        box.put(Record("file", "run", f"f{size}", data=bytes(size)))
        box.put_points("points", "run", [(f"v{i}", 0.5, size) for i in range(20)])

    def kept() -> list[str]:
        return [one.name or "points" for one in records.parse_all(box.pending_lines())[0]]

    assert kept() == ["points"] * 4 + ["f2000", "f9000", "f4000", "f10"]
    monkeypatch.setattr(outbox, "MAX_PENDING_BYTES", 14_000)
    assert kept() == ["points"] * 4 + ["f2000", "f4000", "f10"]
    assert len(box.pending_lines()) <= 14_000
    monkeypatch.setattr(outbox, "MAX_PENDING_BYTES", 0)
    assert kept() == ["points"] * 4


def test_records_that_a_folder_knows_are_not_inherited_again_in_commit_order(tmp_path: Path) -> None:
    here = new_outbox(tmp_path / "here")
    put_steps(here, *range(6))
    everything = here.pending_lines().splitlines(True)
    assert here.claim()
    here.mark_sent(here.next_batch(files=False, others=True)[:2])  # 0 and 1 are delivered
    committed = b"".join(everything[2:4])  # 4 and 5 came after the commit
    away = new_outbox(tmp_path / "away", committed)
    put_steps(away, 4, 5, 6, value=2.0)
    here.journal.close()

    back = new_outbox(tmp_path / "here", b"".join(everything[:1]) + away.pending_lines())
    put_steps(back, 7, value=3.0)
    lines = back.pending_lines()
    assert steps_of(lines) == [2, 3, 4, 5, 6, 4, 5, 7], "those that were trained again after 2 and 3, as there"
    assert pending_records(tmp_path / "here").points == 8, "nothing is kept twice"
    back.journal.close()
    turned = new_outbox(tmp_path / "here", b"".join(lines.splitlines(True)[::-1]))
    assert steps_of(turned.pending_lines()) == [7, 5, 4, 6, 5, 4, 3, 2]


def test_records_that_waited_in_memory_stay_before_later_ones_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_outbox(tmp_path)
    put_steps(first, *range(10))
    committed = b"".join(first.pending_lines().splitlines(True)[:5])
    first.journal.close()

    def busy(self: Journal, records: object) -> None:
        raise OSError("the database is busy")

    with monkeypatch.context() as once:
        once.setattr(Journal, "inherit", busy)
        second = new_outbox(tmp_path, committed)
    put_steps(second, 10)
    second.move_to_disk()
    assert steps_of(second.pending_lines()) == list(range(11))


def test_damage_in_a_commit_is_told_and_the_rest_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = records.to_line(item(0)) + b'{"torn\n' + records.to_line(item(1))
    assert new_outbox(tmp_path, lines).count()[:2] == (2, 0)
    assert "1 damaged lines of a commit's pending records for the store were skipped" in caplog.text


def test_the_clock_of_a_process_never_runs_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = new_outbox(tmp_path)
    clock = iter([5_000, 9_000, 3_000, 8_000, 9_500])
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 1_000_000)
    put_steps(box, *range(5))
    times = [record.points[0][2] for record in read(Journal(tmp_path))]
    assert times == [5_000, 9_000, 9_000, 9_000, 9_500]


# -- with a server ----------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.url, seed=4) as between:
        yield between


class Run:
    """A run in an experiment named after the test; `ids` plays its store's memory."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.ids = name, folder, dict[str, str]()
        self.trackers: list[MlflowTracker] = []

    def tracker(self, uri: str, journal: str = "outbox", **more: Any) -> MlflowTracker:
        self.trackers.append(tracker_of(uri, self.name, self.folder / journal, self.ids, **more))
        return self.trackers[-1]

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
    assert sorted(path.name for path in run.folder.joinpath("outbox").iterdir()) == ["lock", FILE]


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
        until(lambda: "is back: all pending records are sent" in caplog.text)
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
    assert "are pending: the bucket is away. Start again. Training" in caplog.text
    assert run.waits() == (0, 0) and len(runs_of(server.url, run.ids["run"])) == 2
    assert whole(server.url, run.ids["round/00"], 10) and len(tries) >= 9


@pytest.mark.parametrize("delivers", [True, False])
def test_a_life_waits_for_a_dying_one_and_finds_what_that_has_made(
    delivers: bool, run: Run, server: MlflowServer, proxy: FaultyProxy
) -> None:
    proxy.refuse()
    dying = run.begin(proxy.url)
    dying.begin_round(0, {})
    log(dying, range(1, 31))
    next_ = run.begin(server.url)
    next_.begin_round(0, {})
    log(next_, range(21, 41), value=7.0)
    next_.flush()
    assert run.waits()[0] == 50 and run.ids == {}, "two deliver never at once"
    if delivers:
        proxy.accept()
    dying.end_run("KILLED", seconds=60.0 * delivers)
    made = dict(run.ids)
    assert bool(made) == delivers
    next_.end_run()
    assert run.ids.items() >= made.items() and client(server.url).get_run(run.ids["run"]).info.status == "FINISHED"
    assert run.waits() == (0, 0) and len(runs_of(server.url, run.ids["run"])) == 2
    assert curve(server.url, run.ids["round/00"], "loss") == [
        (step, 1 / step if step <= 30 else 7 / step) for step in range(1, 41)
    ], "a point that was trained again replaces nothing, although nobody had heard the first one"


def test_a_new_life_sends_what_was_left_before_it_says_anything_itself(run: Run, server: MlflowServer) -> None:
    left = new_outbox(run.folder / "outbox")
    left.put(Record("open", "run", "demo"))
    put_steps(left, 1)
    left.journal.close()
    run.tracker(server.url)
    until(lambda: run.waits() == (0, 0))
    assert curve(server.url, run.ids["run"], "loss") == [(1, 1.0)]


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
    second = run.begin(server.url, "machine-b", inherited=commit)
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
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=settings,
            start_new_session=True,
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
        os.killpg(self._warm.pid, signal.SIGKILL)  # a test that failed may have left a life
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
        assert sorted(path.name for path in (tmp_path / "outbox-0").iterdir()) == ["lock", FILE]


def test_what_a_dead_job_left_can_be_sent_but_not_while_it_lives(
    lives: Lives, tmp_path: Path, server: MlflowServer, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.refuse()
    folder, journal = tmp_path / "left", tmp_path / "outbox"
    pid = lives.begin(proxy.url, folder, journal, die_at=20, hold=True)
    until(lambda: pending_records(journal).points == 60)
    monkeypatch.setattr(tracking, "RESEND_SECONDS", 0.2)
    monkeypatch.setattr(sender, "FIRST_PAUSE_SECONDS", 0.02)
    ids, said = dict[str, str](), list[str]()

    def send(uri: str) -> Any:
        return resend(uri, "left", "demo", ids, ids.update, journal, b"", said.append)

    with pytest.raises(
        UserError, match=f"found the journal {journal} in use: the run is still running and sends its records.*Wait"
    ):
        send(server.url)
    os.kill(pid, signal.SIGKILL)
    assert lives.end(pid) == -signal.SIGKILL
    with pytest.raises(
        UserError, match="unavailable or refusing requests .*refused.*: 60 points and 5 other records still wait"
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
