"""Laws of a store: a name is whole or not there, and only NotFound means that it is not."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mirl_dist.storage import Folder, NotFound, Rejected, StorageError, Store, Unavailable, open_store
from mirl_dist.storage.retry import Patience, download

PART = 1 << 24
"""Bytes: what is longer goes to a bucket in parts."""


def big(size: int = 3_000_000) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Folder(tmp_path / "store")


class TestEveryStore:
    """What all stores keep, through the protocol alone. Each further kind joins with a fixture `store` of its own."""

    MANY = 1050
    """Names: more than a server lists at once."""
    TURNS = 400
    """Of each writer beside others."""

    def test_a_name_that_does_not_exist_is_not_there(self, store: Store) -> None:
        store.put("a/b", b"x")
        for name in ("b", "a/c", "a/b.x", "c/d/e"):
            assert not store.exists(name)
            with pytest.raises(NotFound, match="does not exist"):
                store.get(name)

    def test_a_prefix_is_no_name(self, store: Store) -> None:
        store.put("a/b", b"x")
        assert not store.exists("a")
        with pytest.raises(StorageError):
            store.get("a")

    def test_names_are_listed_below_a_prefix_in_order(self, store: Store) -> None:
        for name in ("r/10/z", "r/02/y", "r/02/x/w", "rr/q", "top"):
            store.put(name, b"1")
        assert store.list("r") == ["r/02/x/w", "r/02/y", "r/10/z"]
        assert store.list("r/02") == ["r/02/x/w", "r/02/y"]
        assert store.list("") == ["r/02/x/w", "r/02/y", "r/10/z", "rr/q", "top"]
        assert store.list("nowhere") == []

    def test_prefixes_that_begin_alike_are_kept_apart(self, store: Store) -> None:
        names = ["run-2/a", "run/a", "run/a.b", "run/ab/c", "run2/a", "runs"]
        for name in names:
            store.put(name, name.encode())
        assert (store.list("run"), store.list("run/ab"), store.list("ru")) == (names[1:4], ["run/ab/c"], [])
        store.remove("run/a")
        store.sweep(0)
        assert store.list("") == [name for name in names if name != "run/a"]

    def test_what_is_removed_is_gone_and_its_neighbours_stay(self, store: Store) -> None:
        store.put("a/b/c", b"1")
        store.put("a/d", b"2")
        store.remove("a/b/c")
        store.remove("a/b/c")
        store.remove("never/was")
        assert store.list("") == ["a/d"]
        store.put("a/b/c", b"3")
        assert store.get("a/b/c") == b"3"

    def test_put_if_absent_writes_once(self, store: Store) -> None:
        assert store.put_if_absent("a/run.json", b"first") is True
        assert store.put_if_absent("a/run.json", b"second") is False
        assert store.get("a/run.json") == b"first"
        store.remove("a/run.json")
        assert store.put_if_absent("a/run.json", b"third") is True
        assert store.list("") == ["a/run.json"], "the loser leaves nothing behind"

    def test_of_twenty_threads_exactly_one_wins(self, store: Store) -> None:
        for attempt in range(4):
            start = threading.Barrier(20)

            def race(me: int, name: str = f"lease/{attempt}", start: threading.Barrier = start) -> bool:
                start.wait()
                return store.put_if_absent(name, f"writer {me}".encode() * 100)

            with ThreadPoolExecutor(20) as pool:
                won = list(pool.map(race, range(20)))
            assert won.count(True) == 1
            assert store.get(f"lease/{attempt}") == f"writer {won.index(True)}".encode() * 100
        assert len(store.list("")) == 4

    def test_of_three_processes_exactly_one_wins(self, store: Store) -> None:
        code = (
            "import pickle, sys\n"
            "store, me = pickle.loads(bytes.fromhex(sys.argv[1])), sys.argv[2]\n"
            "store.put(f'ready/{me}', b'')\n"
            "while len(store.list('ready')) < 3: pass\n"
            "print([n for n in range(12) if store.put_if_absent(f'lease/{n}', me.encode())])"
        )
        racing = {
            me: subprocess.Popen([sys.executable, "-c", code, pickle.dumps(store).hex(), me], stdout=subprocess.PIPE)
            for me in "abc"
        }
        try:
            won = {me: json.loads(one.communicate(timeout=60)[0]) for me, one in racing.items()}
        finally:
            for one in racing.values():
                one.kill()
                one.communicate()
        assert sorted(n for mine in won.values() for n in mine) == list(range(12))
        for me, mine in won.items():
            assert all(store.get(f"lease/{n}") == me.encode() for n in mine)

    def test_a_reader_sees_the_old_or_the_new_and_nothing_between(self, store: Store) -> None:
        versions = [bytes([n]) * 200_000 for n in range(4)]
        store.put("a", versions[0])
        done = threading.Event()

        def read() -> int:
            seen = 0
            while not done.is_set():
                assert store.get("a") in versions
                assert store.list("") == ["a"]
                seen += 1
            return seen

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                for turn in range(40):
                    store.put("a", versions[turn % 4])
            finally:
                done.set()
            assert all(reader.result() > 0 for reader in readers)

    def test_a_place_is_told_for_people(self, store: Store) -> None:
        assert store.where("a/b").startswith(store.where())
        assert store.where("a/b").endswith("a/b")

    def test_odd_names_are_names(self, store: Store) -> None:
        names = ["a b/c d", "a+b", "50%", "%20", "ümlaut/日本", "q?x=1&y=2#z", "quote'\"", "a:b;c,d@e=f~g(h)[i]{j}"]
        for name in names:
            store.put(name, name.encode())
        assert store.list("") == sorted(names)
        for name in names:
            assert store.get(name) == name.encode()
            assert store.size(name) == len(name.encode())
            store.remove(name)
        assert store.list("") == []

    @pytest.mark.parametrize("size", [0, 1, 100_000, PART, PART + 5])
    def test_data_arrives_whole_whatever_its_size(self, store: Store, tmp_path: Path, size: int) -> None:
        data = big(size)
        (tmp_path / "file").write_bytes(data)
        assert not store.exists("weights")
        store.put_file("shards/a.tar", tmp_path / "file")
        store.put("weights", data)
        assert store.put_if_absent("lease", data) is True
        for name in ("shards/a.tar", "weights", "lease"):
            assert store.exists(name)
            assert store.size(name) == size
            assert store.get(name) == data
        assert store.list("") == ["lease", "shards/a.tar", "weights"]

    def test_long_and_short_replace_each_other(self, store: Store, tmp_path: Path) -> None:
        data = big(2 * PART + 17)
        for turn in range(2):
            store.put("a", data[turn:])
            assert store.get("a") == data[turn:]
            store.put("a", b"short")
            assert store.get("a") == b"short"
        assert store.put_if_absent("a", data) is False
        assert store.get("a") == b"short"

    def test_a_long_listing_comes_whole(self, store: Store) -> None:
        names = [f"p/{n:05d}" for n in range(self.MANY)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: store.put(name, b""), names))
        store.put("pp/other", b"")
        assert store.list("p") == names
        assert store.list("") == [*names, "pp/other"]

    def test_names_come_and_go_beside_one_another(self, store: Store) -> None:
        """A folder that a removal leaves empty may be wanted by a put at that moment."""

        def work(me: int) -> None:
            for n in range(self.TURNS):
                store.put(f"a/b/{me}", b"%d" % n)
                assert store.get(f"a/b/{me}") == b"%d" % n
                store.remove(f"a/b/{me}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert store.list("") == []

    def test_a_read_begins_anywhere_and_gives_nothing_at_the_end(self, store: Store) -> None:
        data = big(700_000)
        store.put("a", data)
        store.put("empty", b"")
        for offset in (0, 1, 262_144, 699_999, 700_000, 700_001):
            assert b"".join(store.read("a", offset)) == data[offset:]
        assert b"".join(store.read("empty")) == b""
        with pytest.raises(NotFound, match="does not exist"):
            list(store.read("b"))
        with pytest.raises(NotFound, match="does not exist"):
            store.size("b")

    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # threads that play the network
    def test_a_store_travels_to_other_processes(self, store: Store) -> None:
        store.put("a", b"from the parent")
        copy: Store = pickle.loads(pickle.dumps(store))
        assert copy.get("a") == b"from the parent"
        with ThreadPoolExecutor(2):
            context = multiprocessing.get_context("fork")
            child = context.Process(target=_child, args=(store,))
            child.start()
            child.join(60)
        assert child.exitcode == 0
        assert store.get("child") == b"from the child, which read: from the parent"

    def test_a_download_brings_what_is_missing_and_refuses_another_size(self, store: Store, tmp_path: Path) -> None:
        data = big(600_000)
        store.put("a", data)
        path = tmp_path / "a.part"
        path.write_bytes(data[:250_000])
        download(store, "a", path, 600_000, patience=Patience(0), say=pytest.fail)
        assert path.read_bytes() == data
        download(store, "a", path, 600_000, patience=Patience(0), say=pytest.fail)
        with pytest.raises(Rejected, match=r"a\.part has 600000 bytes, but .*/a should have 5\. Remove"):
            download(store, "a", path, 5, patience=Patience(0), say=pytest.fail)
        for wrong in (599_999, 600_001, 1):
            path.unlink(missing_ok=True)
            with pytest.raises(Rejected, match=rf"/a has 600000 bytes where its manifest or commit says {wrong}\."):
                download(store, "a", path, wrong, patience=Patience(0), say=pytest.fail)
            assert not path.exists(), "bytes of another object are not kept to be continued"
        with pytest.raises(NotFound):
            download(store, "b", path, 10, patience=Patience(0), say=pytest.fail)


def _child(store: Store) -> None:
    store.put("child", b"from the child, which read: " + store.get("a"))


# -- a folder ---------------------------------------------------------------------------------------------------


def leftovers(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.is_file())


def test_removing_the_last_name_removes_its_empty_folders_but_never_the_root(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.put("a/b/c/d", b"1")
    store.put("a/e", b"2")
    store.remove("a/b/c/d")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "e"]
    store.remove("a/e")
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.is_dir()


def test_what_a_dead_writer_left_is_not_listed_and_can_be_swept(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.put("a/b", b"whole")
    code = (
        "import os, sys; from pathlib import Path; from mirl_dist.storage import local as storage\n"
        "storage.os.replace = storage.os.fsync = lambda *a: os._exit(9)\n"
        "storage.Folder(Path(sys.argv[1])).put('a/b', b'half' * 1000)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode
    assert ended == 9
    assert len(leftovers(tmp_path)) == 2, "the dead writer's temporary file lies there"
    assert store.list("") == ["a/b"]
    assert store.get("a/b") == b"whole"
    store.sweep()
    assert leftovers(tmp_path) == ["b"]


PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


@pytest.mark.parametrize("number", PASSING + LASTING)
def test_an_error_of_the_system_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    kind = Unavailable if number in PASSING else Rejected
    store = Folder(tmp_path)
    store.put("a/b", b"before")

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("mirl_dist.storage.local.os.fsync", refuse)
    for write in (store.put, store.put_if_absent):
        with pytest.raises(kind) as caught:
            write("a/b", b"after")
        assert type(caught.value) is kind
        assert str(caught.value).startswith(f"{tmp_path}/a/b: {os.strerror(number)}. ")
        assert "what was there before is intact" in str(caught.value)
    assert store.get("a/b") == b"before"
    assert leftovers(tmp_path) == ["b"]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    place = tmp_path / "full"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_says_try_again_and_keeps_what_was_there(full: Path) -> None:
    store = Folder(full)
    store.put("a/b", b"before")
    for write in (store.put, store.put_if_absent):
        with pytest.raises(Unavailable, match=r"No space left on device\. .*Make room or repair the disk, then start"):
            write("a/b", bytes(200_000))
        with pytest.raises(Unavailable):
            write("a/c", bytes(200_000))
    assert store.list("") == ["a/b"]
    assert store.get("a/b") == b"before"
    assert leftovers(full) == ["b"], "no half-written file takes the room"
    store.put("a/b", b"after")
    assert store.get("a/b") == b"after"


def test_a_file_where_a_folder_should_be_is_not_allowed_and_never_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = Folder(tmp_path / "file")
    for act in (
        lambda: store.get("run.json"),
        lambda: store.put("run.json", b""),
        lambda: store.put_if_absent("run.json", b""),
        lambda: store.list(""),
    ):
        with pytest.raises(Rejected, match="Correct the rights, or choose another folder"):
            act()


@pytest.mark.skipif(os.name != "posix", reason="rights of files are POSIX's here")
def test_what_may_not_be_read_is_not_allowed_and_never_not_there(tmp_path: Path) -> None:
    """Run as a user without rights, since root may read everything."""
    open_way = [tmp_path, *tmp_path.parents]
    Folder(tmp_path).put("rounds/00/COMPLETE.json", b"{}")
    Folder(tmp_path).put("run.json", b"{}")
    (tmp_path / "rounds").chmod(0)
    (tmp_path / "run.json").chmod(0)
    code = """
import os, sys
from pathlib import Path
from mirl_dist.storage import Folder, Rejected
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
store = Folder(Path(sys.argv[1]))
for act in (store.list, store.get, store.exists, lambda n: store.put(n, b"")):
    name = "run.json" if act == store.get else "rounds" if act == store.list else "rounds/00/COMPLETE.json"
    try:
        print(act(name))
    except Rejected:
        print("not allowed")
try:
    print(store.list(""))
except Rejected:
    print("not allowed")
"""
    changed = []
    try:
        if os.getuid() == 0:
            for folder in open_way:
                if folder.stat().st_mode & 0o005 != 0o005:
                    changed.append((folder, folder.stat().st_mode))
                    folder.chmod(folder.stat().st_mode | 0o005)
        ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    finally:
        for folder, mode in changed:
            folder.chmod(mode)
        (tmp_path / "rounds").chmod(0o755)
    assert ran.stdout.splitlines() == ["not allowed"] * 5, ran.stderr


# -- addresses --------------------------------------------------------------------------------------------------


def test_an_address_chooses_the_store(tmp_path: Path) -> None:
    for number, address in enumerate((str(tmp_path / "a b"), (tmp_path / "a b").as_uri())):
        opened = open_store(address)
        opened.put(str(number), b"1")
        assert (tmp_path / "a b" / str(number)).read_bytes() == b"1"
    for address in ("s3://bucket/run", "s3://bucket", "http://host:80/shards", "https://host/a"):
        assert open_store(address).where("x") == f"{address}/x"


@pytest.mark.parametrize("address", ["gs://bucket/run", "ftp://user:swordfish@host/x", "S4://x"])
def test_an_unknown_kind_of_address_is_refused_with_the_known_ones(address: str) -> None:
    with pytest.raises(
        Rejected, match=r"^\w+:// is not known here\. Give a folder's path, file://, s3://bucket/"
    ) as caught:
        open_store(address)
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("s3:/bucket/x", "Write s3://bucket/x (for a folder of that name: ./s3:/bucket/x)"),
        ("https:/host/x", "Write https://host/x"),
        ("file:/data/x", "Write file:///data/x"),
        ("gs:/bucket/x", "Write a folder's path, file:///path, s3://bucket/prefix, or http(s)://host/folder"),
        ("https:/ada:swordfish@host/x", "Write https://, without keys"),
        ("http:/host/x?key=swordfish", "Write http://, without keys"),
    ],
)
def test_an_address_that_lacks_a_slash_is_refused_with_what_was_meant(address: str, meant: str) -> None:
    with pytest.raises(Rejected) as caught:
        open_store(address)
    assert meant in str(caught.value) and "swordfish" not in str(caught.value)


@pytest.mark.parametrize("path", ["./s3:/bucket/x", "/data/a:/b", "a:b", "a b:/c", "1:/x"])
def test_a_path_with_a_colon_is_still_a_folder(path: str) -> None:
    assert open_store(path).where() == str(Path(path))


@pytest.mark.parametrize("address", ["file://other-host/run", "file://", "file:///run?x"])
def test_a_file_address_means_a_folder_of_this_machine(address: str) -> None:
    with pytest.raises(Rejected, match=r"is no folder of this machine\. Write file:///path, or the path alone"):
        open_store(address)


def test_looking_at_an_address_loads_no_client() -> None:
    code = "import sys, mirl_dist.storage as s; s.open_store('s3://bucket/run'); print('boto3' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
