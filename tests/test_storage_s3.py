"""Laws of a bucket: the same as a folder's, over a network that breaks, against a real server."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import test_storage
from faulty_proxy import FORBIDDEN, SLOW_DOWN, FaultyProxy, answer
from s3_server import S3Server

from mirl_dist.storage import Folder, NotAllowed, NotThere, Store, TryAgain, open_store
from mirl_dist.storage import s3 as door
from mirl_dist.storage.patience import Patience, download, patiently
from mirl_dist.storage.s3 import S3

SECRET = "testing-secret"
SHORT = Patience(seconds=20, first=0.01, most=0.1)
ONCE = Patience(0)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of the server; this process's S3 stores go through it."""
    with FaultyProxy(server.url) as between:
        for name, value in server.env(between.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        yield between


@pytest.fixture
def bucket(server: S3Server, request: pytest.FixtureRequest) -> str:
    """The address of a bucket of this test's own."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40].strip("-")
    return server.bucket(f"{name}-{random.randrange(1 << 32):08x}")


@pytest.fixture
def lines() -> list[str]:
    """What was said to people."""
    return []


@pytest.fixture
def store(proxy: FaultyProxy, bucket: str, lines: list[str]) -> S3:
    return S3(f"{bucket}/some/prefix", patience=SHORT, say=lines.append, connect_seconds=2, read_seconds=2)


def impatient(url: str, **more: Any) -> S3:
    return S3(url, patience=ONCE, say=pytest.fail, **{"connect_seconds": 2, "read_seconds": 0.5, **more})


def big(size: int = 3_000_000) -> bytes:
    return random.Random(size).randbytes(size)


class TestTheLawsOfEveryStore(test_storage.TestEveryStore):
    """All that a folder keeps."""

    @pytest.fixture
    def store(self, proxy: FaultyProxy, bucket: str) -> Store:
        return S3(f"{bucket}/some/prefix", patience=SHORT, say=pytest.fail)


class TestMoreLaws:
    """Of folders and buckets alike."""

    @pytest.fixture(params=["folder", "s3"])
    def store(self, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
        if request.param == "folder":
            return Folder(tmp_path / "store")
        request.getfixturevalue("proxy")
        return S3(request.getfixturevalue("bucket"), patience=SHORT, say=pytest.fail)

    def test_of_twenty_writers_exactly_one_wins(self, store: Store) -> None:
        start = threading.Barrier(20)

        def race(me: int) -> bool:
            start.wait()
            return store.put_if_absent("lease", f"writer {me}".encode())

        with ThreadPoolExecutor(20) as pool:
            won = list(pool.map(race, range(20)))
        assert won.count(True) == 1
        assert store.get("lease") == f"writer {won.index(True)}".encode()

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

    @pytest.mark.parametrize("size", [0, 1, 100_000, (1 << 24) + 5, (1 << 25) + (1 << 24)])
    def test_a_file_arrives_whole_whatever_its_size(self, store: Store, tmp_path: Path, size: int) -> None:
        data = big(size)
        (tmp_path / "file").write_bytes(data)
        store.put_file("shards/a.tar", tmp_path / "file")
        assert store.size("shards/a.tar") == size
        assert store.get("shards/a.tar") == data
        assert store.list("") == ["shards/a.tar"]

    def test_a_read_begins_anywhere_and_gives_nothing_at_the_end(self, store: Store) -> None:
        data = big(700_000)
        store.put("a", data)
        store.put("empty", b"")
        for offset in (0, 1, 262_144, 699_999, 700_000, 700_001):
            assert b"".join(store.read("a", offset)) == data[offset:]
        assert b"".join(store.read("empty")) == b""
        with pytest.raises(NotThere, match="does not exist"):
            list(store.read("b"))
        with pytest.raises(NotThere, match="does not exist"):
            store.size("b")

    def test_many_threads_share_one_store(self, store: Store) -> None:
        def work(me: int) -> bool:
            store.put(f"t/{me}", bytes([me]) * 1000)
            return store.get(f"t/{me}") == bytes([me]) * 1000 and store.exists(f"t/{me}")

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(work, range(48)))
        assert len(store.list("t")) == 48

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
        download(store, "a", path, 600_000, patience=ONCE, say=pytest.fail)
        assert path.read_bytes() == data
        download(store, "a", path, 600_000, patience=ONCE, say=pytest.fail)
        with pytest.raises(NotAllowed, match=r"a\.part has 600000 bytes, but .*/a should have 5\. Remove"):
            download(store, "a", path, 5, patience=ONCE, say=pytest.fail)
        for wrong in (599_999, 600_001, 1):
            path.unlink(missing_ok=True)
            with pytest.raises(NotAllowed, match=rf"/a has 600000 bytes where its manifest or commit says {wrong}\."):
                download(store, "a", path, wrong, patience=ONCE, say=pytest.fail)
            assert not path.exists(), "bytes of another object are not kept to be continued"
        with pytest.raises(NotThere):
            download(store, "b", path, 10, patience=ONCE, say=pytest.fail)


def _child(store: Store) -> None:
    store.put("child", b"from the child, which read: " + store.get("a"))


# -- a bucket ---------------------------------------------------------------------------------------------------


def test_stores_of_neighbouring_prefixes_do_not_see_each_other(proxy: FaultyProxy, bucket: str) -> None:
    one, two, all_ = (S3(f"{bucket}{end}", say=pytest.fail) for end in ("/run/", "/run2", ""))
    one.put("a", b"1")
    two.put("a", b"2")
    assert (one.list(""), two.list("")) == (["a"], ["a"])
    assert all_.list("") == ["run/a", "run2/a"]
    assert all_.list("run") == ["run/a"]
    assert one.where("a") == f"{bucket}/run/a"
    assert one.where() == f"{bucket}/run"
    assert all_.where() == bucket


def test_a_long_listing_comes_whole_in_pages(server: S3Server, proxy: FaultyProxy, bucket: str) -> None:
    client = server.client()
    for n in range(210):
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"p/{n:05d}", Body=b"")
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key="p/folder/", Body=b"")
    store = S3(f"{bucket}/p", say=pytest.fail)
    assert store.list("") == [f"{n:05d}" for n in range(210)]
    assert len([line for line in proxy.requests if "list-type=2" in line]) == 3


def test_sweep_aborts_what_dead_uploads_left_and_only_below_the_prefix(
    server: S3Server, proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This server dates all uploads years back."""
    client, name = server.client(), bucket.removeprefix("s3://")
    for key in ("run/a", "run/b", "run2/c"):
        client.create_multipart_upload(Bucket=name, Key=key)
    store = S3(f"{bucket}/run", say=pytest.fail)
    monkeypatch.setattr(door, "_STALE", door.timedelta(days=36500))
    store.sweep()
    assert len(client.list_multipart_uploads(Bucket=name)["Uploads"]) == 3, "uploads that may still live stay"
    monkeypatch.undo()
    for key, value in server.env(proxy.url).items():
        monkeypatch.setenv(key, value)
    store.sweep()
    assert [found["Key"] for found in client.list_multipart_uploads(Bucket=name)["Uploads"]] == ["run2/c"]


def test_a_missing_bucket_is_not_allowed_and_never_not_there(proxy: FaultyProxy, tmp_path: Path) -> None:
    store = impatient("s3://nobody-made-this/run")
    (tmp_path / "file").write_bytes(b"x")
    acts: list[Callable[[], object]] = [
        lambda: store.get("a"),
        lambda: store.put("a", b""),
        lambda: store.put_if_absent("a", b""),
        lambda: store.put_file("a", tmp_path / "file"),
        lambda: store.exists("a"),
        lambda: store.size("a"),
        lambda: store.list(""),
        lambda: list(store.read("a")),
        lambda: store.remove("a"),
    ]
    for act in acts:
        with pytest.raises(NotAllowed, match=r"^s3://nobody-made-this/run.*: the bucket does not exist\. Create it"):
            act()


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///run", "s3://ab", "s3://b_cket!/x", f"s3://key:{SECRET}@bucket/run", f"s3://bucket/r?sig={SECRET}"],
)
def test_an_address_that_is_none_is_refused_and_its_keys_are_not_repeated(url: str) -> None:
    with pytest.raises(NotAllowed, match=r"An address of S3 is s3://bucket/prefix") as caught:
        open_store(url)
    assert SECRET not in str(caught.value)


def test_an_endpoint_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    for endpoint in ("not an address", f"http://user:{SECRET}@127.0.0.1:9"):
        for name, value in server.env(endpoint).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(NotAllowed, match="Set AWS_ENDPOINT_URL_S3 to http") as caught:
            impatient("s3://bucket/run").get("a")
        assert SECRET not in str(caught.value)


def test_missing_credentials_are_named(proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(NotAllowed, match="no usable credentials were found. Set AWS_ACCESS_KEY_ID"):
        impatient(bucket).get("a")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(NotAllowed, match="ProfileNotFound"):
        impatient(bucket).get("a")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "AccessDenied", "their rights to read, write and list"),
        (403, "SignatureDoesNotMatch", "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (403, "InvalidAccessKeyId", "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", "Set this machine's clock"),
        (400, "ExpiredToken", "Renew the credentials"),
        (401, "Unauthorized", "their rights"),
        (400, "AuthorizationHeaderMalformed", "Set AWS_DEFAULT_REGION"),
        (418, f"a teapot {SECRET}", "no code .HTTP 418.. Check the endpoint"),
    ],
)
def test_a_refusal_is_not_allowed_says_what_to_do_and_is_not_tried_again(
    proxy: FaultyProxy, store: S3, status: int, code: str, said: str
) -> None:
    proxy.always = answer(status, code, f"your key testing and {SECRET}")
    acts: list[Callable[[], object]] = [
        lambda: store.get("a"),
        lambda: store.put_if_absent("a", b""),
        lambda: store.list(""),
        lambda: list(store.read("a")),
    ]
    for act in acts:
        before = proxy.answered
        with pytest.raises(NotAllowed, match=said) as caught:
            act()
        assert str(caught.value).startswith("s3://")
        assert SECRET not in str(caught.value)
        assert 1 <= proxy.answered - before <= 3, "a region's redirect may be followed, a refusal is not repeated"
    for ask in (store.exists, store.size):
        with pytest.raises(NotAllowed):
            ask("a")


def test_a_redirect_that_leads_nowhere_is_not_allowed(proxy: FaultyProxy, bucket: str) -> None:
    proxy.always = answer(301, "PermanentRedirect")
    with pytest.raises(NotAllowed, match="redirects without saying where to. Set AWS_DEFAULT_REGION"):
        impatient(bucket).get("a")


# -- a network that breaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["reset", "end"])
def test_a_broken_download_goes_on_and_only_the_missing_bytes_travel(
    proxy: FaultyProxy, store: S3, tmp_path: Path, lines: list[str], ending: str
) -> None:
    data = big()
    store.put("a", data)
    proxy.ending, proxy.cut_after = ending, 1_000_000
    before = proxy.bytes_down
    download(store, "a", tmp_path / "a", len(data), patience=SHORT, say=lines.append)
    assert (tmp_path / "a").read_bytes() == data
    assert proxy.cuts >= 3, "the network did break"
    assert proxy.bytes_down - before < len(data) + (proxy.cuts + 1) * ((1 << 16) + 1000)
    assert len(lines) == 1, "one line, not one for each try"
    assert re.match(r"s3://.*/some/prefix/a: .*Check the server and the network.* Trying again for \d+ s\.", lines[0])


@pytest.mark.parametrize("ending", ["reset", "end"])
def test_a_body_that_ends_early_is_never_taken_for_the_whole(proxy: FaultyProxy, store: S3, ending: str) -> None:
    data = big(500_000)
    store.put("a", data)
    plain = impatient(f"{store.where()}")
    for after in (1, 300, 2000, 262_144, 499_999):
        proxy.calm()
        proxy.ending, proxy.cut_after = ending, after
        with pytest.raises(TryAgain):
            list(plain.read("a"))
        with pytest.raises(TryAgain):
            plain.get("a")
    proxy.cut_after, proxy.cuts_left = 300_000, 3
    assert store.get("a") == data, "with patience it comes whole"


def test_a_get_never_mixes_two_versions(server: S3Server, proxy: FaultyProxy, store: S3) -> None:
    old, new = big(900_000), bytes(900_000)
    store.put("a", old)
    proxy.cut_after, proxy.cuts_left = 600_000, 1

    def replace(line: str) -> None:
        bucket, _, prefix = store.where("a").removeprefix("s3://").partition("/")
        server.client().put_object(Bucket=bucket, Key=prefix, Body=new)

    store._say = replace  # called between the break and the next try
    assert store.get("a") == new
    assert proxy.cuts == 1


def test_random_resets_are_survived(server: S3Server, proxy: FaultyProxy, store: S3, tmp_path: Path) -> None:
    proxy.cut_every, proxy.cut_within = 3, 200
    for n in range(10):
        store.put(f"r/{n}", big(5000 + n))
    assert store.list("r") == [f"r/{n}" for n in range(10)]
    for n in range(10):
        assert store.exists(f"r/{n}")
        assert store.get(f"r/{n}") == big(5000 + n)
        download(store, f"r/{n}", tmp_path / str(n), 5000 + n, patience=SHORT, say=lambda line: None)
        assert (tmp_path / str(n)).read_bytes() == big(5000 + n)
    assert proxy.cuts > 5


def test_slow_down_is_obeyed_by_trying_later(proxy: FaultyProxy, store: S3, tmp_path: Path, lines: list[str]) -> None:
    acts: list[tuple[Callable[[], object], object]] = [
        (lambda: store.put("a", b"1"), None),
        (lambda: store.put_if_absent("b", b"2"), True),
        (lambda: store.get("a"), b"1"),
        (lambda: store.exists("a"), True),
        (lambda: store.size("a"), 1),
        (lambda: store.list(""), ["a", "b"]),
        (lambda: store.remove("a"), None),
        (store.sweep, None),
        (lambda: download(store, "b", tmp_path / "b", 1, patience=SHORT, say=lines.append), None),
    ]
    for act, expected in acts:
        proxy.answers = [answer(*SLOW_DOWN), answer(500, "InternalError"), answer(503, "ServiceUnavailable")]
        assert act() == expected
        assert proxy.answers == []
    assert proxy.answered == 3 * len(acts)
    proxy.always = answer(*SLOW_DOWN)
    with pytest.raises(TryAgain, match=r"answered SlowDown \(HTTP 503\)\. Check the server"):
        impatient(store.where()).get("b")


def test_a_server_that_says_nothing_does_not_hang_for_ever(proxy: FaultyProxy, store: S3) -> None:
    store.put("a", b"1")
    proxy.drop()
    proxy.silent = True
    quick = impatient(store.where())
    for act in (lambda: quick.get("a"), lambda: list(quick.read("a")), lambda: quick.put("a", b"2")):
        with pytest.raises(TryAgain, match=r"127\.0\.0\.1:\d+ fell silent\. Check the server"):
            act()
    assert proxy.silences == 3


def test_a_body_that_stops_in_the_middle_does_not_hang_for_ever(proxy: FaultyProxy, store: S3) -> None:
    store.put("a", big())
    proxy.ending, proxy.cut_after, proxy.cuts_left = "stall", 1_000_000, 1
    came = 0
    with pytest.raises(TryAgain, match=r"fell silent\. Check the server"):
        for block in impatient(store.where()).read("a"):
            came += len(block)
    assert proxy.cuts == 1
    assert 900_000 < came < 1_000_000, "what came before is kept"


def test_a_put_whose_answer_is_lost_is_still_the_winners(proxy: FaultyProxy, store: S3, tmp_path: Path) -> None:
    proxy.cut_after, proxy.cuts_left = 1, 1
    assert store.put_if_absent("lease", b"mine") is True, "the retry meets its own object"
    assert proxy.cuts == 1
    assert store.put_if_absent("lease", b"mine") is False, "the same bytes of another writer are not mine"


def test_an_upload_in_parts_survives_resets_and_lost_answers(
    server: S3Server, proxy: FaultyProxy, store: S3, tmp_path: Path
) -> None:
    data = big(3 * (1 << 24) + 17)
    (tmp_path / "file").write_bytes(data)
    proxy.cut_after, proxy.cuts_left = 1, 4
    store.put_file("big", tmp_path / "file")
    assert proxy.cuts == 4
    assert store.get("big") == data
    before = len(proxy.requests)
    proxy.answers = []
    lost = threading.Event()

    def lose_the_end(line: str) -> tuple[bytes | None, int | None]:
        begun = FaultyProxy._begin(proxy, line)
        if line.startswith("POST") and "uploadId=" in line and not lost.is_set():
            lost.set()
            return None, 1
        return begun

    proxy._begin = lose_the_end  # type: ignore[method-assign]
    store.put_file("big", tmp_path / "file")
    assert lost.is_set()
    assert store.get("big") == data
    assert len([line for line in proxy.requests[before:] if line.startswith("POST") and "uploadId=" in line]) == 2


def test_an_upload_in_parts_that_fails_leaves_nothing(
    server: S3Server, proxy: FaultyProxy, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes((1 << 24) + 1))
    store = impatient(bucket, read_seconds=5)
    proxy.answers = []

    def forbid_parts(line: str) -> tuple[bytes | None, int | None]:
        begun = FaultyProxy._begin(proxy, line)
        return (answer(*FORBIDDEN), None) if "partNumber=2" in line else begun

    proxy._begin = forbid_parts  # type: ignore[method-assign]
    with pytest.raises(NotAllowed, match="AccessDenied"):
        store.put_file("big", tmp_path / "file")
    assert not store.exists("big")
    assert server.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://")).get("Uploads", []) == []
    with pytest.raises(NotAllowed, match=r"gone: No such file or directory\. Nothing was written to s3://"):
        store.put_file("big", tmp_path / "gone")


def test_a_server_that_is_away_for_a_while_is_waited_for(proxy: FaultyProxy, store: S3, lines: list[str]) -> None:
    store.put("a", b"1")
    proxy.refuse()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.get, "a")
        while not lines:
            time.sleep(0.01)
        assert not reading.done()
        proxy.accept()
        assert reading.result(30) == b"1"
    assert re.search(r"127\.0\.0\.1:\d+ (cannot be reached|broke the transfer)", lines[0])


def test_patience_ends_with_what_was_tried_and_how_long(proxy: FaultyProxy, store: S3, lines: list[str]) -> None:
    proxy.refuse()
    short = S3(store.where(), patience=Patience(0.3, 0.01, 0.05), say=lines.append)
    with pytest.raises(
        TryAgain, match=r"cannot be reached\..* Given up on reading s3://.*/a after \d+ tries and \d+ s"
    ) as caught:
        short.get("a")
    assert SECRET not in str(caught.value)
    assert len(lines) == 1


def test_a_server_that_is_killed_and_filled_again_is_no_reason_to_start_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str]
) -> None:
    data = big()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a").write_bytes(data)

    with S3Server() as server, FaultyProxy(server.url) as proxy:
        for name, value in server.env(proxy.url).items():
            monkeypatch.setenv(name, value)

        def refill() -> None:
            server.fill(server.bucket("run"), tmp_path / "source")

        refill()
        proxy.latency = 0.01
        store = S3("s3://run", say=lines.append)
        with ThreadPoolExecutor(1) as pool:
            bringing = pool.submit(
                lambda: download(store, "a", tmp_path / "a", len(data), patience=SHORT, say=lines.append)
            )
            while not (tmp_path / "a").exists() or (tmp_path / "a").stat().st_size < 500_000:
                time.sleep(0.005)
            proxy.refuse()
            server.kill()
            there = (tmp_path / "a").stat().st_size
            assert there < len(data)
            server.restart(refill)
            down = proxy.bytes_down
            proxy.accept()
            bringing.result(60)
        assert (tmp_path / "a").read_bytes() == data
        assert proxy.bytes_down - down < len(data) - there + (1 << 16), "what lay there did not travel again"


# -- patience ---------------------------------------------------------------------------------------------------


def test_patience_tries_again_what_may_pass_and_nothing_else() -> None:
    left = [TryAgain("busy."), TryAgain("busy."), NotThere("gone")]

    def work() -> None:
        raise left.pop(0)

    with pytest.raises(NotThere):
        patiently(work, "the work", SHORT, lambda line: None)
    assert left == []


def test_patience_begins_afresh_when_bytes_arrive(tmp_path: Path) -> None:
    class Drip(Folder):
        def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
            time.sleep(0.05)
            yield b"x"
            raise TryAgain("broken.")

    download(Drip(tmp_path), "a", tmp_path / "a", 12, patience=Patience(0.3, 0.01, 0.02), say=lambda line: None)
    assert (tmp_path / "a").read_bytes() == b"x" * 12, "in all it took longer than patience"


def test_pauses_leave_the_global_chance_alone() -> None:
    left = [TryAgain("busy.")] * 3

    def work() -> None:
        if left:
            raise left.pop()

    random.seed(7)
    before = random.getstate()
    patiently(work, "the work", SHORT, lambda line: None)
    assert random.getstate() == before


def test_a_client_belongs_to_one_process(proxy: FaultyProxy, store: S3) -> None:
    store.put("a", b"1")
    assert list(store._clients) == [os.getpid()]
    assert pickle.loads(pickle.dumps(store))._clients == {}
    assert SECRET.encode() not in pickle.dumps(store)
