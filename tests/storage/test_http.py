"""Laws of a web address: read only, to the last byte, from whatever server."""

from __future__ import annotations

import http.server
import pickle
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from mirl_dist.storage import NotFound, Rejected, Unavailable, open_store
from mirl_dist.storage.http import HttpStore, parse_date
from mirl_dist.storage.retry import Patience, download
from tests.services.faulty_proxy import FORBIDDEN, SLOW_DOWN, FaultyProxy, answer

SECRET = "swordfish"
SHORT = Patience(seconds=20, first=0.01, most=0.1)
ONCE = Patience(0)


class Plain(http.server.SimpleHTTPRequestHandler):
    """Python's own server: it ignores Range."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Ranges(Plain):
    """Answers `Range: bytes=N-`, redirects, and bodies in chunks or of no stated length."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        way, _, name = unquote(self.path.partition("?")[0]).lstrip("/").partition("/")
        places = {"moved": f"/plain/{name}", "astray": f"file://{Path(self.directory) / 'a'}"}
        if way in places:
            self.send_response(302)
            self.send_header("Location", f"{places[way]}?signature={SECRET}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = Path(self.directory) / name
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        if asked and begin >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if asked and way != "chunked" else 200)
        if asked and way != "chunked":
            self.send_header("Content-Range", f"bytes {begin + (way == 'liar')}-{len(data) - 1}/{len(data)}")
            data = data[begin:]
        if way == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            data = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (data[:10], data[10:]) if p) + b"0\r\n\r\n"
        elif way == "endless":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET


DATA = random.Random(1).randbytes(1_500_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("web")
    (made / "a").write_bytes(DATA)
    (made / "empty").write_bytes(b"")
    (made / "with space").mkdir()
    (made / "with space/50% + ü#?.tar").write_bytes(b"odd")
    return made


@pytest.fixture(scope="module", params=[Plain, Ranges], ids=["without ranges", "with ranges"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    def handler(*arguments: object) -> http.server.BaseHTTPRequestHandler:
        made: http.server.BaseHTTPRequestHandler = request.param(*arguments, directory=str(folder))
        return made

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that hangs up is what is tested here."""

    with Quiet(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def proxy(server: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(server) as between:
        yield between


def way(proxy: FaultyProxy, server_id: str, name: str = "plain") -> str:
    """The folder's address: the server with ranges has several ways to give it."""
    return f"{proxy.url}/{name}" if server_id.startswith("with ranges") else proxy.url


@pytest.fixture
def url(proxy: FaultyProxy, request: pytest.FixtureRequest) -> str:
    return way(proxy, request.node.callspec.id)


def impatient(url: str, seconds: float = 10) -> HttpStore:
    """It tries once. seconds: how long it waits for a server that is silent; a busy machine's is late."""
    return HttpStore(url, patience=ONCE, say=pytest.fail, seconds=seconds)


only_with_ranges = pytest.mark.parametrize("server", [Ranges], indirect=True, ids=["with ranges"])


def test_what_lies_there_is_read_from_anywhere(url: str) -> None:
    store = HttpStore(f"{url}/", say=pytest.fail)
    assert store.get("a") == DATA
    assert store.get("empty") == b""
    assert store.get("with space/50% + ü#?.tar") == b"odd"
    assert store.size("a") == len(DATA)
    assert store.exists("a")
    assert not store.exists("b")
    for offset in (0, 1, 262_144, len(DATA) - 1, len(DATA), len(DATA) + 1):
        assert b"".join(store.read("a", offset)) == DATA[offset:]
    for act in (store.get, store.size, lambda name: list(store.read(name))):
        with pytest.raises(NotFound, match=rf"^{re.escape(url)}/b does not exist$"):
            act("b")


def test_it_can_only_be_read(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    acts: list[Callable[[], object]] = [
        lambda: store.put("a", b""),
        lambda: store.put_if_absent("a", b""),
        lambda: store.put_file("a", tmp_path),
        lambda: store.list(""),
        lambda: store.remove("a"),
        store.sweep,
    ]
    for act in acts:
        with pytest.raises(Rejected, match=r"^http://.*: a web address can only be read\. Give a folder or s3://"):
            act()


@pytest.mark.parametrize("ending", ["reset", "end"])
def test_a_broken_download_goes_on(
    proxy: FaultyProxy, url: str, tmp_path: Path, ending: str, request: pytest.FixtureRequest
) -> None:
    ranges = "with ranges" in request.node.callspec.id
    lines: list[str] = []
    proxy.ending, proxy.cut_after, proxy.cuts_left = ending, 600_000, None if ranges else 1
    store = HttpStore(url, say=pytest.fail, seconds=5)
    download(store, "a", tmp_path / "a", len(DATA), patience=SHORT, say=lines.append)
    assert (tmp_path / "a").read_bytes() == DATA
    assert proxy.cuts >= 1
    assert len(lines) == 1
    if ranges:
        assert proxy.cuts >= 2
        assert proxy.bytes_down < len(DATA) + (proxy.cuts + 1) * ((1 << 16) + 1000), "only missing bytes travel"
    else:
        assert proxy.bytes_down > len(DATA) + 500_000, "this server sends all again, and what lies there is skipped"


@pytest.mark.parametrize("ending", ["reset", "end"])
def test_a_body_that_ends_early_is_never_taken_for_the_whole(proxy: FaultyProxy, url: str, ending: str) -> None:
    for after in (1, 100, 2000, 262_144, len(DATA) - 1):
        proxy.ending, proxy.cut_after = ending, after
        for act in (impatient(url).get, lambda name: list(impatient(url).read(name, 7))):
            with pytest.raises(Unavailable, match=r"/a: the (transfer|body|server) .*"):
                act("a")
    proxy.cuts_left = 3
    assert HttpStore(url, patience=SHORT, say=lambda line: None).get("a") == DATA, "with patience it comes whole"


def test_what_may_pass_is_tried_again_and_a_refusal_is_not(proxy: FaultyProxy, url: str) -> None:
    store = HttpStore(url, patience=SHORT, say=lambda line: None)
    for act in (store.get, store.size, store.exists):
        proxy.answers = [answer(*SLOW_DOWN), answer(429, "TooMany")]
        assert act("a")
        assert proxy.answers == []
    for status, said in ((403, "readable for everyone"), (401, "readable for everyone"), (400, "Correct the address")):
        proxy.always = answer(status, FORBIDDEN[1], SECRET)
        before = proxy.answered
        for refused in (store.get, store.size, store.exists, lambda name: list(store.read(name, 5))):
            with pytest.raises(Rejected, match=rf"answered HTTP {status}\. .*{said}") as caught:
                refused("a")
            assert SECRET not in str(caught.value)
        assert proxy.answered - before == 4


def test_a_server_that_is_away_or_silent_does_not_hang_for_ever(proxy: FaultyProxy, url: str) -> None:
    proxy.silent = True
    quick = impatient(url, 0.5)
    for act in (quick.get, quick.exists, lambda name: list(quick.read(name))):
        with pytest.raises(Unavailable, match=r"the transfer broke .*Check the server and the network"):
            act("a")
    assert proxy.silences == 3
    proxy.calm()
    proxy.refuse()
    with pytest.raises(Unavailable, match=r"the transfer broke \(Connection refused\)"):
        impatient(url).get("a")
    with pytest.raises(Unavailable, match=r"Given up on http://.* tries and \d+ s without progress"):
        HttpStore(url, patience=Patience(0.2, 0.01, 0.05), say=lambda line: None).get("a")


@only_with_ranges
def test_redirects_are_followed_and_never_shown(proxy: FaultyProxy, tmp_path: Path) -> None:
    store = impatient(f"{proxy.url}/moved")
    assert store.get("a") == DATA
    assert store.size("a") == len(DATA)
    assert b"".join(store.read("a", 1_000_000)) == DATA[1_000_000:]
    with pytest.raises(NotFound) as gone:
        store.get("b")
    assert str(gone.value) == f"{proxy.url}/moved/b does not exist"
    with pytest.raises(Rejected, match="HTTP 302") as caught:
        impatient(f"{proxy.url}/astray").get("a")
    assert SECRET not in str(caught.value), "and this machine's files are not read"


@only_with_ranges
def test_bodies_in_chunks_are_whole_or_refused(proxy: FaultyProxy) -> None:
    store = impatient(f"{proxy.url}/chunked")
    assert store.get("a") == DATA
    assert b"".join(store.read("a", 1_000_000)) == DATA[1_000_000:]
    proxy.ending, proxy.cut_after = "end", 900_000
    with pytest.raises(Unavailable):
        store.get("a")


@only_with_ranges
def test_a_length_that_nobody_tells_and_a_range_that_nobody_asked_for_are_refused(proxy: FaultyProxy) -> None:
    with pytest.raises(Unavailable, match="does not say how long it is, or was cut off"):
        impatient(f"{proxy.url}/endless").get("a")
    with pytest.raises(Unavailable, match="sends another range, or was cut off"):
        list(impatient(f"{proxy.url}/liar").read("a", 5))


@pytest.mark.parametrize(
    "address",
    [
        f"http://user:{SECRET}@host/shards",
        f"https://{SECRET}@host/shards",
        f"https://host/shards?X-Amz-Signature={SECRET}",
        "https://host/shards?",
        f"https://host/shards#{SECRET}",
        f"http:///{SECRET}",
        f"http://host:port/{SECRET}",
        f"http://ho st/{SECRET}",
    ],
)
def test_addresses_with_keys_or_queries_are_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(Rejected, match=r"^A web address is http\(s\)://host/folder, without user") as caught:
        open_store(address)
    assert SECRET not in str(caught.value)


def test_a_web_store_travels_to_other_processes() -> None:
    copy = pickle.loads(pickle.dumps(HttpStore("http://127.0.0.1:1/x/")))
    assert copy.where("a") == "http://127.0.0.1:1/x/a"


@pytest.mark.parametrize(
    "header, hour",
    [
        ("Tue, 01 Dec 2026 07:00:00 GMT", 7),
        ("Tue, 01 Dec 2026 07:00:00 -0000", 7),
        ("Tue, 01 Dec 2026 07:00:00 GMT, Tue, 01 Dec 2026 08:00:00 GMT", 7),
        ("1 Foo 2026", None),
        ("", None),
        (None, None),
    ],
)
def test_odd_dates_of_a_server_are_none(header: str | None, hour: int | None) -> None:
    date = parse_date(header)
    assert (date and date.hour) == hour and (date is None or date.tzinfo is not None)
