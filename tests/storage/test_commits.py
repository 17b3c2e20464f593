"""Laws of commits: whoever dies or sleeps before whichever call of the store, the newest commit is whole."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.config.canonical_json import to_json
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, Store, Unavailable, open_store
from mirl_dist.storage.commits import ACCEPTED, COMPLETE, Reader, add_digest, check_digest
from mirl_dist.storage.lease import Lease
from mirl_dist.storage.retry import Patience, with_retries
from mirl_dist.training.checkpointing.checkpoint import (
    MASK,
    MOMENTS,
    OUTBOX,
    PICTURES,
    RUN,
    SCORES,
    STATE,
    TICKET,
    WEIGHTS,
    Checkpoints,
)
from mirl_dist.training.state import pack_tensors
from tests.services.s3_server import S3Server
from tests.storage.snapshots import (
    Calls,
    Claim,
    Died,
    Memory,
    Sleeper,
    commit_round,
    commit_steps,
    launch,
    snapshot,
    ticket,
    weights,
    whole,
)

Place = tuple[int, int | None]
Story = Callable[[Checkpoints, int], None]

OLD, NEW = 1, 2  # whose weights: of the launch that sleeps or dies, of the one that takes over
IDENTITY = {"config": {}, "fingerprint": "f", "manifest_digest": "m", "initial_digest": "i", "versions": {}}


# -- places for a run -------------------------------------------------------------------------------------------


class Site:
    """Gives stores that hold a run so far: round 0 has ended, round 1 has commits after 3 and 6 steps."""

    def __init__(self, empty: Callable[[int], Store], files: dict[str, bytes]) -> None:
        self._empty, self._files, self._made = empty, files, 0

    def run(self) -> Any:
        self._made += 1
        store = self._empty(self._made)
        for name, data in self._files.items():
            store.put(name, data)
        return store


def writer(store: Any) -> Checkpoints:
    """The launch that has written the run so far."""
    return Checkpoints(store, Claim(store, 1))


@pytest.fixture(scope="module")
def run_so_far() -> dict[str, bytes]:
    store = Memory()
    kept = launch(store)
    kept.begin(IDENTITY)
    commit_steps(kept, 3)
    commit_round(kept, 0)
    commit_steps(kept, 3, 6, round_=1, seed=OLD)
    return store.files


@pytest.fixture
def site(run_so_far: dict[str, bytes]) -> Site:
    return Site(lambda number: Memory(), run_so_far)


@pytest.fixture(params=["folder", "bucket"])
def real(
    request: pytest.FixtureRequest, run_so_far: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Site:
    """The same in folders of a disk, and in a real bucket."""
    if request.param == "folder":
        return Site(lambda number: Folder(tmp_path / f"run-{number}"), run_so_far)
    server: S3Server = request.getfixturevalue("server")
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    address = server.bucket(f"runs-{time.monotonic_ns()}")
    return Site(lambda number: open_store(f"{address}/run-{number}"), run_so_far)


# -- the stories ------------------------------------------------------------------------------------------------


def step_9(kept: Checkpoints, whose: int) -> None:
    kept.commit_step(snapshot(1, 9, 100 * whose + 9), 2, b"waits")


def round_1(kept: Checkpoints, whose: int) -> None:
    told, taken = ticket(1, seconds=whose), snapshot(1, 12, 100 * whose)
    kept.commit_round(told, taken, b"csv", f"png {whose}".encode(), 2, b"waits")


def step_3_of_round_2(kept: Checkpoints, whose: int) -> None:
    kept.commit_step(snapshot(2, 3, 100 * whose + 23), 2)


DEEDS: dict[Place, Story] = {(1, 9): step_9, (1, None): round_1, (2, 3): step_3_of_round_2}


def twice(kept: Checkpoints, whose: int) -> None:
    """As when the answer to the last request of the first try got lost."""
    round_1(kept, whose)
    round_1(kept, whose)


def to_its_end(kept: Checkpoints, whose: int) -> None:
    round_1(kept, whose)
    kept.finish()


def drop(kept: Checkpoints, whose: int) -> None:
    kept.drop_weights(0)


def two_rounds(kept: Checkpoints, whose: int) -> None:
    round_1(kept, whose)
    step_3_of_round_2(kept, whose)


STORIES: dict[str, Story] = {work.__name__: work for work in (step_9, round_1, twice, to_its_end, drop, two_rounds)}


def order(place: Place) -> tuple[int, bool, int]:
    return place[0], place[1] is None, place[1] or 0


def newest(kept: Checkpoints) -> tuple[Place, bytes]:
    """Round, step and weights of the newest commit, found without anything damaged on the way."""
    found = kept.latest()
    assert found is not None
    commit, parts, damaged = found
    assert damaged == []
    return (commit.round_, commit.step), parts[WEIGHTS]


def calls_of(store: Store, begun: Callable[[Any], Checkpoints], work: Callable[[Checkpoints], None]) -> int:
    """How many calls some work makes."""
    calls = Calls(store)
    kept = begun(calls)
    before = calls.made
    work(kept)
    return calls.made - before


def die_at(store: Store, call: int, begun: Callable[[Any], Checkpoints], work: Callable[[Checkpoints], None]) -> None:
    """A process that is gone before that call of some work."""

    def die() -> None:
        raise Died

    calls = Calls(store, before=die)
    kept = begun(calls)
    calls.at = calls.made + call
    with pytest.raises(Died):
        work(kept)


def follower(store: Any) -> Checkpoints:
    """A launch that has claimed the run, and no more."""
    return Checkpoints(store, Claim(store))


class Blind(Reader):
    """A writer that does not look whether it may still write."""

    generation = 1


# -- a writer that dies -----------------------------------------------------------------------------------------


def assert_all_is_whole_after_a_death(site: Site, story: str, call: int, ended: tuple[Place, bytes]) -> Place:
    """The place of the newest commit after it."""
    work, store = STORIES[story], site.run()
    before = newest(Checkpoints(store))
    die_at(store, call, writer, lambda kept: work(kept, OLD))
    assert len(whole(store)) >= 2, "sound commits are fewer than were to be kept"
    left = newest(Checkpoints(store))
    assert left in (before, ended) or left[0] in DEEDS, "neither the old nor a new one"
    for told in Checkpoints(store).tickets():
        assert not Checkpoints(store).has_weights(told.round) or Checkpoints(store).round_weights(told.round)
    again = launch(store)
    assert newest(again) == left, "taking over changed what is newest"
    work(again, OLD)
    assert newest(Checkpoints(store)) == ended, "the next launch does not get as far"
    assert [t.round for t in again.tickets()] == ([0] if order(ended[0]) < (1, True) else [0, 1])
    return left[0]


@pytest.mark.parametrize("story", STORIES)
def test_a_writer_that_dies_at_any_call_leaves_this_commit_or_the_last_complete(site: Site, story: str) -> None:
    done = site.run()
    count = calls_of(done, writer, lambda kept: STORIES[story](kept, OLD))
    ended = newest(Checkpoints(done))
    places = [assert_all_is_whole_after_a_death(site, story, call, ended) for call in range(1, count + 1)]
    assert places == sorted(places, key=order), "a later call takes away what was there before"
    assert places[0] == (1, 6), "before its first call nothing has changed"
    assert places[-1] == ended[0], "before its last call it is whole already"


def test_a_writer_that_dies_leaves_a_whole_commit_in_a_real_store_too(real: Site) -> None:
    ended = ((1, None), pack_tensors(weights(100 * OLD)))
    places = [assert_all_is_whole_after_a_death(real, "round_1", call, ended) for call in (8, 14)]
    assert places == [(1, 6), (1, None)]


@pytest.mark.parametrize("story", ["step_9", "round_1"])
def test_a_commit_retried_after_a_failure_at_any_call_never_loses_the_last_one(site: Site, story: str) -> None:
    fewest: list[int] = []

    class Watched(Calls):
        def __getattr__(self, name: str) -> Any:
            fewest.append(len(whole(store)))
            return super().__getattr__(name)

    def fail() -> None:
        raise Unavailable("the store is away")

    done = site.run()
    count = calls_of(done, writer, lambda kept: STORIES[story](kept, OLD))
    ended = newest(Checkpoints(done))
    for failing in range(1, count + 1):
        store = site.run()
        calls = Watched(store, failing, fail)
        kept = writer(calls)
        with_retries(lambda kept=kept: STORIES[story](kept, OLD), "it", Patience(60, first=1e-4), lambda line: None)
        assert calls.made > count, f"call {failing}: it was not tried again"
        assert newest(Checkpoints(store)) == ended, f"call {failing}"
    assert min(fewest) >= 2


def test_two_takeovers_in_a_row_that_die_at_any_call_lose_nothing(site: Site) -> None:
    def begun() -> Memory:
        """Taken over once; something has come too late, and something was never whole."""
        store: Memory = site.run()
        launch(store)
        step_9(Checkpoints(store, Blind()), OLD)
        store.put(orphan, b"never whole")
        return store

    orphan = "rounds/01/steps/00000010-0001/weights.safetensors"
    count = calls_of(begun(), follower, Checkpoints.fence_older_writers)
    expected = whole(site.run())
    assert count >= 5 and len(expected) == 3
    for first in range(1, count + 1):
        store = begun()
        assert whole(store) == expected, "what comes too late does not count"
        for call in {first, count + 1 - first}:
            with contextlib.suppress(Died):  # the second finds less to do
                die_at(store, call, follower, Checkpoints.fence_older_writers)
            assert whole(store) == expected, f"call {call} after {first}"
        step_9(launch(store), NEW)
        assert newest(Checkpoints(store)) == ((1, 9), pack_tensors(weights(209)))
        assert not store.exists(orphan)
        assert len(store.list(ACCEPTED)) == 1


# -- a writer that sleeps ---------------------------------------------------------------------------------------


def look(store: Store) -> dict[str, Any]:
    """What readers of a run see."""
    kept, sound = Checkpoints(store), whole(store)
    place, bytes_ = newest(kept)
    return {
        "newest": place,
        "bytes": bytes_,
        "rounds": [(c.folder, sound.get(c.folder)) for c in kept.commits() if c.step is None],
        "tickets": kept.tickets(),
        "pictures": [kept.pictures(t.round) for t in kept.tickets()],
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Which of the things that readers see have changed, and the place of the newest commit."""
    return [f"{key} ({after['newest']})" for key in before if before[key] != after[key]]


def sleep_through(site: Site, story: str, call: int, until: Place) -> UserError | None:
    """A launch sleeps before a call of its work while another one takes over and goes on; then it wakes up, to its end.
    What that one has written must be what readers see before and after."""
    store = site.run()
    calls = Calls(store, call)
    sleeper = Sleeper(calls, lambda: STORIES[story](writer(calls), OLD))
    successor = launch(store)
    (begun, _) = newest(successor)
    for place, deed in DEEDS.items():
        if order(begun) < order(place) <= order(until):
            deed(successor, NEW)
    seen = look(store)
    assert seen["newest"] == max(begun, until, key=order)
    sleeper.wake()
    after = look(store)
    if story == "drop":  # what it was about to drop when it lost the run may go, and nothing else
        for (folder, had), (_, has) in zip(seen["rounds"], after["rounds"], strict=True):
            assert has in (had, {name: had[name] for name in had if (folder[:9], name) != ("rounds/00", WEIGHTS)})
        after["rounds"] = seen["rounds"]
    assert not (found := changed(seen, after)), f"changed: {', '.join(found)}"
    third = launch(store)
    assert look(store)["newest"] == newest(third)[0] == seen["newest"]
    assert len(whole(store)) >= 2
    return sleeper.ended


@pytest.mark.parametrize("until", DEEDS)
@pytest.mark.parametrize("story", STORIES)
def test_a_writer_that_wakes_after_its_succession_at_any_call_disturbs_nothing(
    site: Site, story: str, until: Place
) -> None:
    count = calls_of(site.run(), writer, lambda kept: STORIES[story](kept, OLD))
    broken, ends = [], []
    for call in range(1, count + 1):
        try:
            ends.append(sleep_through(site, story, call, until))
        except (AssertionError, UserError) as error:
            broken.append(f"before call {call} of {count}: {str(error).splitlines()[0]}")
    assert not broken, "\n".join(broken)
    assert isinstance(ends[0], UserError), "it was told nothing"


@pytest.mark.long
def test_a_writer_that_wakes_after_its_succession_disturbs_no_real_store_either(real: Site) -> None:
    sleep_through(real, "round_1", 5, (1, None))
    sleep_through(real, "step_9", 7, (1, 9))


@pytest.mark.parametrize(("story", "mine"), [("step_9", (1, 9)), ("round_1", (1, None))])
def test_a_commit_completed_during_a_takeover_counts_for_all_or_for_nobody(site: Site, story: str, mine: Place) -> None:
    count = calls_of(site.run(), writer, lambda kept: STORIES[story](kept, OLD))
    taking = calls_of(site.run(), follower, Checkpoints.fence_older_writers)
    outcomes = set()
    for call in range(1, min(count, 11) + 1):
        for moment in range(1, taking + 1, 2 - call % 2):
            store = site.run()
            calls = Calls(store, call)
            sleeper = Sleeper(calls, lambda calls=calls: STORIES[story](writer(calls), OLD))  # type: ignore[misc]
            taking_over = Calls(store, before=sleeper.wake)
            other = follower(taking_over)
            taking_over.at = taking_over.made + moment
            other.fence_older_writers()
            sleeper.wake()
            found = [newest(kept)[0] for kept in (other, Checkpoints(store), launch(store))]
            assert found[0] == found[1] == found[2], f"calls {call} and {moment}: readers differ: {found}"
            outcomes.add((found[0] == mine, sleeper.ended is None))
    assert outcomes >= {(False, False), (True, True)}, "some come too late, some in time"
    assert (False, True) not in outcomes, "what was told as committed got lost"


@pytest.mark.parametrize(("left", "late"), [(0, False), (4, False), (0, True)])
def test_a_takeover_that_sleeps_while_another_one_follows_it_disturbs_nothing(
    site: Site, left: int, late: bool
) -> None:
    """left: files of a commit that a dead writer did not complete, for both to remove; late: it does so after all."""

    def begun() -> Memory:
        store: Memory = site.run()
        for number in range(left):
            store.put(f"rounds/01/steps/00000010-0001/{number}", b"never whole")
        return store

    count = calls_of(begun(), follower, Checkpoints.fence_older_writers)
    following = site.run()
    launch(following)
    writing = calls_of(following, launch, lambda kept: step_9(kept, NEW))
    broken = []
    for call in range(1, count + 1):
        for moment in (0, *range(2, writing + 1, 3)):  # it has committed; it is about to make that call
            store = begun()
            calls, busy = Calls(store), Calls(store)
            sleeping = follower(calls)
            calls.at = calls.made + call
            sleeper = Sleeper(calls, sleeping.fence_older_writers)
            if late:
                step_9(Checkpoints(store, Blind()), OLD)
            kept = launch(busy)
            if moment:
                busy.at = busy.made + moment
                successor = Sleeper(busy, lambda kept=kept: step_9(kept, NEW))  # type: ignore[misc]
            else:
                step_9(kept, NEW)
            seen = look(store)
            try:
                sleeper.wake()
                assert not changed(seen, look(store)), f"changed: {', '.join(changed(seen, look(store)))}"
                if moment:
                    successor.wake()
                    assert successor.ended is None, successor.ended
                assert newest(kept) == newest(Checkpoints(store)) == ((1, 9), pack_tensors(weights(209)))
                assert newest(launch(store))[0] == (1, 9)
                assert not store.list("rounds/01/steps/00000010-0001")
            except (AssertionError, UserError) as error:
                broken.append(f"before call {call} of {count}, {moment}: {str(error).splitlines()[0]}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("deed", [Checkpoints.finish, Checkpoints.fence_older_writers, lambda it: it.drop_weights(0)])
def test_who_has_lost_the_run_removes_nothing(site: Site, deed: Callable[[Checkpoints], None]) -> None:
    store = site.run()
    lost = follower(store)
    step_9(launch(store), NEW)
    store.put("rounds/01/steps/00000010-0001/0", b"never whole")
    files = dict(store.files)
    with pytest.raises(UserError, match="no longer holds"):
        deed(lost)
    assert store.files == files


def test_a_takeover_removes_unfinished_work_of_older_generations_and_no_other(site: Site) -> None:
    left = [f"rounds/01/steps/00000010-{generation:04d}/0" for generation in (1, 2, 3, 7)]
    left += [f"rounds/01/ticket-{generation:04d}/0" for generation in (1, 2, 3, 7)]
    left += ["rounds/01/mask.safetensors", "rounds/01/steps/00000010/0", "rounds/01/steps/00000010-0001/0/0"]
    store = site.run()
    launch(store)
    for name in left:
        store.put(name, b"never whole")
    expected = whole(store)
    launch(store)
    assert whole(store) == expected
    assert [name for name in left if not store.exists(name)] == [left[i] for i in (0, 1, 4, 5)]


def test_readers_do_not_count_what_comes_too_late_at_whichever_of_their_calls(site: Site) -> None:
    """After a first succession, or another one."""

    def too_late(store: Store) -> None:
        launch(store)
        step_9(Checkpoints(store, Blind()), OLD)

    count = calls_of(site.run(), Checkpoints, lambda kept: None if newest(kept) else None)
    assert count >= 5
    for again in (False, True):
        for call in range(1, count + 1):
            store = site.run()
            if again:
                too_late(store)
            calls = Calls(store, call, lambda store=store: too_late(store))  # type: ignore[misc]
            reader = Checkpoints(calls)  # type: ignore[arg-type]
            assert newest(reader)[0] == newest(reader)[0] == (1, 6), f"call {call}"


def test_a_round_that_was_damaged_and_done_again_is_the_one_that_counts(site: Site) -> None:
    store = site.run()
    round_1(writer(store), OLD)
    (name,) = [name for name in store.list("rounds/01") if name.endswith(f"/{TICKET}")]
    store.put(name, flipped(store.get(name), 99))
    second = launch(store)
    found = second.latest()
    assert found is not None and found[0].step == 6
    assert found[2] == [f"memory/{name} is damaged: its bytes are not those that were committed"]
    round_1(second, NEW)
    assert newest(second) == newest(launch(store)) == ((1, None), pack_tensors(weights(200)))
    for kept in (second, Checkpoints(store)):
        assert [kept.ticket(1)] == kept.tickets()[1:] == [ticket(1, seconds=NEW)]
        assert kept.pictures(1) == b"png 2"


@pytest.mark.parametrize("reads", [Reader.generation, 2])
def test_a_list_of_accepted_commits_that_could_not_be_read_once_is_read_again(site: Site, reads: int) -> None:
    def fail() -> None:
        raise Unavailable("the store is away")

    store = site.run()
    launch(store)
    step_9(Checkpoints(store, Blind()), OLD)
    for call in (1, 2, 3):
        kept = Checkpoints(Calls(store, call, fail), Claim(store, 2) if reads else None)  # type: ignore[arg-type]
        with pytest.raises(Unavailable):
            kept.commits()
        assert newest(kept)[0] == (1, 6), f"call {call}"


@pytest.mark.parametrize("times", [1, 3])
def test_a_run_whose_lease_was_removed_by_hand_goes_on_and_keeps_what_it_commits(site: Site, times: int) -> None:
    store = site.run()
    for _ in range(times):
        launch(store)
    for name in store.list("lease"):
        store.remove(name)
    kept = launch(store)
    step_9(kept, NEW)
    assert newest(kept)[0] == newest(Checkpoints(store))[0] == newest(launch(store))[0] == (1, 9)


# -- real leases, real processes --------------------------------------------------------------------------------


def leased(store: Any) -> tuple[Lease, Checkpoints]:
    """A launch that holds the run by a real lease of one second."""
    lease = Lease(store, seconds=1.0, status=dict, say=lambda line: None)
    lease.claim()
    kept = Checkpoints(store, lease)
    kept.fence_older_writers()
    return lease, kept


COMMITTING = """
import itertools, json, os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from tests.storage.snapshots import snapshot
from mirl_dist.training.checkpointing.checkpoint import Checkpoints
from mirl_dist.errors import UserError
from mirl_dist.storage.lease import Lease
from mirl_dist.storage import Folder

store = Folder(Path(sys.argv[1]))
lease = Lease(store, seconds=1.0, status=dict)
lease.claim()
kept = Checkpoints(store, lease)
kept.fence_older_writers()
try:
    for step in itertools.count(1):
        kept.commit_step(snapshot(0, step, step), 2)
        print(step, flush=True)
except UserError:  # Lost, or that its unfinished file was swept away
    print("lost", flush=True)
"""


def test_a_process_stopped_in_a_commit_and_continued_later_disturbs_nothing(lab: Any, tmp_path: Path) -> None:
    script, here = tmp_path / "committing.py", str(Path(__file__).parents[2])
    script.write_text(COMMITTING)
    folder = tmp_path / "run"
    launched = lab.start(str(folder), here, script=str(script), cwd=tmp_path)
    while launched.text("out").count("\n") < 5:
        time.sleep(0.01)
    os.kill(launched.pids[0], signal.SIGSTOP)
    store = Folder(folder)
    lease, kept = leased(store)
    told = int(launched.text("out").split()[-1])
    (_, step), _ = newest(kept)
    assert step is not None and step >= told, "what was told as committed got lost"
    kept.commit_step(snapshot(0, step + 1, 7), 2)
    seen = look(store)
    os.kill(launched.pids[0], signal.SIGCONT)
    ended = launched.wait(30)
    assert ended.rc == 0 and ended.out.endswith("lost\n"), ended.said()
    assert changed(seen, look(store)) == []
    assert newest(launch(store))[0] == (0, step + 1)
    lease.release("finished")


# -- damage -----------------------------------------------------------------------------------------------------


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]


def places_of(data: bytes) -> list[int]:
    """Bytes to flip: where a file begins and ends, where a safetensors header ends, some of each stretch between."""
    header = 8 + int.from_bytes(data[:8], "little")
    edges = {0, 7, 8, 9, header - 1, header, len(data) // 2, len(data) - 2, len(data) - 1}
    return sorted({at for at in edges | set(range(0, len(data), 41)) if 0 <= at < len(data)})


FILES = [
    *[((1, 9), name) for name in (WEIGHTS, MOMENTS, STATE, OUTBOX, COMPLETE, MASK)],
    *[((1, None), name) for name in (WEIGHTS, STATE, TICKET, OUTBOX, PICTURES, SCORES, COMPLETE, MASK)],
]


@pytest.mark.parametrize(("place", "part"), FILES)
def test_a_flipped_bit_anywhere_in_a_commit_is_noticed_and_the_last_one_taken(
    site: Site, place: Place, part: str
) -> None:
    store = site.run()
    kept = launch(store)
    before = newest(kept)
    DEEDS[place](kept, NEW)
    (folder,) = [c.folder for c in kept.commits() if (c.round_, c.step) == place]
    name = f"{folder}/{part}"
    data = store.get(name)
    for at in places_of(data):
        store.put(name, flipped(data, at))
        found = Checkpoints(store).latest()
        assert found is not None
        commit, parts, damaged = found
        assert ((commit.round_, commit.step), parts[WEIGHTS]) == before
        assert damaged == [f"memory/{name} is damaged: its bytes are not those that were committed"]
    store.put(name, data)
    assert newest(Checkpoints(store))[0] == place


def test_every_flipped_byte_of_run_json_is_found(site: Site) -> None:
    store = site.run()
    data = store.get(RUN)
    for at in range(len(data)):
        store.put(RUN, flipped(data, at))
        with pytest.raises(
            UserError, match=r"^memory/run\.json does not describe a run, or is damaged\. Restore a copy"
        ):
            Checkpoints(store).identity()
    store.put(RUN, data)
    assert Checkpoints(store).identity() == IDENTITY


def test_a_flipped_byte_of_the_list_of_accepted_commits_loses_none_of_them(site: Site) -> None:
    # It may bring back a commit that came too late: a whole one of this very run, so nothing is lost by that either.
    store = site.run()
    launch(store)
    step_9(Checkpoints(store, Blind()), OLD)
    (name,) = store.list(ACCEPTED)
    data, expected = store.get(name), whole(store)
    assert newest(Checkpoints(store))[0] == (1, 6)
    for at in range(len(data)):
        store.put(name, flipped(data, at))
        for kept in (Checkpoints(store), launch(Memory(store.files))):
            assert newest(kept)[0] in ((1, 6), (1, 9))
        assert whole(store).keys() - {"rounds/01/steps/00000009-0001"} == expected.keys()


# -- seals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"digest": 1}', to_json({"a": 1})])
def test_what_was_not_sealed_is_not_unsealed(data: bytes) -> None:
    assert check_digest(data) is None


@pytest.mark.parametrize("value", [{}, {"a": 1}, {"a": [1.5, None, "\u00e9"], "b": {"digest": 0}}])
def test_a_sealed_value_comes_back_and_every_flipped_bit_of_it_is_found(value: dict[str, Any]) -> None:
    data = add_digest(value)
    assert check_digest(data) == value
    for at in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[at // 8] ^= 1 << at % 8
        assert check_digest(bytes(wrong)) is None, f"bit {at}"
