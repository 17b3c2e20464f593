"""Laws of the node's cache: brought once, verified, never over its limit, never from under a reader, kills survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from mirl_dist.data.cache import CachedShard, ShardCache, WrongBytes
from mirl_dist.errors import UserError
from mirl_dist.storage import Unavailable

SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def digest(number: int) -> str:
    return sha256(content(number)).hexdigest()


class Source:
    """Brings files from memory and remembers which bytes it gave."""

    def __init__(self) -> None:
        self.given: list[tuple[int, int]] = []

    def __call__(self, number: int) -> Callable[[Path], None]:
        def fetch(path: Path) -> None:
            begin = path.stat().st_size
            self.given.append((number, SIZE - begin))
            with path.open("ab") as file:
                file.write(content(number)[begin:])

        return fetch


@pytest.fixture
def source() -> Source:
    return Source()


def hold(cache: ShardCache, source: Source, number: int) -> CachedShard:
    return cache.acquire(digest(number), SIZE, source(number))


def kept(folder: Path) -> list[int]:
    return sorted(n for n in range(20) if (folder / f"{digest(n)}.tar").exists())


def bytes_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def test_a_file_is_brought_once_and_is_what_its_digest_says(tmp_path: Path, source: Source) -> None:
    cache = ShardCache(tmp_path / "deep" / "cache", 10 * SIZE)
    first, second = hold(cache, source, 1), hold(cache, source, 1)
    assert first.path == second.path
    assert first.path.read_bytes() == content(1)
    assert (first.fresh, second.fresh) == (True, False)
    assert source.given == [(1, SIZE)]
    first.release()
    first.release()
    second.release()


def test_the_longest_unused_file_goes_first_and_the_limit_holds(tmp_path: Path, source: Source) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    for number in (0, 1, 2):
        hold(cache, source, number).release()
        os.utime(tmp_path / f"{digest(number)}.tar", (number, number))
    hold(cache, source, 0).release()  # used again: now the youngest
    hold(cache, source, 3).release()
    assert kept(tmp_path) == [0, 2, 3]
    assert bytes_in(tmp_path) <= 3 * SIZE


def test_what_is_held_stays_also_when_room_is_wanted(tmp_path: Path, source: Source) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE, patience=0.2)
    first, second = hold(cache, source, 0), hold(cache, source, 1)
    wanted = r"has no room for .* of its 2e-06 GB 2e-06 GB are in use\. Raise data\.cache\."
    with pytest.raises(Unavailable, match=wanted):
        hold(cache, source, 2)
    assert kept(tmp_path) == [0, 1]
    first.release()
    hold(cache, source, 2).release()
    assert kept(tmp_path) == [1, 2]
    assert second.path.read_bytes() == content(1)
    second.release()


def test_who_waits_for_room_goes_on_when_it_is_given(tmp_path: Path, source: Source) -> None:
    cache = ShardCache(tmp_path, SIZE)
    first = hold(cache, source, 0)
    got: list[CachedShard] = []
    waiter = threading.Thread(target=lambda: got.append(hold(cache, source, 1)))
    waiter.start()
    time.sleep(0.1)
    assert not got
    first.release()
    waiter.join(30)
    assert got[0].path.read_bytes() == content(1)
    got[0].release()


def test_wrong_bytes_are_never_handed_out_and_do_not_stay(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE)
    with pytest.raises(WrongBytes):
        cache.acquire(digest(1), SIZE, lambda path: path.write_bytes(content(2)) and None)
    assert [p.name for p in tmp_path.iterdir()] == ["room.lock"]


def test_a_file_that_went_bad_is_discarded_but_not_the_one_that_took_its_place(tmp_path: Path, source: Source) -> None:
    """As when all ranks of a node find the same bad file, and the fast one has brought another already."""
    cache = ShardCache(tmp_path, 10 * SIZE)
    hold(cache, source, 1).release()
    (tmp_path / f"{digest(1)}.tar").write_bytes(content(2))
    fast, slow = hold(cache, source, 1), hold(cache, source, 1)
    assert fast.digest() == slow.digest() == digest(2)
    cache.discard(fast)
    again = hold(cache, source, 1)
    assert (again.fresh, again.digest()) == (True, digest(1))
    assert slow.digest() == digest(2), "what is held stays what it was"
    cache.discard(slow)
    assert again.is_in_place()
    assert hold(cache, source, 1).digest() == digest(1)
    assert source.given == [(1, SIZE)] * 2


def test_who_looks_while_a_file_gets_its_name_does_not_bring_it_again(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between 'is it there' and 'is it being brought': the name changes in between."""
    cache = ShardCache(tmp_path, 10 * SIZE)
    exists, first = Path.exists, list[CachedShard | None]()

    def late(path: Path) -> bool:
        found = exists(path)
        if not first and path.name.endswith(".tar"):  # looked, and then another process is done with it
            first.append(None)
            first[0] = bring_elsewhere(tmp_path, source)
        return found

    monkeypatch.setattr(Path, "exists", late)
    second = hold(cache, source, 1)
    monkeypatch.undo()
    assert second.is_in_place()
    assert first[0] is None or first[0].is_in_place(), "no file was replaced under its holder"
    assert len(source.given) == 1


def bring_elsewhere(folder: Path, source: Source) -> CachedShard | None:
    """Another process tries to bring the file at this moment; the room's lock makes it wait."""
    got: list[CachedShard] = []
    other = threading.Thread(target=lambda: got.append(hold(ShardCache(folder, 10 * SIZE), source, 1)), daemon=True)
    other.start()
    other.join(0.3)
    return got[0] if got else None


def test_what_a_store_has_instead_is_kept_by_the_same_rules(tmp_path: Path, source: Source) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    held = cache.acquire(digest(1), 300, lambda path: path.write_bytes(b"x" * 300) and None, damaged=True)
    assert held.path.name == f"{digest(1)}.300.damaged"
    again = cache.acquire(digest(1), 300, source(1), damaged=True)
    assert not again.fresh
    held.release()
    again.release()
    hold(cache, source, 2).release()
    hold(cache, source, 3).release()
    assert kept(tmp_path) == [2, 3]
    assert not held.path.exists()


def test_a_fetch_that_fails_leaves_what_it_brought_for_the_next(tmp_path: Path, source: Source) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE)

    def broken(path: Path) -> None:
        path.write_bytes(content(1)[:300])
        raise UserError("the line is down")

    with pytest.raises(UserError, match="the line is down"):
        cache.acquire(digest(1), SIZE, broken)
    hold(cache, source, 1).release()
    assert source.given == [(1, 700)]


def test_leftovers_of_the_dead_make_room_when_it_is_wanted(tmp_path: Path, source: Source) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    (tmp_path / f"{digest(7)}.{SIZE}.tar.partial").write_bytes(b"x")
    hold(cache, source, 0).release()
    assert len(list(tmp_path.glob("*.partial"))) == 1, "there was room for both"
    os.utime(tmp_path / f"{digest(7)}.{SIZE}.tar.partial", (1, 1))
    hold(cache, source, 1).release()
    assert list(tmp_path.glob("*.partial")) == []
    assert kept(tmp_path) == [0, 1]


def test_a_file_larger_than_the_limit_and_a_folder_that_cannot_be_are_refused(tmp_path: Path, source: Source) -> None:
    with pytest.raises(UserError, match=r"^data\.cache\.gigabytes: found 5e-07, but one shard has 1e-06 GB\. Raise it"):
        hold(ShardCache(tmp_path, SIZE // 2), source, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^the cache .*file.* or choose another data\.cache\.folder"):
        ShardCache(tmp_path / "file" / "cache", SIZE)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path, source: Source) -> None:
    (tmp_path / "thesis.tar").write_bytes(b"x" * 9 * SIZE)
    cache = ShardCache(tmp_path, SIZE)
    hold(cache, source, 0).release()
    hold(cache, source, 1).release()
    assert kept(tmp_path) == [1]
    assert (tmp_path / "thesis.tar").exists()


# -- many processes ---------------------------------------------------------------------------------------------

READER = """
import os, random, sys, time
from hashlib import sha256
from pathlib import Path
from mirl_dist.data.cache import ShardCache

folder, log, limit, size, seed, mode = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]), sys.argv[6]
chance, cache = random.Random(seed), ShardCache(folder, limit)


def fetch_of(number):
    def fetch(path):
        begin = path.stat().st_size
        with log.open("a") as file:
            file.write(f"{number} {size - begin}\\n")
        for byte in range(begin, size, 100):
            with path.open("ab") as file:
                file.write(bytes([number]) * 100)
            time.sleep(0.01 if mode == "slow" else 0.0005)
            if mode == "die" and byte >= 400:
                os.kill(os.getpid(), 9)
    return fetch


for _ in range(1 if mode != "many" else 25):
    number = chance.randrange(6) if mode == "many" else 1
    digest = sha256(bytes([number]) * size).hexdigest()
    held = cache.acquire(digest, size, fetch_of(number))
    assert held.path.read_bytes() == bytes([number]) * size, "not the file that was asked for"
    time.sleep(0.002)
    assert held.path.read_bytes() == bytes([number]) * size, "it went while it was held"
    held.release()
"""


def reader(folder: Path, log: Path, limit: int, seed: int, mode: str) -> subprocess.Popen[bytes]:
    arguments = [str(folder), str(log), str(limit), str(SIZE), str(seed), mode]
    return subprocess.Popen([sys.executable, "-c", READER, *arguments], stderr=subprocess.PIPE)


def test_many_processes_share_a_small_cache_and_its_limit_holds_at_every_moment(tmp_path: Path) -> None:
    """Four readers with one file each in hand, six files, room for five."""
    folder, log = tmp_path / "cache", tmp_path / "log"
    folder.mkdir()
    readers = [reader(folder, log, 5 * SIZE, seed, "many") for seed in range(4)]
    most = 0
    while any(r.poll() is None for r in readers):
        try:
            most = max(most, bytes_in(folder))
        except FileNotFoundError:
            continue  # a file went between two looks
    errors = [r.communicate()[1].decode() for r in readers]
    assert [r.returncode for r in readers] == [0] * 4, errors
    assert 0 < most <= 5 * SIZE
    assert len(log.read_text().splitlines()) < 100, "files that were there were brought again"


def test_of_many_processes_that_want_one_file_one_brings_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    readers = [reader(tmp_path / "cache", log, 5 * SIZE, seed, "slow") for seed in range(4)]
    assert [r.communicate(timeout=60)[1] for r in readers] == [b""] * 4
    assert log.read_text() == f"1 {SIZE}\n"


def test_the_next_one_goes_on_where_a_killed_process_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = reader(tmp_path / "cache", log, 5 * SIZE, 0, "die")
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    second = reader(tmp_path / "cache", log, 5 * SIZE, 0, "one")
    assert second.communicate(timeout=60) == (None, b"")
    assert log.read_text().split() == ["1", str(SIZE), "1", str(SIZE - 500)]
