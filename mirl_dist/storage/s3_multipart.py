"""Uploads in parts: several at once, each tried again alone; the object appears when all are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mirl_dist.storage import s3_errors as wire
from mirl_dist.storage.base import NotFound, StorageError, Unavailable
from mirl_dist.storage.retry import Patience
from mirl_dist.storage.s3_client import S3Client
from mirl_dist.storage.s3_errors import NoSuchUpload, RequiredRights

PART_BYTES = 1 << 24
"""Bytes: what is longer goes up in parts."""

_MAX_PARTS = 10_000
_CONCURRENT_PARTS = 4


def put_parts(
    requests: S3Client,
    name: str,
    size: int,
    piece: Callable[[int, int], memoryview],
    needs: RequiredRights,
    given: Mapping[str, Any],
) -> None:
    """Send `size` bytes; `piece(begin, end)` gives some of them, in any order and from several threads.

    `given`: what the new object is to be told. An error that `piece` raises ends the upload, and nothing is there.
    """
    step = max(PART_BYTES, math.ceil(size / _MAX_PARTS))
    marked = {**given, **wire.writer_metadata()}
    upload = requests.call(name, needs, lambda s3, at: s3.create_multipart_upload(**at, **marked))["UploadId"]

    def send(number: int) -> dict[str, Any]:
        data = piece((number - 1) * step, min(number * step, size))
        part = {"UploadId": upload, "PartNumber": number}
        return {"PartNumber": number, "ETag": requests.send("upload_part", name, needs, data, part)}

    whole = False
    try:
        with ThreadPoolExecutor(_CONCURRENT_PARTS) as pool:
            parts = list(pool.map(send, range(1, math.ceil(size / step) + 1)))
        completion = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        try:
            requests.call(name, needs, lambda s3, at: s3.complete_multipart_upload(**at, **completion))
        except NoSuchUpload:  # completed by an earlier try whose answer got lost, or aborted
            if find_own_write(requests, name, marked) is None:
                raise Unavailable(
                    f"{requests.where(name)}: the upload was aborted by another. Send it again."
                ) from None
        whole = True
    finally:
        if not whole:
            abort(requests, requests.key(name), upload)


def find_own_write(requests: S3Client, name: str, mark: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the server says of `name`, if the write of this `mark` made it: its answer may have got lost."""
    try:
        head: dict[str, Any] = requests.head(name)
    except NotFound:
        return None
    return head if head.get("Metadata") == mark["Metadata"] else None


def abort(requests: S3Client, key: str, upload: str) -> StorageError | None:
    """One try; the error, if it failed: what cannot be aborted now is swept later."""
    given = {"Bucket": requests.bucket, "Key": key, "UploadId": upload}
    try:
        requests.call("", wire.ABORT, lambda s3, at: s3.abort_multipart_upload(**given), patience=Patience(0))
    except StorageError as error:
        return error
    return None
