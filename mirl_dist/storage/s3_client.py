"""Requests about one bucket, tried again while patience lasts, with what they mean for the names below a prefix."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mirl_dist.storage import s3_errors as wire
from mirl_dist.storage.base import NotFound, Unavailable
from mirl_dist.storage.retry import Patience, Say, with_retries
from mirl_dist.storage.s3_errors import CHECK_SERVER, BareNotFound, RequiredRights, map_errors

T = TypeVar("T")


class S3Client:
    """For several threads; each process makes its own connections, by `connect`."""

    def __init__(self, bucket: str, prefix: str, connect: Callable[[], Any], patience: Patience, say: Say) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.patience, self.say = patience, say
        self._connect = connect
        self._clients: dict[int, Any] = {}
        self._locks: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": {}, "_locks": {}}

    def where(self, name: str = "") -> str:
        """The place for people and messages."""
        return f"s3://{self.bucket}/{self.key(name)}".rstrip("/")

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def client(self) -> Any:
        """This process's client; a fork must not share sockets with its parent."""
        pid = os.getpid()
        with self._locks.setdefault(pid, threading.Lock()):
            if pid not in self._clients:
                self._clients[pid] = self._connect()
        return self._clients[pid]

    def call(
        self,
        name: str,
        needs: RequiredRights,
        work: Callable[[Any, dict[str, str]], T],
        *,
        patience: Patience | None = None,
    ) -> T:
        """`work(client, bucket and key)`, tried again while patience lasts; in this package's errors."""
        at = {"Bucket": self.bucket, "Key": self.key(name)}

        def once() -> T:
            try:
                with map_errors(self.where(name), needs):
                    return work(self.client(), at)
            except BareNotFound as error:
                self._explain_not_found(name)
                if needs in (wire.READ, wire.REMOVE):
                    raise NotFound(str(error)) from None
                raise Unavailable(
                    f"{self.where(name)}: the server answered 404 without a reason. {CHECK_SERVER}"
                ) from None

        return with_retries(once, self.where(name), patience or self.patience, self.say)

    def send(
        self, operation: str, name: str, needs: RequiredRights, data: bytes | memoryview, given: Mapping[str, Any]
    ) -> str:
        """Send a body; the ETag of what the server holds, which is sent again where it is not what was sent."""

        def once(s3: Any, at: dict[str, str]) -> str:
            body = wire.body_arguments(data)
            answer = getattr(s3, operation)(**at, **given, **body)
            if not wire.is_same_content(answer, body):
                raise wire.damaged_error(self.where(name))
            return str(answer["ETag"])

        return self.call(name, needs, once)

    def pages(
        self, name: str, needs: RequiredRights, operation: str, below: str, following: Mapping[str, str]
    ) -> Iterator[dict[str, Any]]:
        """All pages of a listing; `following`: what to ask of the next page -> where this one says it."""
        asked = {"Bucket": self.bucket, "Prefix": below}

        def once(s3: Any, at: dict[str, str]) -> dict[str, Any]:
            page: dict[str, Any] = getattr(s3, operation)(**asked)
            if "IsTruncated" not in page:
                raise Unavailable(f"{self.where(name)}: the server's answer is no listing. {CHECK_SERVER}")
            return page

        while True:
            page = self.call(name, needs, once)
            yield page
            if not page["IsTruncated"]:
                return
            next_page = {ask: page[key] for ask, key in following.items() if page.get(key)}
            if next_page.items() <= asked.items():
                raise Unavailable(f"{self.where(name)}: the server's listing does not go on. {CHECK_SERVER}")
            asked.update(next_page)

    def head(self, name: str) -> Any:
        """What the server says of `name`."""
        return self.call(name, wire.READ, lambda s3, at: s3.head_object(**at))

    def _explain_not_found(self, name: str) -> None:
        """After a 404 that may mean anything: that this is an S3 server, and has the bucket.

        Raises Rejected where it has not, and Unavailable where something else answers.
        """
        try:
            with map_errors(self.where(name), wire.LIST):
                self.client().list_objects_v2(Bucket=self.bucket, Prefix=self.key(""), MaxKeys=1)
        except BareNotFound:
            text = f"{self.where(name)}: what answers is no S3 server (HTTP 404 for the bucket, without a reason)."
            raise Unavailable(f"{text} Check the endpoint.") from None
