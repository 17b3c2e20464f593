"""Requests to one bucket through boto3, retried within patience, with errors converted to StorageError."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mirl_dist.config import credentials
from mirl_dist.errors import UserError
from mirl_dist.storage import s3_errors as wire
from mirl_dist.storage.base import NotFound, Rejected, Unavailable
from mirl_dist.storage.retry import Patience, Say, with_retries
from mirl_dist.storage.s3_errors import CHECK_SERVER, BareNotFound, RequiredRights, map_errors

T = TypeVar("T")

PART_BYTES = 1 << 24
"""Size in bytes above which objects are uploaded in parts."""

_CONCURRENT_PARTS = 4
_PART_ATTEMPTS = 6  # by boto3 itself, within about 30 s; then the whole upload is retried within patience


class S3Client:
    """A client of one bucket and prefix. Thread-safe and picklable; each process opens its own connections.

    endpoint: None for the environment's. timeouts: seconds for connecting, and between two packets.
    """

    def __init__(
        self, url: str, endpoint: str | None, timeouts: tuple[float, float], patience: Patience, say: Say
    ) -> None:
        self.bucket, self.prefix = wire.parse_address(url)
        self.patience, self.say = patience, say
        self._endpoint, self._timeouts = endpoint, timeouts
        self._clients: dict[tuple[int, int], Any] = {}
        self._locks: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": {}, "_locks": {}}

    def where(self, name: str = "") -> str:
        return f"s3://{self.bucket}/{self.key(name)}".rstrip("/")

    def _server(self) -> str:
        return urlsplit(self.client().meta.endpoint_url).hostname or ""

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def client(self, attempts: int = 1) -> Any:
        """Return this process's boto3 client with that many attempts per request. A fork must not share its sockets."""
        pid = os.getpid()
        with self._locks.setdefault(pid, threading.Lock()):
            if (pid, attempts) not in self._clients:
                self._clients[pid, attempts] = _connect(self._endpoint, self._timeouts, attempts)
        return self._clients[pid, attempts]

    def call(
        self,
        name: str,
        needs: RequiredRights,
        work: Callable[[Any, dict[str, str]], T],
        *,
        patience: Patience | None = None,
        attempts: int = 1,
    ) -> T:
        """Return `work(client, {Bucket, Key})`, retried within patience. Raises StorageError only."""
        at = {"Bucket": self.bucket, "Key": self.key(name)}

        def once() -> T:
            try:
                with map_errors(self.where(name), needs, self._server):
                    return work(self.client(attempts), at)
            except BareNotFound as error:
                self._explain_not_found(name)
                if needs in (wire.READ, wire.REMOVE):
                    raise NotFound(str(error)) from None
                raise Unavailable(
                    f"{self.where(name)}: the server answered 404 without a reason. {CHECK_SERVER}"
                ) from None

        return with_retries(once, self.where(name), patience or self.patience, self.say)

    def upload(self, name: str, needs: RequiredRights, source: Callable[[], Any], arguments: Mapping[str, Any]) -> None:
        """Upload in parts with boto3's transfer manager, which aborts the upload if a part fails.

        source: called for each attempt; returns a file's path, or a new stream.
        """
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        config = TransferConfig(
            multipart_chunksize=PART_BYTES, max_concurrency=_CONCURRENT_PARTS, preferred_transfer_client="classic"
        )
        config.max_in_memory_upload_chunks = _CONCURRENT_PARTS  # bounds memory for streams; files are not buffered

        def work(s3: Any, at: dict[str, str]) -> None:
            with create_transfer_manager(s3, config) as manager:
                manager.upload(source(), at["Bucket"], at["Key"], dict(arguments)).result()

        self.call(name, needs, work, attempts=_PART_ATTEMPTS if self.patience.seconds > 0 else 1)

    def pages(self, name: str, needs: RequiredRights, operation: str, below: str) -> list[dict[str, Any]]:
        """Return all pages of a listing of the keys that begin with `below`."""

        def work(s3: Any, at: dict[str, str]) -> list[dict[str, Any]]:
            pages = list(s3.get_paginator(operation).paginate(Bucket=self.bucket, Prefix=below))
            if any("IsTruncated" not in page for page in pages):
                raise Unavailable(f"{self.where(name)}: the server's answer is no listing. {CHECK_SERVER}")
            if pages[-1]["IsTruncated"]:
                raise Unavailable(f"{self.where(name)}: the server's listing does not go on. {CHECK_SERVER}")
            return pages

        return self.call(name, needs, work)

    def head(self, name: str) -> dict[str, Any]:
        """Return the HEAD response of `name`: size and metadata."""
        answer: dict[str, Any] = self.call(name, wire.READ, lambda s3, at: s3.head_object(**at))
        return answer

    def _explain_not_found(self, name: str) -> None:
        """After a 404 without a reason, check that the server is an S3 server and has the bucket.

        Raises Rejected if the bucket is missing, and Unavailable if the server is not an S3 server.
        """
        try:
            with map_errors(self.where(name), wire.LIST):
                self.client().list_objects_v2(Bucket=self.bucket, Prefix=self.key(""), MaxKeys=1)
        except BareNotFound:
            text = f"{self.where(name)}: what answers is no S3 server (HTTP 404 for the bucket, without a reason)."
            raise Unavailable(f"{text} Check the endpoint.") from None


def _connect(endpoint: str | None, timeouts: tuple[float, float], attempts: int) -> Any:
    """Create a boto3 client. Raise Rejected for an invalid endpoint, or one with credentials."""
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import InvalidRegionError

    config = Config(
        connect_timeout=timeouts[0],
        read_timeout=timeouts[1],
        retries={"total_max_attempts": attempts, "mode": "standard"},
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    try:
        credentials.check_variables(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
    except UserError as fault:
        raise Rejected(str(fault)) from None
    session = boto3.session.Session()
    try:
        client = session.client("s3", endpoint_url=endpoint, config=config)
        address = urlsplit(client.meta.endpoint_url)
        if address.username is not None:
            raise ValueError
    except InvalidRegionError:
        raise Rejected(
            f"S3: found {ascii(session.region_name)[:80]}, which is no name of a region. Correct AWS_DEFAULT_REGION, "
            "or the profile's region."
        ) from None
    except ValueError:
        raise Rejected(
            "The endpoint of S3 is no plain address. Set store.endpoint or AWS_ENDPOINT_URL_S3 to http(s)://host:port, "
            "without keys."
        ) from None
    if re.search(r"\.amazonaws\.com(\.cn)?$", address.hostname or ""):
        return client
    # Other servers: few support virtual-hosted buckets, and older ones store the framing of boto3's newer checksums as
    # data. The signature instead covers the SHA-256 of each body, which they verify.
    signed = {"addressing_style": "path", "payload_signing_enabled": True}
    only = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    return session.client("s3", endpoint_url=endpoint, config=config.merge(Config(s3=signed, **only)))
