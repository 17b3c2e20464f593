"""A read-only store for `http://` and `https://` addresses: a folder on a web server."""

from __future__ import annotations

import functools
import http.client
import re
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from mirl_dist.storage.base import NotFound, Rejected, StorageError, Unavailable
from mirl_dist.storage.retry import DEFAULT_PATIENCE, Patience, Say, to_stderr, with_retries

T = TypeVar("T")


def parse_date(header: str | None) -> datetime | None:
    """Return the time of a `Date` header, in UTC; None without one, or for anything but one date."""
    try:
        date = parsedate_to_datetime(header or "")
        return date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


_BLOCK = 1 << 16  # upper bound of the bytes lost with a broken connection
_CHECK_SERVER = "Check the server and the network."
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_REFUSALS = (401, 403, 407)
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)


class HttpStore:
    """A read-only store under `http(s)://host/folder`.

    Transient failures are retried within `patience`, except by `read`, whose caller must retry. seconds: timeout of
    connecting, and between two packets. Redirects are followed, but not from https to http.
    """

    def __init__(
        self, url: str, *, patience: Patience = DEFAULT_PATIENCE, say: Say = to_stderr, seconds: float = 30.0
    ) -> None:
        self._root = _normalized_url(url)
        self._patience, self._say, self._seconds = patience, say, seconds

    def where(self, name: str = "") -> str:
        return f"{self._root}/{name}" if name else self._root

    def get(self, name: str) -> bytes:
        return self._retry(name, lambda: b"".join(self.read(name)))

    def size(self, name: str) -> int:
        return self._retry(name, lambda: self._parse_length(name, self._head(name)))

    def exists(self, name: str) -> bool:
        try:
            self._retry(name, lambda: self._head(name))
        except NotFound:
            return False
        return True

    def now(self, name: str = "") -> datetime | None:
        """Return the server's `Date` header, whatever the status of `name`; None without one. Does not retry."""
        asked = urllib.request.Request(self.where(quote(name)), method="HEAD")
        with self._map_errors(name):
            try:
                answer = _opener().open(asked, timeout=self._seconds)
            except HTTPError as error:
                answer = error
            with answer:
                date = answer.headers.get("Date")
        return parse_date(date)

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `offset` to the end in blocks. Raise Unavailable at once if the transfer breaks."""
        with self._request(name, "GET", offset) as answer:
            if answer.status == 416:  # `offset` is at or past the end
                return
            skip = offset
            if answer.status == 206:
                if not re.match(rf"bytes {offset}-", answer.headers.get("Content-Range", "")):
                    raise Unavailable(
                        f"{self.where(name)}: the server sends another range, or was cut off. {_CHECK_SERVER}"
                    )
                skip = 0
            for block in self._read_body(name, answer):
                if skip < len(block):
                    yield block[skip:]
                skip = max(0, skip - len(block))

    def _reject(self, *_: Any, **__: Any) -> NoReturn:
        raise Rejected(f"{self.where()}: a web address can only be read. Give a folder or s3:// to write or to list.")

    put = put_file = put_if_absent = list = remove = sweep = _reject

    # -- requests -----------------------------------------------------------------------------------------------

    def _retry(self, name: str, work: Callable[[], T]) -> T:
        return with_retries(work, self.where(name), self._patience, self._say)

    def _head(self, name: str) -> Message:
        with self._request(name, "HEAD") as answer:
            return answer.headers

    @contextmanager
    def _request(self, name: str, method: str, offset: int = 0) -> Iterator[http.client.HTTPResponse]:
        """Yield the open response, which may have status 416 (`offset` is at or past the end)."""
        asked = urllib.request.Request(self._root + "/" + quote(name), method=method)
        asked.add_header("Accept-Encoding", "identity")  # offsets in a compressed body would differ
        if offset:
            asked.add_header("Range", f"bytes={offset}-")
        with self._map_errors(name):
            try:
                opened = _opener().open(asked, timeout=self._seconds)
            except HTTPError as error:
                if error.code != 416 or not offset:
                    error.close()
                    raise
                opened = error
            with opened:
                yield opened

    def _read_body(self, name: str, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield a body in blocks. Raise Unavailable if it ends before the announced length."""
        if "chunked" in answer.headers.get("Transfer-Encoding", "").lower():
            while block := answer.read(_BLOCK):  # http.client itself detects a missing chunk
                yield block
            return
        wanted = self._parse_length(name, answer.headers)
        while block := answer.read(_BLOCK):
            wanted -= len(block)
            yield block
        if wanted:
            raise Unavailable(f"{self.where(name)}: the body ended {wanted} bytes early. {_CHECK_SERVER}")

    def _parse_length(self, name: str, headers: Message) -> int:
        header = headers.get("Content-Length")
        if header is None or not header.isascii() or not header.isdigit():
            raise Unavailable(
                f"{self.where(name)}: the server does not say how long it is, or was cut off. {_CHECK_SERVER}"
            )
        return int(header)

    @contextmanager
    def _map_errors(self, name: str) -> Iterator[None]:
        """Convert errors to StorageError. Messages omit the target of a redirect, which may contain credentials."""
        try:
            yield
        except StorageError:
            raise
        except HTTPError as error:
            proxy = _proxy_of(self._root) if error.code in _REFUSALS else None
            raise _error_of_status(self.where(name), error.code, proxy) from None
        except (URLError, OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                text = f"{self.where(name)}: the server's certificate is not trusted. Set SSL_CERT_FILE, or correct it."
                raise Rejected(text) from None
            if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                text = f"{self.where(name)}: the server does not speak TLS on this port. Write http://, or its port."
                raise Rejected(text) from None
            if isinstance(error, URLError):  # else the answer had begun
                _check_proxy(self._root, self.where(name), str(cause))
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else type(cause).__name__
            raise Unavailable(f"{self.where(name)}: the transfer broke ({reason}). {_CHECK_SERVER}") from None


def _proxy_of(url: str) -> str | None:
    """Return 'host:port (VARIABLE)' of the proxy for an address; None if it is asked directly."""
    parts = urlsplit(url)
    proxy = urlsplit(urllib.request.getproxies().get(parts.scheme, ""))
    if not proxy.hostname or urllib.request.proxy_bypass(parts.netloc):
        return None
    return f"{proxy.hostname}:{proxy.port} ({parts.scheme.upper()}_PROXY)"


def _check_proxy(root: str, location: str, failure: str) -> None:
    """Raise Rejected if a connection failed because a proxy refuses it, or stands before a server of this machine."""
    proxy, host = _proxy_of(root), urlsplit(root).hostname
    if proxy is None:
        return
    refused = re.search(r"Tunnel connection failed: (4\d\d|501)\b", failure)
    if refused or host in _LOOPBACK:
        why = f"refuses that (HTTP {refused[1]})" if refused else "does not answer"
        raise Rejected(f"{location} is asked for through the proxy {proxy}, which {why}. Add {host} to NO_PROXY.")


def _error_of_status(location: str, status: int, proxy: str | None) -> StorageError:
    """Return the StorageError for an HTTP status. proxy: which may have answered instead of the server."""
    if status in (404, 410):
        return NotFound(f"{location} does not exist")
    text = f"{location}: the server answered HTTP {status}."
    if status in _TRANSIENT_STATUSES:
        return Unavailable(f"{text} {_CHECK_SERVER}")
    if status in _REFUSALS and proxy is not None:
        return Rejected(f"{text} It is asked for through the proxy {proxy}: add the host to NO_PROXY, or use s3://.")
    if status in _REFUSALS:
        return Rejected(f"{text} It must be readable for everyone; else use s3:// or a folder.")
    return Rejected(f"{text} Correct the address, or use s3:// or a folder.")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Handler that refuses redirects to schemes other than http(s), and from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        kind = urlsplit(newurl).scheme
        if kind not in ("http", "https") or (req.type == "https" and kind == "http"):
            raise HTTPError(req.full_url, code, "refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for HTTP and HTTPS only, so that a redirect cannot read local files."""
    opener = urllib.request.OpenerDirector()
    for kind in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        _Redirects,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(kind())
    return opener


def _normalized_url(url: str) -> str:
    """Strip trailing slashes and quote. Raise Rejected, not quoting the address, if it has credentials or a query."""
    try:
        parts = urlsplit(url)
        plain = parts.hostname and parts.username is None and not parts.query and not parts.fragment
        parts.port  # noqa: B018 - raises ValueError for an invalid port
    except ValueError:
        plain = False
    if not plain or "?" in url or "#" in url or any(c.isspace() or not c.isprintable() for c in url):
        raise Rejected(
            "A web address is http(s)://host/folder, without user, password, '?' or '#'; this one is not. What needs "
            "keys can be read through s3://."
        )
    return quote(url.rstrip("/"), safe="/:%[]@!$&'()*+,;=~")
