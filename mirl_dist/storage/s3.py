"""A store in a bucket, through boto3: AWS S3, and servers that speak its language (Ceph, MinIO).

Endpoint and credentials come from boto3's own chain (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, a profile, a role).
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mirl_dist.storage import s3_wire as wire
from mirl_dist.storage.law import NotAllowed, NotThere, StorageError, TryAgain
from mirl_dist.storage.patience import USUAL, Patience, Say, Tries, patiently, to_stderr
from mirl_dist.storage.s3_wire import PASSING, Beyond, Exists, NoUpload, named_errors

T = TypeVar("T")

_BLOCK = 1 << 16  # what a broken connection loses at most
_PART = 1 << 24
_MOST_PARTS = 10_000
_PARTS_AT_ONCE = 4
_STALE = timedelta(days=1)


class S3:
    """A store under `s3://bucket/prefix`, for several threads; each process makes its own connections.

    A request that fails in passing is made again for as long as `patience` lasts; `read` alone leaves that to its
    reader. Timeouts in seconds: to connect, and between two packets.
    """

    def __init__(
        self,
        url: str,
        *,
        patience: Patience = USUAL,
        say: Say = to_stderr,
        connect_seconds: float = 10.0,
        read_seconds: float = 30.0,
    ) -> None:
        self._bucket, self._prefix = wire.address(url)
        self._patience, self._say = patience, say
        self._timeouts = connect_seconds, read_seconds
        self._clients: dict[int, Any] = {}
        self._locks: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": {}, "_locks": {}}

    def where(self, name: str = "") -> str:
        """The place for people and messages."""
        return f"s3://{self._bucket}/{self._key(name)}".rstrip("/")

    def put(self, name: str, data: bytes) -> None:
        """Write `name`, complete or not at all; replaces what was there."""
        self._ask(name, lambda s3, at: s3.put_object(**at, **wire.body(data)))

    def put_file(self, name: str, path: Path) -> None:
        """Copy a file to `name` in parts, complete or not at all; replaces what was there."""
        try:
            size = path.stat().st_size
            if size <= _PART:
                self.put(name, path.read_bytes())
            else:
                self._put_parts(name, path, size)
        except OSError as error:
            text = f"{path}: {error.strerror or error}. Nothing was written to {self.where(name)}; send it again."
            raise NotAllowed(text) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; whether this call wrote it. Of several writers exactly one wins."""
        mark = wire.mark()
        try:
            self._ask(name, lambda s3, at: s3.put_object(**at, **mark, **wire.body(data), IfNoneMatch="*"))
        except Exists:
            return self._is_mine(name, mark)
        return True

    def get(self, name: str) -> bytes:
        """The whole of `name`; a transfer that broke goes on, unless another version lies there by then."""
        tries = Tries(f"reading {self.where(name)}", self._patience, self._say)
        held, version = bytearray(), ""
        while True:
            try:
                found, blocks = self._open(name, len(held))
                if found != version:
                    if held:
                        found, blocks = self._open(name, 0)
                    held, version = bytearray(), found
                for block in blocks:
                    held += block
                    tries.progressed()
                return bytes(held)
            except TryAgain as error:
                tries.failed(error)

    def size(self, name: str) -> int:
        """Bytes."""
        return self._length(name, self._head(name))

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """The bytes from `offset` to the end, in blocks. Raises TryAgain wherever the transfer breaks, at once."""
        yield from self._open(name, offset)[1]

    def exists(self, name: str) -> bool:
        try:
            self._head(name)
        except NotThere:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        """Complete names below `prefix` (a folder name, or '' for all), sorted."""
        below = self._key(prefix).rstrip("/")
        below = f"{below}/" if below else ""
        cut = len(self._key(""))
        pages = self._pages(prefix, "list_objects_v2", below, {"ContinuationToken": "NextContinuationToken"})
        keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
        return sorted(key[cut:] for key in keys if not key.endswith("/"))  # consoles make 'folders' of such names

    def remove(self, name: str) -> None:
        """Remove `name` if it is there."""
        with suppress(NotThere):
            self._ask(name, lambda s3, at: s3.delete_object(**at))

    def sweep(self) -> None:
        """Abort uploads in parts below the prefix that began more than a day ago, by the server's clock."""
        following = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("", "list_multipart_uploads", self._key(""), following):
            date = page["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else datetime.now(timezone.utc)
            for upload in page.get("Uploads", ()):
                began: datetime = upload["Initiated"]
                if now - began > _STALE:
                    self._abort(upload["Key"], upload["UploadId"])

    # -- requests -----------------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _client(self) -> Any:
        """This process's client; a fork must not share sockets with its parent."""
        mine = os.getpid()
        with self._locks.setdefault(mine, threading.Lock()):
            if mine not in self._clients:
                self._clients[mine] = _connected(*self._timeouts)
        return self._clients[mine]

    def _ask(self, name: str, work: Callable[[Any, dict[str, str]], T], *, patience: Patience | None = None) -> T:
        """`work(client, bucket and key)`, tried again while patience lasts; in this package's errors."""
        at = {"Bucket": self._bucket, "Key": self._key(name)}

        def once() -> T:
            with named_errors(self.where(name)):
                return work(self._client(), at)

        return patiently(once, self.where(name), patience or self._patience, self._say)

    def _pages(self, name: str, operation: str, below: str, following: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """All pages of a listing; `following`: what to ask of the next page -> where this one says it."""
        asked = {"Bucket": self._bucket, "Prefix": below}
        while True:
            page = self._ask(name, lambda s3, at: getattr(s3, operation)(**asked))
            yield page
            if not page.get("IsTruncated"):
                return
            asked.update({ask: page[said] for ask, said in following.items() if said in page})

    def _head(self, name: str) -> Any:
        """What the server says of `name`. A bare 404 may mean the bucket: then NotAllowed."""
        try:
            return self._ask(name, lambda s3, at: s3.head_object(**at))
        except NotThere as error:
            try:
                self._ask(name, lambda s3, at: s3.head_bucket(Bucket=self._bucket))
            except NotThere:
                raise NotAllowed(wire.no_bucket(self.where(name))) from None
            raise error

    def _is_mine(self, name: str, mark: dict[str, Any]) -> bool:
        """Whether an object that exists was written by this call, whose answer got lost on its way."""
        try:
            return bool(self._head(name).get("Metadata") == mark["Metadata"])
        except NotThere:
            return False

    def _open(self, name: str, offset: int) -> tuple[str, Iterator[bytes]]:
        """The version that lies there, and its bytes from `offset`; none where it ends before."""
        span = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            answer = self._ask(name, lambda s3, at: s3.get_object(**at, **span), patience=Patience(0))
        except Beyond:
            return "", iter(())
        return str(answer.get("ETag", "")), self._blocks(name, offset, answer)

    def _length(self, name: str, answer: Mapping[str, Any]) -> int:
        if "ContentLength" not in answer:
            raise TryAgain(f"{self.where(name)}: the server does not say how long it is, or was cut off. {PASSING}")
        return int(answer["ContentLength"])

    def _blocks(self, name: str, offset: int, answer: Any) -> Iterator[bytes]:
        """A body that ends early, or begins elsewhere, is never taken for the whole."""
        wanted = self._length(name, answer)
        if offset and not str(answer.get("ContentRange", "")).startswith(f"bytes {offset}-"):
            raise TryAgain(f"{self.where(name)}: the server sends another range, or was cut off. {PASSING}")
        body = answer["Body"]
        try:
            with named_errors(self.where(name)):
                while block := body.read(_BLOCK):
                    wanted -= len(block)
                    yield block
            if wanted:
                raise TryAgain(f"{self.where(name)}: the body ended {wanted} bytes early. {PASSING}")
        finally:
            body.close()

    # -- uploads in parts ---------------------------------------------------------------------------------------

    def _put_parts(self, name: str, path: Path, size: int) -> None:
        """Several parts at once, each tried again alone; the object appears when all are there."""
        mark = wire.mark()
        step = max(_PART, math.ceil(size / _MOST_PARTS))
        upload = self._ask(name, lambda s3, at: s3.create_multipart_upload(**at, **mark))["UploadId"]

        def send(number: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek((number - 1) * step)
                data = file.read(step)
            part = {"UploadId": upload, "PartNumber": number}
            sent = self._ask(name, lambda s3, at: s3.upload_part(**at, **part, **wire.body(data)))
            return {"PartNumber": number, "ETag": sent["ETag"]}

        whole = False
        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, math.ceil(size / step) + 1)))
            if path.stat().st_size != size:
                raise NotAllowed(f"{path} changed while it was sent to {self.where(name)}. Send it again.")
            self._complete(name, {"UploadId": upload, "MultipartUpload": {"Parts": parts}}, mark)
            whole = True
        finally:
            if not whole:
                self._abort(self._key(name), upload)

    def _complete(self, name: str, upload: dict[str, Any], mark: dict[str, Any]) -> None:
        try:
            self._ask(name, lambda s3, at: s3.complete_multipart_upload(**at, **upload))
        except NoUpload:  # completed by an earlier try whose answer got lost, or aborted
            if not self._is_mine(name, mark):
                raise TryAgain(f"{self.where(name)}: the upload was aborted by another. Send it again.") from None

    def _abort(self, key: str, upload: str) -> None:
        """One try: what cannot be aborted now is swept later."""
        given = {"Bucket": self._bucket, "Key": key, "UploadId": upload}
        with suppress(StorageError):
            self._ask("", lambda s3, at: s3.abort_multipart_upload(**given), patience=Patience(0))


def _connected(connect_seconds: float, read_seconds: float) -> Any:
    """A client. It tries once: trying again is patience's. Raises NotAllowed for an endpoint that is none."""
    import boto3.session
    from botocore.config import Config

    def made(**more: Any) -> Any:
        config = Config(
            connect_timeout=connect_seconds,
            read_timeout=read_seconds,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=32,
            tcp_keepalive=True,
            **more,
        )
        return session.client("s3", config=config)

    session = boto3.session.Session()
    try:
        client = made()
        endpoint = urlsplit(client.meta.endpoint_url)
        if endpoint.username is not None:
            raise ValueError
    except ValueError:
        text = "The endpoint of S3 is no plain address. Set AWS_ENDPOINT_URL_S3 to http(s)://host:port, without keys."
        raise NotAllowed(text) from None
    if re.search(r"\.amazonaws\.com(\.cn)?$", endpoint.hostname or ""):
        return client
    # Other servers: few give each bucket a host name, and older ones store the newer checksums' framing as data.
    only = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    return made(s3={"addressing_style": "path"}, **only)
