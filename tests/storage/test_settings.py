"""Faults of settings are told at once, with the setting; waiting is for what can pass."""

import http.server
import threading
from collections.abc import Iterator

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
    assert "does not speak TLS on this port. Write http:// in the endpoint" in refusal(f"https://{page}")


def test_a_web_page_is_not_taken_for_a_missing_right(page: str) -> None:
    text = refusal(f"http://{page}")
    assert "with a web page, as a proxy" in text and "NO_PROXY" in text and "s3:GetObject" not in text


def test_a_proxy_for_a_local_server_is_named(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert "through a proxy that is not there. Add 127.0.0.1 to NO_PROXY" in refusal(f"http://{page}")


def test_a_region_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-9")
    assert "is there a region 'us-east-9'?" in refusal(None)
