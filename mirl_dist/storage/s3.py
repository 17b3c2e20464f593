"""A store in a bucket, through boto3: AWS S3, and servers that speak its language (Ceph, MinIO).

Credentials come from boto3's own chain (AWS_ACCESS_KEY_ID, a profile, a role), and so does the endpoint where the
options name none (AWS_ENDPOINT_URL_S3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mirl_dist.storage import base, s3_multipart
from mirl_dist.storage import s3_errors as wire
from mirl_dist.storage.base import NotFound, Options, Rejected, StorageError, Unavailable
from mirl_dist.storage.retry import Patience, RetryState, Say, to_stderr
from mirl_dist.storage.s3_client import S3Client
from mirl_dist.storage.s3_errors import CHECK_SERVER, AccessDenied, AlreadyExists, RangePastEnd, map_errors

_BLOCK = 1 << 16  # what a broken connection loses at most


class S3Store:
    """A store under `s3://bucket/prefix`, for several threads; each process makes its own connections.

    A request that fails in passing is made again for as long as patience lasts (`patience`: instead of the options');
    `read` alone leaves that to its reader. Timeouts in seconds: to connect, and between two packets.
    """

    def __init__(
        self,
        url: str,
        options: Options = base.DEFAULT_OPTIONS,
        *,
        patience: Patience | None = None,
        say: Say = to_stderr,
        connect_seconds: float = 10.0,
        read_seconds: float = 30.0,
    ) -> None:
        connect = partial(_connect, options.endpoint, connect_seconds, read_seconds)
        self._client = S3Client(*wire.parse_address(url), connect, patience or Patience(options.patience_seconds), say)
        self._write_rights, self._encryption = wire.encryption_arguments(options)

    def where(self, name: str = "") -> str:
        """The place for people and messages."""
        return self._client.where(name)

    def put(self, name: str, data: bytes) -> None:
        """Write `name`, in parts where it is long, complete or not at all; replaces what was there."""
        if len(data) <= s3_multipart.PART_BYTES:
            self._client.send("put_object", name, self._write_rights, data, self._encryption)
        else:
            whole = memoryview(data)
            self._put_parts(name, len(data), lambda begin, end: whole[begin:end])

    def put_file(self, name: str, path: Path) -> None:
        """Copy a file to `name`, in parts where it is long, complete or not at all; replaces what was there."""
        try:
            size = path.stat().st_size
            if size <= s3_multipart.PART_BYTES:
                self.put(name, path.read_bytes())
            else:
                self._put_parts(name, size, partial(self._read_slice, name, path, size))
        except OSError as error:
            text = f"{path}: {error.strerror or error}. Nothing was written to {self.where(name)}; send it again."
            raise Rejected(text) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; whether this call wrote it. Of several writers exactly one wins.

        In one part, whatever its length: Ceph ignores the condition on others.
        """
        marked = {**self._encryption, **wire.writer_metadata()}
        try:
            self._client.send("put_object", name, self._write_rights, data, {**marked, "IfNoneMatch": "*"})
        except AlreadyExists:
            written = s3_multipart.find_own_write(self._client, name, marked)
            if written is None:
                return False
            if not wire.is_same_content(
                written, wire.body_arguments(data)
            ):  # it was damaged on its way, and is this call's
                self._client.send("put_object", name, self._write_rights, data, marked)
        return True

    def get(self, name: str) -> bytes:
        """The whole of `name`; a transfer that broke goes on, unless another version lies there by then."""
        tries = RetryState(f"reading {self.where(name)}", self._client.patience, self._client.say)
        content, version = bytearray(), ""
        while True:
            try:
                tag, blocks = self._open_body(name, len(content))
                if tag != version:
                    if content:
                        tag, blocks = self._open_body(name, 0)
                    content, version = bytearray(), tag
                for block in blocks:
                    content += block
                    tries.progressed()
                return bytes(content)
            except Unavailable as error:
                tries.pause_or_give_up(error)

    def size(self, name: str) -> int:
        """Bytes."""
        return self._content_length(name, self._client.head(name))

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """The bytes from `offset` to the end, in blocks. Raises Unavailable wherever the transfer breaks, at once."""
        yield from self._open_body(name, offset)[1]

    def exists(self, name: str) -> bool:
        try:
            self._client.head(name)
        except NotFound:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        """Complete names below `prefix` (a folder name, or '' for all), sorted."""
        below = self._client.key(prefix).rstrip("/")
        below = f"{below}/" if below else ""
        cut = len(self._client.key(""))
        following = {"ContinuationToken": "NextContinuationToken"}
        pages = self._client.pages(prefix, wire.LIST, "list_objects_v2", below, following)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return sorted(key[cut:] for key in keys if not key.endswith("/"))  # consoles make 'folders' of such names

    def now(self) -> datetime | None:
        """What the server's clock says; None where it does not tell. Asks for a list of at most one name."""
        below = {"Prefix": self._client.key(""), "MaxKeys": 1}
        ask = self._client.call
        answer = ask("", wire.LIST, lambda s3, at: s3.list_objects_v2(Bucket=at["Bucket"], **below))
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date) if date else None

    def remove(self, name: str) -> None:
        """Remove `name` if it is there."""
        with suppress(NotFound):
            self._client.call(name, wire.REMOVE, lambda s3, at: s3.delete_object(**at))

    def sweep(self, older_than_seconds: float = base.DAY) -> None:
        """Abort uploads in parts below the prefix that began longer ago than that, by the server's clock; 0: all.

        Where these credentials may not do it, that is said, and the uploads stay.
        """
        refused: StorageError | None = None
        try:
            for key, upload in self._stale_uploads(timedelta(seconds=older_than_seconds)):
                refused = s3_multipart.abort(self._client, key, upload) or refused
        except AccessDenied as error:
            refused = error
        if isinstance(refused, AccessDenied):
            self._client.say(f"warning: {refused} Until then uploads that died stay there, and take room.")

    # -- requests -----------------------------------------------------------------------------------------------

    def _stale_uploads(self, age: timedelta) -> Iterator[tuple[str, str]]:
        """Key and id of each upload in parts that began longer ago."""
        below = self._client.key("")
        following = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._client.pages("", wire.LIST_UPLOADS, "list_multipart_uploads", below, following):
            date = page["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else datetime.now(timezone.utc)
            for upload in page.get("Uploads", ()):
                began: datetime = upload["Initiated"]
                if upload["Key"].startswith(below) and (not age or now - began > age):
                    yield upload["Key"], upload["UploadId"]

    def _open_body(self, name: str, offset: int) -> tuple[str, Iterator[bytes]]:
        """The version that lies there, and its bytes from `offset`; none where it ends before."""
        span = {"Range": f"bytes={offset}-"} if offset else {}
        once = Patience(0)
        try:
            answer = self._client.call(name, wire.READ, lambda s3, at: s3.get_object(**at, **span), patience=once)
        except RangePastEnd:
            return "", iter(())
        return str(answer.get("ETag", "")), self._read_body(name, offset, answer)

    def _content_length(self, name: str, answer: Mapping[str, Any]) -> int:
        if "ContentLength" not in answer:
            raise Unavailable(
                f"{self.where(name)}: the server does not say how long it is, or was cut off. {CHECK_SERVER}"
            )
        return int(answer["ContentLength"])

    def _read_body(self, name: str, offset: int, answer: Any) -> Iterator[bytes]:
        """A body that ends early, or begins elsewhere, is never taken for the whole."""
        wanted = self._content_length(name, answer)
        if offset and not str(answer.get("ContentRange", "")).startswith(f"bytes {offset}-"):
            raise Unavailable(f"{self.where(name)}: the server sends another range, or was cut off. {CHECK_SERVER}")
        body = answer["Body"]
        try:
            with map_errors(self.where(name), wire.READ):
                while block := body.read(_BLOCK):
                    wanted -= len(block)
                    yield block
            if wanted:
                raise Unavailable(f"{self.where(name)}: the body ended {wanted} bytes early. {CHECK_SERVER}")
        finally:
            body.close()

    def _put_parts(self, name: str, size: int, piece: Callable[[int, int], memoryview]) -> None:
        s3_multipart.put_parts(self._client, name, size, piece, self._write_rights, self._encryption)

    def _read_slice(self, name: str, path: Path, size: int, begin: int, end: int) -> memoryview:
        """Some bytes of a file that must not change meanwhile."""
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) < end - begin or path.stat().st_size != size:
            raise Rejected(f"{path} changed while it was sent to {self.where(name)}. Send it again.")
        return memoryview(data)


def _connect(at: str | None, connect_seconds: float, read_seconds: float) -> Any:
    """A client of the server `at`, or of the one that the environment names; it tries once: more is patience's.

    Raises Rejected for an endpoint that is none.
    """
    import boto3.session
    from botocore.config import Config

    def create_client(**more: Any) -> Any:
        config = Config(
            connect_timeout=connect_seconds,
            read_timeout=read_seconds,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=32,
            tcp_keepalive=True,
            **more,
        )
        return session.client("s3", endpoint_url=at, config=config)

    session = boto3.session.Session()
    try:
        client = create_client()
        endpoint = urlsplit(client.meta.endpoint_url)
        if endpoint.username is not None:
            raise ValueError
    except ValueError:
        text = (
            "The endpoint of S3 is no plain address. Set store.endpoint or AWS_ENDPOINT_URL_S3 to http(s)://host:port,"
        )
        text += " without keys."
        raise Rejected(text) from None
    if re.search(r"\.amazonaws\.com(\.cn)?$", endpoint.hostname or ""):
        return client
    # Other servers: few give each bucket a host name, and older ones store the newer checksums' framing as data.
    only = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    return create_client(s3={"addressing_style": "path"}, **only)
