"""A store in an S3 bucket, through boto3: AWS S3 and compatible servers (Ceph, MinIO).

Credentials come from boto3's default chain (AWS_ACCESS_KEY_ID, a profile, a role). Without an endpoint in the options,
boto3's own is used (AWS_ENDPOINT_URL_S3).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from mirl_dist.storage import base
from mirl_dist.storage import s3_errors as wire
from mirl_dist.storage.base import NotFound, Options, Rejected, StorageError, Unavailable
from mirl_dist.storage.http import parse_date
from mirl_dist.storage.retry import Patience, RetryState, Say, to_stderr
from mirl_dist.storage.s3_client import PART_BYTES, S3Client
from mirl_dist.storage.s3_errors import (
    CHECK_SERVER,
    AccessDenied,
    AlreadyExists,
    NoSuchUpload,
    NotSupported,
    RangePastEnd,
)

_BLOCK = 1 << 16  # upper bound of the bytes lost with a broken connection
_ONCE = Patience(0)


class S3Store:
    """A store under `s3://bucket/prefix`. Thread-safe; each process opens its own connections.

    Transient failures are retried within patience, except by `read`, whose caller must retry. patience: overrides that
    of the options. connect_seconds, read_seconds: timeouts of connecting, and between two packets.
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
        patience = patience or Patience(options.patience_seconds)
        self._client = S3Client(url, options.endpoint, (connect_seconds, read_seconds), patience, say)
        self._write_rights, self._encryption = wire.encryption_arguments(options)

    def where(self, name: str = "") -> str:
        return self._client.where(name)

    def put(self, name: str, data: bytes) -> None:
        """Write `name` atomically, replacing an existing object; a multipart upload above PART_BYTES."""
        if len(data) <= PART_BYTES:
            self._put_object(name, data, self._encryption)
        else:
            self._upload(name, lambda: io.BytesIO(data))

    def put_file(self, name: str, path: Path) -> None:
        """Copy a file to `name` atomically, replacing an existing object; a multipart upload above PART_BYTES."""
        try:
            if path.stat().st_size <= PART_BYTES:
                self.put(name, path.read_bytes())
            else:
                self._upload(name, lambda: str(path))
        except OSError as error:
            text = f"{path}: {error.strerror or error}. Nothing was written to {self.where(name)}; send it again."
            raise Rejected(text) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; True if this call wrote it. Exactly one of several writers succeeds.

        Never uses a multipart upload, since Ceph ignores the condition on those.
        """
        marked = {**self._encryption, **wire.writer_metadata()}
        try:
            self._put_object(name, data, {**marked, "IfNoneMatch": "*"})
        except AlreadyExists:
            return self._is_own_write(name, marked)
        except NotSupported as error:
            raise NotSupported(
                f"{error} Conditional writes (If-None-Match), by which one of several launches takes a "
                "run, are known to AWS S3, Ceph and MinIO."
            ) from None
        return True

    def get(self, name: str) -> bytes:
        """Return all bytes of `name`. Resumes a broken transfer; restarts it if the object has changed (ETag)."""
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
        return self._content_length(name, self._client.head(name))

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes from `offset` to the end in blocks. Raise Unavailable at once if the transfer breaks."""
        yield from self._open_body(name, offset)[1]

    def exists(self, name: str) -> bool:
        try:
            self._client.head(name)
        except NotFound:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        """Return the full names of all objects below `prefix` (a folder's name, or '' for all), sorted."""
        below = self._client.key(prefix).rstrip("/")
        pages = self._client.pages(prefix, wire.LIST, "list_objects_v2", f"{below}/" if below else "")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        cut = len(self._client.key(""))
        return sorted(key[cut:] for key in keys if not key.endswith("/"))  # consoles create such keys as 'folders'

    def now(self) -> datetime | None:
        """Return the server's `Date` header, from a listing of at most one key; None without one."""
        below = {"Bucket": self._client.bucket, "Prefix": self._client.key(""), "MaxKeys": 1}
        return _server_time(self._client.call("", wire.LIST, lambda s3, at: s3.list_objects_v2(**below)))

    def remove(self, name: str) -> None:
        with suppress(NotFound):
            self._client.call(name, wire.REMOVE, lambda s3, at: s3.delete_object(**at))

    def sweep(self, older_than_seconds: float = base.DAY) -> None:
        """Abort multipart uploads below the prefix that started more than `older_than_seconds` ago; 0: all.

        Ages are by the server's clock where it sends one. Warns, and leaves the uploads, if the credentials lack the
        rights.
        """
        refused: StorageError | None = None
        try:
            for upload in self._stale_uploads(timedelta(seconds=older_than_seconds)):
                refused = self._abort(upload) or refused
        except AccessDenied as error:
            refused = error
        if isinstance(refused, AccessDenied):
            self._client.say(f"warning: {refused} Until then uploads that died stay there, and take room.")

    # -- requests -----------------------------------------------------------------------------------------------

    def _put_object(self, name: str, data: bytes, arguments: dict[str, Any]) -> None:
        self._client.call(name, self._write_rights, lambda s3, at: s3.put_object(**at, **arguments, Body=data))

    def _upload(self, name: str, source: Callable[[], Any]) -> None:
        marked = {**self._encryption, **wire.writer_metadata()}
        try:
            self._client.upload(name, self._write_rights, source, marked)
        except NoSuchUpload:  # completed by an earlier attempt whose response was lost, or aborted
            if not self._is_own_write(name, marked):
                text = f"{self.where(name)}: the upload was aborted by another. Send it again."
                raise Unavailable(text) from None

    def _is_own_write(self, name: str, marked: dict[str, Any]) -> bool:
        """Whether `name` was written with this metadata, so by an attempt of this call whose response was lost."""
        try:
            return bool(self._client.head(name).get("Metadata") == marked["Metadata"])
        except NotFound:
            return False

    def _stale_uploads(self, age: timedelta) -> Iterator[dict[str, str]]:
        """Yield the bucket, key and id of each multipart upload older than `age`."""
        below = self._client.key("")
        for page in self._client.pages("", wire.LIST_UPLOADS, "list_multipart_uploads", below):
            now = _server_time(page) or datetime.now(timezone.utc)
            for upload in page.get("Uploads", ()):
                if upload["Key"].startswith(below) and (not age or now - upload["Initiated"] > age):
                    yield {"Bucket": self._client.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}

    def _abort(self, upload: dict[str, str]) -> StorageError | None:
        """Try once to abort an upload. Return the error on failure; the next sweep retries."""
        try:
            self._client.call("", wire.ABORT, lambda s3, at: s3.abort_multipart_upload(**upload), patience=_ONCE)
        except StorageError as error:
            return error
        return None

    def _open_body(self, name: str, offset: int) -> tuple[str, Iterator[bytes]]:
        """Return the object's ETag and its bytes from `offset`; '' and no bytes if `offset` is at or past the end."""
        span = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            answer = self._client.call(name, wire.READ, lambda s3, at: s3.get_object(**at, **span), patience=_ONCE)
        except RangePastEnd:
            return "", iter(())
        self._content_length(name, answer)
        if offset and not str(answer.get("ContentRange", "")).startswith(f"bytes {offset}-"):
            raise Unavailable(f"{self.where(name)}: the server sends another range, or was cut off. {CHECK_SERVER}")
        return str(answer.get("ETag", "")), self._read_body(name, answer["Body"])

    def _read_body(self, name: str, body: Any) -> Iterator[bytes]:
        """Yield a body in blocks. botocore raises an error if it ends before the announced length."""
        with closing(body), wire.map_errors(self.where(name), wire.READ):
            yield from body.iter_chunks(_BLOCK)

    def _content_length(self, name: str, answer: dict[str, Any]) -> int:
        if "ContentLength" not in answer:
            raise Unavailable(
                f"{self.where(name)}: the server does not say how long it is, or was cut off. {CHECK_SERVER}"
            )
        return int(answer["ContentLength"])


def _server_time(answer: dict[str, Any]) -> datetime | None:
    return parse_date(answer["ResponseMetadata"]["HTTPHeaders"].get("date"))
