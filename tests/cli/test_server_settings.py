"""Faults of the settings of servers, through the command line: told at once, with setting, value and remedy.

The time for which an unavailable server is asked again (15 minutes) is for what can pass.
"""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.services.s3_server import S3Server
from tests.storage.test_settings import Page

SECRET = "swordfish"
NO_XML = b"<Error><Code>%b</Code><Message>x</Message></Error>"


class Old(Page):
    """An empty bucket on a server that does not know conditional writes."""

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            self.answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        else:
            self.answer(404, NO_XML % b"NoSuchKey")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("If-None-Match"):
            self.answer(501, NO_XML % b"NotImplemented")
        else:
            self.answer(200, b"")


class Dates(Page):
    """Passes everything on to an S3 server, and answers with other `Date` headers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    upstream = 0
    dates: tuple[str, ...] = ()

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response_only(answer.status)
        size = {"Content-Length": answer.headers.get("Content-Length", str(len(data)))}
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in REPLACED}
        for name, value in [*(kept | size).items(), *(("Date", date) for date in self.dates)]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = pass_on


REPLACED = ("date", "connection", "transfer-encoding", "content-length")


@contextmanager
def serving(handler: Callable[..., Any]) -> Iterator[str]:
    """'host:port' of a small server on the loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(lab: Any) -> Iterator[S3Server]:
    with S3Server() as running:
        running.bucket("runs")
        running.fill("s3://runs/shards", lab.shards)
        for file in lab.shards.iterdir():  # they are read through plain HTTP, too
            running.client().put_object_acl(Bucket="runs", Key=f"shards/{file.name}", ACL="public-read")
        yield running


@pytest.fixture(scope="module")
def small() -> Iterator[dict[str, str]]:
    """Addresses of the servers that are none: a proxy's page, and a bucket without conditional writes."""
    with ExitStack() as stack:
        yield {handler.__name__: stack.enter_context(serving(handler)) for handler in (Page, Old)}


def proxies(address: str) -> dict[str, str]:
    names = {name: f"http://me:{SECRET}@{address}" for name in ("HTTP_PROXY", "http_proxy")}
    return names | {"NO_PROXY": "", "no_proxy": ""}


Env = Callable[[S3Server, Mapping[str, str]], dict[str, str]]
FAULTS: dict[str, tuple[Env, tuple[str, ...]]] = {
    "https on a port of http": (
        lambda server, small: {"AWS_ENDPOINT_URL_S3": f"https://127.0.0.1:{server.port}"},
        ("127.0.0.1:", "does not speak TLS on this port", "Write http://", "AWS_ENDPOINT_URL_S3"),
    ),
    "a key with a line end": (
        lambda server, small: {"AWS_ACCESS_KEY_ID": f"{SECRET}\n"},
        ("AWS_ACCESS_KEY_ID: found a line end", "10 characters", "Set it again without"),
    ),
    "a key with white space": (
        lambda server, small: {"AWS_SECRET_ACCESS_KEY": f"{SECRET} {SECRET}"},
        ("AWS_SECRET_ACCESS_KEY: found white space", "Set it again without"),
    ),
    "a proxy for a local server": (
        lambda server, small: proxies("127.0.0.1:9"),
        ("through the proxy 127.0.0.1:9 (HTTP_PROXY", "Add 127.0.0.1 to NO_PROXY"),
    ),
    "the page of a proxy": (
        lambda server, small: proxies(small["Page"]),
        ("with a web page, as a proxy", "NO_PROXY"),
    ),
    "another kind of server": (
        lambda server, small: {"AWS_ENDPOINT_URL_S3": f"http://{small['Page']}"},
        ("with a web page, as a proxy or another kind of server", "Correct the endpoint", "AWS_ENDPOINT_URL_S3"),
    ),
    "a region that is none": (
        lambda server, small: {"AWS_ENDPOINT_URL_S3": "", "AWS_DEFAULT_REGION": "us-east-9"},
        ("is there a region 'us-east-9'?", "Set AWS_DEFAULT_REGION"),
    ),
    "a region that is no name": (
        lambda server, small: {"AWS_DEFAULT_REGION": "us east 1"},
        ("found 'us east 1', which is no name of a region", "Correct AWS_DEFAULT_REGION"),
    ),
    "a profile that is none": (
        lambda server, small: {"AWS_PROFILE": "nosuch"},
        ("there is no profile 'nosuch'", "Correct AWS_PROFILE"),
    ),
}


def refused(ended: Any, *texts: str) -> None:
    """It ended as a user's mistake, with one line that has these texts, without asking a server again."""
    assert ended.codes == (2,) and "Traceback" not in ended.err, ended.said()
    assert len(ended.err.splitlines()) == 1 and "Trying again" not in ended.err, ended.said()
    assert all(text in ended.err for text in texts) and SECRET not in ended.err + ended.out, ended.said()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_settings_is_told_at_once(
    lab: Any, server: S3Server, small: dict[str, str], fault: str, tmp_path: Path
) -> None:
    change, texts = FAULTS[fault]
    env = server.env() | change(server, small)
    recipe = str(lab.folder / "recipe.yaml")
    for command in (
        ["tickets", "list", "s3://runs/run"],
        ["shards", "check", "s3://runs/shards"],
        ["shards", "build", recipe, "--out", "s3://runs/new", "--workers", "1"],
        lab.train(tmp_path, {"run.folder": "s3://runs/run"}),
        [*lab.train(tmp_path, {"data.shards": "s3://runs/shards"}), "--launch", "auto"],
    ):
        refused(lab.start(*command, cwd=tmp_path, env=env).wait(60), *texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["https on a port of http", "a profile that is none"])
def test_the_doctor_names_a_fault_of_settings(
    lab: Any, server: S3Server, small: dict[str, str], fault: str, tmp_path: Path
) -> None:
    change, texts = FAULTS[fault]
    command = ["doctor", *lab.train(tmp_path, {"run.folder": "s3://runs/run"})[1:], "--launch", "auto"]
    ended = lab.start(*command, cwd=tmp_path, env=server.env() | change(server, small)).wait(60)
    (line,) = (line for line in ended.out.splitlines() if line.startswith("FAULT"))
    assert ended.codes == (1,) and all(text in line for text in texts) and ended.err == "", ended.said()


def test_a_server_without_conditional_writes_is_named(
    lab: Any, server: S3Server, small: dict[str, str], tmp_path: Path
) -> None:
    env = server.env(f"http://{small['Old']}")
    recipe = str(lab.folder / "recipe.yaml")
    for command in (
        ["shards", "build", recipe, "--out", "s3://runs/new", "--workers", "1"],
        lab.train(tmp_path, {"run.folder": "s3://runs/run"}),
    ):
        ended = lab.start(*command, cwd=tmp_path, env=env).wait(60)
        refused(ended, "s3://runs/", "NotImplemented (HTTP 501)", "Conditional writes (If-None-Match)", "MinIO")


@pytest.mark.parametrize(
    "scheme, proxied, texts",
    [
        ("https", "", ("does not speak TLS on this port. Write http://",)),
        ("http", "127.0.0.1:9", ("through the proxy 127.0.0.1:9 (HTTP_PROXY), which does not answer", "NO_PROXY")),
        ("http", "Page", ("HTTP 403", "through the proxy 127.0.0.1:", "(HTTP_PROXY)", "NO_PROXY")),
    ],
)
def test_a_fault_of_settings_for_shards_on_the_web_is_told_at_once(
    lab: Any, small: dict[str, str], scheme: str, proxied: str, texts: tuple[str, ...], tmp_path: Path
) -> None:
    env = proxies(small.get(proxied, proxied)) if proxied else {}
    with serving(partial(Quiet, directory=lab.shards)) as web:
        url = f"{scheme}://{web}"
        for command in (["shards", "check", url], lab.train(tmp_path, {"data.shards": url})):
            refused(lab.start(*command, cwd=tmp_path, env=env).wait(60), url, *texts)
    assert not (tmp_path / "run").exists()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own web server, silent."""

    def log_message(self, format: str, *words: object) -> None:
        pass


TODAY = formatdate(usegmt=True)


@pytest.mark.parametrize(
    "dates", [(TODAY, TODAY), ("yesterday",), ("Thu, 99 Foo 2026 99:99:99 GMT", TODAY)], ids=["two", "none", "odd"]
)
def test_odd_dates_of_a_server_are_no_fault(lab: Any, server: S3Server, dates: tuple[str, ...], tmp_path: Path) -> None:
    with serving(type("Odd", (Dates,), {"upstream": server.port, "dates": dates})) as odd:
        sets = {"run.folder": f"s3://runs/{tmp_path.name}", "data.shards": f"http://{odd}/runs/shards"}
        arguments = lab.train(tmp_path, sets | {"prune.rounds": 0})
        for command in (["doctor", *arguments[1:], "--launch", "auto"], arguments):
            ended = lab.start(*command, cwd=tmp_path, env=server.env(f"http://{odd}")).wait(120).ok()
            assert ended.err == "", ended.said()
