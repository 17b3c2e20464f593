"""Laws of the lease: one writer per run, whoever starts, sleeps or dies when."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.config import process_identity
from mirl_dist.config.process_identity import Machine
from mirl_dist.errors import Stopped, UserError
from mirl_dist.storage import Folder, NotFound, Options, Rejected, Store, Unavailable, open_store
from mirl_dist.storage.lease import Lease, LeaseLost, read_holder
from mirl_dist.storage.lease_files import beat_name, claim_name, released_name
from mirl_dist.storage.retry import Patience
from mirl_dist.storage.s3 import S3Store
from tests.services.faulty_proxy import FORBIDDEN, FaultyProxy, answer
from tests.services.s3_server import S3Server
from tests.services.waiting import until

LONG = 60.0  # seconds of a lease that nobody watches to its end
QUICK = 4.0  # the same, looked at as often as may be
ELSEWHERE = Machine("another boot", 1)

# A launch of its own: it does what its standard input says, line by line, and tells how that went.
LAUNCH = """
import json, sys
from mirl_dist.storage import lease_files
from mirl_dist.errors import UserError
from mirl_dist.storage.lease import Lease
from mirl_dist.storage import open_store

url, seconds, machine = json.loads(sys.argv[1])
if machine:
    lease_files.this_machine = lambda: lease_files.Machine(*machine)
store, lines, done = open_store(url), [], 0
lease = Lease(store, seconds=seconds, status=lambda: {"step": done}, launch={"name": "first"}, say=lines.append)
if url.startswith("s3"):
    store.exists("warm")
print(json.dumps("ready"), flush=True)
for asked in sys.stdin:
    done += 1
    try:
        name, *rest = json.loads(asked)
        told = ["done", getattr(lease, name)(*rest)]
    except UserError as fault:
        told = [type(fault).__name__, str(fault)]
    print(json.dumps([*told, lines]), flush=True)
    lines.clear()
"""


@dataclass
class Told:
    """A launch's reply: 'done' or the name of its UserError, the answer or the text, and the lines said."""

    how: str
    what: Any
    lines: list[str] = field(default_factory=list)


class Launch:
    """A process that can take, check and release the lease of a run."""

    def __init__(self, store: Store, seconds: float, machine: Machine | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, json.dumps([store.where(), seconds, machine])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.name = f"{socket.gethostname()}, pid {self.pid}"

    def ready(self) -> Launch:
        assert self._process.stdout and json.loads(self._process.stdout.readline()) == "ready"
        return self

    def begin(self, *asked: Any) -> None:
        assert self._process.stdin
        print(json.dumps(asked), file=self._process.stdin, flush=True)

    def told(self) -> Told:
        assert self._process.stdout
        return Told(*json.loads(self._process.stdout.readline()))

    def ask(self, *asked: Any) -> Told:
        self.begin(*asked)
        return self.told()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def sleep(self) -> None:
        """SIGSTOP; a beat that was under way is through, or will not be before SIGCONT."""
        self.send(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        until(lambda: all(b") T " in (task / "stat").read_bytes() for task in tasks.iterdir()))

    def kill(self) -> None:
        """SIGKILL; its parent has not asked how it ended, so it still has an entry among the processes."""
        self.send(signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def direct(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "folder":
        found: Store = request.getfixturevalue("folder")
        return found
    server: S3Server = request.getfixturevalue("direct")
    return open_store(server.bucket(f"lease-{random.randrange(1 << 48):012x}") + "/some/run")


@pytest.fixture
def launches() -> Iterator[Callable[..., list[Launch]]]:
    """Starts so many launches of a run, all ready."""
    started: list[Launch] = []

    def start(store: Store, count: int, seconds: float, machine: Machine | None = None) -> list[Launch]:
        new = [Launch(store, seconds, machine) for _ in range(count)]
        started.extend(new)
        return [launch.ready() for launch in new]

    yield start
    for launch in started:
        launch.close()


Make = Callable[..., Lease]


@pytest.fixture
def make(lines: list[str]) -> Iterator[Make]:
    """Makes leases of this process; they end with the test."""
    made: list[Lease] = []

    def one(store: Store, seconds: float = LONG, **more: Any) -> Lease:
        given: dict[str, Any] = {"status": dict, "say": lines.append} | more
        made.append(Lease(store, seconds=seconds, **given))
        return made[-1]

    yield one
    for lease in made:
        lease.release("failed")


def stranger(store: Store, generation: int = 1, **more: Any) -> dict[str, Any]:
    """Claim a generation as a launch on another machine that does nothing more."""
    said = {"host": "far", "pid": 77, "process_started": 5, "boot": "b", "pids": 9, "token": "t", "started_at": "then"}
    store.put(claim_name(generation), json.dumps(said | more).encode())
    return said | more


def at_look(number: int, deed: Callable[[], object]) -> Callable[[], bool]:
    """For `stop_asked` of a launch that watches: that look does something."""
    looks = itertools.count(1)

    def stop_asked() -> bool:
        if next(looks) == number:
            deed()
        return False

    return stop_asked


def lease_names(store: Store) -> list[str]:
    return store.list("lease")


class TestRealProcesses:
    """Launches that race, live, die, sleep and wake."""

    def test_of_several_starters_exactly_one_holds_the_run(self, store: Store, launches: Any) -> None:
        racers = launches(store, 4, LONG)
        for racer in racers:
            racer.begin("claim")
        told = [racer.told() for racer in racers]
        assert sorted(t.how for t in told) == ["UserError", "UserError", "UserError", "done"]
        winner = next(racer for racer, t in zip(racers, told, strict=True) if t.how == "done")
        for t in told:
            assert t.what == 1 if t.how == "done" else f"held by another launch ({winner.name}" in t.what
        assert winner.ask("check").how == "done"

    def test_of_two_that_watch_a_silent_holder_one_follows(self, store: Store, launches: Any) -> None:
        stranger(store)
        watchers = launches(store, 2, 1.0)
        for watcher in watchers:
            watcher.begin("claim")
        told = [watcher.told() for watcher in watchers]
        assert sorted(t.how for t in told) == ["UserError", "done"]
        winner, loser = sorted(zip(told, watchers, strict=True), key=lambda pair: pair[0].how == "UserError")
        assert winner[0].what == 2
        assert f"({winner[1].name}" in loser[0].what
        assert winner[1].ask("check").how == "done"

    @pytest.mark.parametrize("machine", [None, ELSEWHERE], ids=["here", "elsewhere"])
    def test_a_holder_that_lives_is_named_and_left_alone(
        self, store: Store, launches: Any, make: Make, lines: list[str], machine: Machine | None
    ) -> None:
        (first,) = launches(store, 1, 6.0, machine)
        assert first.ask("claim").what == 1
        until(lambda: store.exists(beat_name(1)))
        with pytest.raises(UserError) as refused:
            make(store, 6.0).claim()
        where = re.escape(store.where())
        name = re.escape(f"{socket.gethostname()}, pid {first.pid}")
        wanted = (
            rf"{where} is held by another launch \({name}\), which is alive: it has been running for \d+ s, and its "
        )
        wanted += r"last heartbeat came less than \d+\.\d s ago\. Wait for it, stop it, or choose another run\.folder\."
        assert re.fullmatch(wanted, str(refused.value)), str(refused.value)
        assert not refused.value.resumable
        assert lines == [
            f"{store.where()} is held by the launch on {first.name}; watching for a sign of life, 6 s at most"
        ]
        assert first.ask("check").how == "done"

    def test_a_killed_holder_on_this_machine_is_followed_at_once(
        self, store: Store, launches: Any, make: Make, lines: list[str]
    ) -> None:
        (first,) = launches(store, 1, LONG)
        first.ask("claim")
        first.kill()
        next_ = make(store)
        assert next_.claim() == 2
        assert lines == [f"the launch on {first.name}, is dead; going on in its place"]
        assert next_.previous is not None
        assert (next_.previous.generation, next_.previous.pid, next_.previous.ended) == (1, first.pid, "dead")
        next_.check()

    def test_a_killed_holder_on_another_machine_is_followed_only_after_the_lease(
        self, store: Store, launches: Any, make: Make, lines: list[str]
    ) -> None:
        (first,) = launches(store, 1, 1.0, ELSEWHERE)
        first.ask("claim")
        until(lambda: store.exists(beat_name(1)))
        first.kill()
        began = time.monotonic()
        next_ = make(store, 1.0)
        assert next_.claim() == 2
        assert time.monotonic() - began >= 1.0
        assert lines == [
            f"{store.where()} is held by the launch on {first.name}; watching for a sign of life, 1 s at most",
            f"the launch on {first.name}, sent no heartbeat for 1 s; going on in its place",
        ]
        assert next_.previous is not None and next_.previous.ended == "silent"

    def test_a_holder_that_sleeps_is_followed_and_harms_nobody_when_it_wakes(
        self, store: Store, launches: Any, make: Make, lines: list[str]
    ) -> None:
        (first,) = launches(store, 1, 1.0)
        first.ask("claim")
        assert first.ask("check").how == "done"
        first.sleep()
        next_ = make(store, 1.0)
        assert next_.claim() == 2
        assert next_.previous is not None and next_.previous.ended == "silent"
        first.send(signal.SIGCONT)
        until(lambda: first.ask("lost").what)  # its own thread finds it, unasked
        told = first.ask("check")
        assert told.how == "LeaseLost"
        here = socket.gethostname()
        wanted = rf"this launch \({here}, pid {first.pid}\) no longer holds {re.escape(store.where())}: {here}, pid "
        wanted += (
            rf"{os.getpid()}, took it over at \d{{4}}-\d\d-\d\dT.*; nothing more is written\. Leave the run to that "
        )
        assert re.match(wanted, told.what), told.what
        assert first.ask("release", "stopped") == Told("done", None, []), "nothing was left to release"
        next_.check()
        assert not next_.lost()
        newest = read_holder(store)
        assert newest is not None and (newest.generation, newest.pid, newest.ended) == (2, os.getpid(), None)
        assert released_name(1) not in lease_names(store)
        until(lambda: store.exists(beat_name(2)))
        assert json.loads(store.get(beat_name(2)))["news"] == {}, "its own beats"
        assert lines[-1].endswith("going on in its place")

    def test_what_was_released_is_taken_at_once_and_tells_how_it_ended(
        self, store: Store, launches: Any, make: Make, lines: list[str]
    ) -> None:
        (first,) = launches(store, 1, LONG, ELSEWHERE)
        first.ask("claim")
        assert first.ask("release", "stopped") == Told("done", None, [])
        next_ = make(store)
        assert next_.claim() == 2
        assert next_.previous is not None
        assert (next_.previous.ended, next_.previous.launch) == ("stopped", {"name": "first"})
        assert next_.previous.status == {"step": 2}, "of the release, which is newer than the last beat"
        assert lines == []

    def test_a_process_that_vanishes_ends_the_watch(self, folder: Folder, launches: Any, make: Make) -> None:
        (first,) = launches(folder, 1, QUICK)
        first.ask("claim")
        first.sleep()
        next_ = make(folder, QUICK)
        assert next_.claim(at_look(3, first.kill)) == 2
        assert next_.previous is not None and next_.previous.ended == "dead"


class TestTaking:
    def test_an_empty_run_is_taken_at_once_and_shows_its_holder(self, folder: Folder, make: Make) -> None:
        assert read_holder(folder) is None
        step = 7
        lease = make(folder, launch={"attempt": 3}, status=lambda: {"step": step})
        assert lease.claim() == lease.generation == 1
        assert lease.previous is None
        until(lambda: folder.exists(beat_name(1)))
        found = read_holder(folder)
        assert found is not None
        assert (found.host, found.pid, found.ended) == (socket.gethostname(), os.getpid(), None)
        assert (found.launch, found.status) == ({"attempt": 3}, {"step": 7})
        assert found.started_at <= found.beat_at and found.running_seconds is not None
        lease.check()
        assert not lease.lost()
        step = 8
        lease.release("finished")
        found = read_holder(folder)
        assert found is not None and (found.ended, found.status) == ("finished", {"step": 8})

    def test_a_release_ends_the_watch(self, folder: Folder, make: Make) -> None:
        release = json.dumps({"why": "failed", "token": stranger(folder)["token"]}).encode()
        next_ = make(folder, QUICK)
        assert next_.claim(at_look(3, lambda: folder.put(released_name(1), release))) == 2
        assert next_.previous is not None and next_.previous.ended == "failed"

    def test_a_release_of_another_claim_of_that_number_counts_for_nothing(self, folder: Folder, make: Make) -> None:
        stranger(folder)
        folder.put(released_name(1), json.dumps({"why": "finished", "token": "of an older launch"}).encode())
        found = read_holder(folder)
        assert found is not None and found.ended is None

    def test_a_stop_ends_the_watch_and_claims_nothing(self, folder: Folder, make: Make) -> None:
        stranger(folder)
        looks = iter([False, False, True])
        with pytest.raises(Stopped):
            make(folder, QUICK).claim(lambda: next(looks))
        assert lease_names(folder) == [claim_name(1)]

    def test_one_that_was_passed_while_it_took_a_number_holds_nothing(self, folder: Folder, make: Make) -> None:
        make(folder).claim()
        old = read_holder(folder)
        assert old is not None

        class Slow(Folder):
            """Between its look and its claim other launches come and go, until its number is free again."""

            slept = False

            def put_if_absent(self, name: str, data: bytes) -> bool:
                if not self.slept:
                    self.slept = True
                    for _ in range(3):
                        quick = make(folder)
                        quick.claim()
                        quick.release("finished")
                    last.claim()
                    assert not folder.exists(name), "swept: it could be taken anew"
                return super().put_if_absent(name, data)

        last = make(folder)
        folder.put(released_name(1), json.dumps({"why": "stopped", "token": token(folder, 1)}).encode())
        slow = make(Slow(Path(folder.where())))
        with pytest.raises(UserError, match="took over the run a moment ago"):
            slow.claim()
        assert slow.generation == 0
        last.check()
        assert last.generation == 5

    def test_a_claim_whose_answer_got_lost_is_held(self, folder: Folder, make: Make) -> None:
        class Deaf(Folder):
            def put_if_absent(self, name: str, data: bytes) -> bool:
                super().put_if_absent(name, data)
                return False

        lease = make(Deaf(Path(folder.where())))
        assert lease.claim() == 1
        lease.check()

    def test_a_claim_whose_temporary_file_was_swept_is_made_again(self, folder: Folder, make: Make) -> None:
        class Swept(Folder):
            tries = 0

            def put_if_absent(self, name: str, data: bytes) -> bool:
                self.tries += 1
                if self.tries == 1:
                    raise NotFound("swept")
                return super().put_if_absent(name, data)

        store = Swept(Path(folder.where()))
        assert make(store).claim() == 1
        assert store.tries == 2

    @pytest.mark.parametrize("error", [Rejected, Unavailable])
    @pytest.mark.parametrize("name", [claim_name, beat_name, released_name])
    def test_a_file_that_the_store_does_not_give_is_not_taken_for_none(
        self, folder: Folder, make: Make, name: Callable[[int], str], error: type[Exception]
    ) -> None:
        class Refuses(Folder):
            def get(self, asked: str) -> bytes:
                if asked == name(1):
                    raise error("no")
                return super().get(asked)

        stranger(folder)
        with pytest.raises(error):
            make(Refuses(Path(folder.where())), 0.2).claim()
        assert lease_names(folder) == [claim_name(1)]

    def test_the_newest_two_generations_stay_and_what_is_foreign(self, store: Store, make: Make) -> None:
        store.put("lease/notes.txt", b"mine")
        store.put("lease/deep/00000001.json", b"mine too")
        for generation in range(1, 5):
            if generation == 4:
                store.put(beat_name(1), b"of a launch that woke up late")
            lease = make(store)
            assert lease.claim() == generation
            lease.release("finished")
        ours = [name(generation) for generation in (3, 4) for name in (beat_name, claim_name, released_name)]
        assert lease_names(store) == sorted([*ours, "lease/notes.txt", "lease/deep/00000001.json"])


def token(store: Store, generation: int) -> str:
    return str(json.loads(store.get(claim_name(generation)))["token"])


class TestWhoIsDead:
    """On this machine a process number tells it, if it is still the same process."""

    def claimed(self, store: Store, pid: int) -> dict[str, Any]:
        """A claim as process `pid` of this machine writes it."""
        machine, process = process_identity.this_machine(), process_identity.process_state(pid)
        assert machine and process
        return stranger(store, pid=pid, process_started=process.started, boot=machine.boot, pids=machine.pid_namespace)

    def gone(self, store: Store) -> bool:
        found = read_holder(store)
        assert found is not None
        return found.has_exited()

    def test_only_a_process_with_that_start_on_that_machine_is_judged(self, folder: Folder) -> None:
        said = self.claimed(folder, os.getpid())
        assert not self.gone(folder)
        folder.put(claim_name(1), json.dumps(said | {"process_started": said["process_started"] - 1}).encode())
        assert self.gone(folder), "another process has that number now"
        others = [{"pid": None}, {"pid": 1 << 70}, {"boot": "another"}, {"pids": 1}, {"boot": None}]
        for other in (*others, {"process_started": None}):
            folder.put(claim_name(1), json.dumps(said | {"process_started": 1} | other).encode())
            assert not self.gone(folder)

    def test_a_dead_process_that_nobody_buried_is_dead(self, folder: Folder) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            self.claimed(folder, child.pid)
            assert not self.gone(folder)
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert self.gone(folder), "still among the processes"
        assert self.gone(folder), "no longer among them"

    def test_a_process_that_is_hidden_is_not_dead(self, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.claimed(folder, os.getpid())
        monkeypatch.setattr(process_identity, "process_state", lambda pid: None)
        assert not self.gone(folder)

    def test_a_proc_of_other_numbers_tells_no_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert process_identity.this_machine() is not None
        monkeypatch.setattr(os, "readlink", lambda path: "1")
        assert process_identity.this_machine() is None


class TestDamage:
    DAMAGED = (
        b"",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'"x"',
        b"[" * 100_000,
        b"1" * 5000,
        b'{"pid": true, "host": "a\\u001b[31m", "boot": 5, "pids": "x", "launch": [], "process_started": -1}',
        b'{"pid": 1e400, "running_seconds": NaN, "news": 3, "why": [], "at": {}}',
    )

    @pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
    def test_damaged_files_name_nobody_and_break_nothing(self, folder: Folder, data: bytes) -> None:
        for name in (claim_name, beat_name, released_name):
            folder.put(name(12), data)
        found = read_holder(folder)
        assert found is not None and str(found) == "an unknown host, pid unknown"
        assert (found.generation, found.ended, found.launch, found.status) == (12, None, {}, {})
        assert found.running_seconds is None and found.machine is None and not found.has_exited()

    def test_a_holder_that_cannot_be_named_is_watched(self, folder: Folder, make: Make) -> None:
        folder.put(claim_name(1), b"not JSON")
        with pytest.raises(UserError, match=r"another launch \(an unknown host, pid unknown\), which is alive: its"):
            make(folder, QUICK).claim(at_look(3, lambda: folder.put(beat_name(1), b"a sign of life")))
        assert make(folder, 0.5).claim() == 2, "it is silent from then on"


class Away(Folder):
    """Before its n-th listing, from 1, something happens: the store hangs for a while, or the holder beats."""

    def __init__(self, folder: Folder, before: Mapping[int, Callable[[], object]]) -> None:
        super().__init__(Path(folder.where()))
        self._before, self._looks = before, itertools.count(1)

    def list(self, prefix: str) -> list[str]:
        self._before.get(next(self._looks), lambda: None)()
        return super().list(prefix)


class TestHolding:
    def test_check_asks_each_time_and_what_is_lost_stays_lost(self, folder: Folder, make: Make) -> None:
        lease = make(folder)
        lease.claim()
        lease.check()
        folder.put(claim_name(2), b"{}")
        with pytest.raises(
            LeaseLost, match="an unknown host, pid unknown, took it over at an unknown time; nothing more"
        ):
            lease.check()
        folder.remove(claim_name(2))
        with pytest.raises(LeaseLost):
            lease.check()
        assert lease.lost()

    def test_a_lease_whose_files_were_removed_by_hand_is_lost(self, folder: Folder, make: Make) -> None:
        lease = make(folder)
        lease.claim()
        folder.remove(claim_name(1))
        with pytest.raises(LeaseLost, match=r"its lease was removed; nothing more is written\. Start it again"):
            lease.check()

    def test_numbers_that_begin_again_make_no_two_holders(self, folder: Folder, make: Make) -> None:
        first, second = make(folder), make(folder)
        first.claim()
        until(lambda: folder.exists(beat_name(1)))
        for name in lease_names(folder):
            folder.remove(name)
        assert second.claim() == first.generation == 1
        with pytest.raises(LeaseLost, match=rf"pid {os.getpid()}, took it over at "):
            first.check()
        second.check()

    def test_a_release_does_not_hang_on_a_store_that_hangs(self, folder: Folder, make: Make, lines: list[str]) -> None:
        away = threading.Event()

        class Hangs(Folder):
            def put(self, name: str, data: bytes) -> None:
                away.wait(30)

        lease = make(Hangs(Path(folder.where())), 0.2)
        lease.claim()
        lease.release("finished")
        away.set()
        wanted = f"the lease of {folder.where()} could not be released (the store does not answer). A next launch on "
        assert lines == [f"{wanted}another machine waits 0.2 s."]

    def test_time_in_which_the_store_was_away_is_not_silence(self, folder: Folder, make: Make) -> None:
        stranger(folder)
        away = Away(folder, {2: lambda: time.sleep(1.3), 4: lambda: folder.put(beat_name(1), b"a sign of life")})
        with pytest.raises(UserError, match="which is alive"):
            make(away, 1.0).claim()

    def test_a_beat_from_before_an_outage_is_no_sign_of_life_after_it(self, folder: Folder, make: Make) -> None:
        def beat_and_hang() -> None:
            folder.put(beat_name(1), b"{}")
            time.sleep(0.6)

        stranger(folder)
        assert make(Away(folder, {2: beat_and_hang}), 0.5).claim() == 2


class TestAServerThatIsAway:
    @pytest.fixture
    def proxy(self, direct: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
        with FaultyProxy(direct.url) as between:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.url)
            yield between

    @pytest.fixture
    def url(self, server: S3Server) -> str:
        return server.bucket(f"away-{random.randrange(1 << 48):012x}")

    def test_the_holder_goes_on_and_nobody_takes_that_for_no_holder(
        self, direct: S3Server, proxy: FaultyProxy, url: str, make: Make, lines: list[str]
    ) -> None:
        once = S3Store(url, patience=Patience(0), connect_seconds=2, read_seconds=2)
        beside = S3Store(url, Options(endpoint=direct.url))
        lease = make(once, 1.0)
        lease.claim()
        until(lambda: once.exists(beat_name(1)))
        for fault, error in ((None, Unavailable), (answer(*FORBIDDEN), Rejected)):
            if fault is None:
                proxy.refuse()
            else:
                proxy.always = fault
            time.sleep(0.5)
            before = beside.get(beat_name(1))
            with pytest.raises(error):
                make(once).claim()
            with pytest.raises(error):
                read_holder(once)
            with pytest.raises(error):
                lease.check()
            proxy.calm()
            proxy.accept()
            until(lambda before=before: beside.get(beat_name(1)) != before)
            lease.check()
        assert claim_name(2) not in lease_names(once)
        proxy.refuse()
        time.sleep(0.5)
        lease.release("finished")
        assert len(lines) == 1 and lines[0].startswith(
            f"the lease of {url} could not be released ({url}/lease/00000001."
        )
        assert lines[0].endswith("A next launch on another machine waits 1 s.")
