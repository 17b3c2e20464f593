"""Faults of settings are told at once, with the setting; waiting is for what can pass."""

import errno
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirl_dist.storage import Rejected, open_store
from mirl_dist.storage.base import Options

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secretsecret", "AWS_DEFAULT_REGION": "us-east-1"}


class Page(http.server.BaseHTTPRequestHandler):
    """Answers everything with the web page of a proxy."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(b"<html>Forbidden by policy</html>")

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def refusal(endpoint: str | None) -> str:
    with pytest.raises(Rejected) as refused:
        open_store("s3://bucket/run", Options(endpoint=endpoint, patience_seconds=60)).get("run.json")
    return str(refused.value)


@pytest.mark.parametrize("value", ["secretsecret\n", "secret secret", "secretsecr\u00e9t", "\tsecretsecret"])
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_keys_that_no_header_can_carry_are_refused_unseen(
    name: str, value: str, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    text = refusal(f"http://{page}")
    assert text.startswith(f"{name}: found ") and "secret" not in text.removeprefix(name)


def test_https_on_a_port_of_http_is_refused(page: str) -> None:
    text = refusal(f"https://{page}")
    assert "does not speak TLS on this port. Write http:// in the endpoint (store.endpoint or AWS_ENDPOINT" in text


def test_a_web_page_is_not_taken_for_a_missing_right(page: str) -> None:
    text = refusal(f"http://{page}")
    assert "with a web page, as a proxy" in text and "NO_PROXY" in text and "s3:GetObject" not in text


def test_a_proxy_for_a_local_server_is_named(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    text = refusal(f"http://{page}")
    assert "through the proxy 127.0.0.1:9 (HTTP_PROXY or HTTPS_PROXY), which is not there. Add 127.0.0.1 to" in text


def test_a_region_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-9")
    assert "is there a region 'us-east-9'?" in refusal(None)


def test_a_profile_that_is_none_is_named(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    assert "there is no profile 'nosuch'" in refusal(f"http://{page}")


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(Rejected, match="this file system has no hard links .* Choose a folder on another file system"):
        open_store(str(tmp_path)).put_if_absent("lease/1.json", b"mine")
    assert not list(tmp_path.rglob("*.json*"))


class Old(Page):
    """A server that does not know conditional writes."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(501 if self.headers.get("If-None-Match") else 200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", "63")
        self.end_headers()
        self.wfile.write(b"<Error><Code>NotImplemented</Code><Message>x</Message></Error>\n")


def test_a_server_without_conditional_writes_is_named() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store = open_store("s3://bucket/run", Options(endpoint=f"http://127.0.0.1:{server.server_address[1]}"))
    with pytest.raises(Rejected, match="Conditional writes .If-None-Match., by which one"):
        store.put_if_absent("lease/1.json", b"mine")
    server.shutdown()
    server.server_close()
