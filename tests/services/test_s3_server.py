"""What tests may rely on in the S3 server that they run against."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
from urllib.parse import urlsplit

import boto3.session
import pytest
from botocore.config import Config

from tests.services.s3_server import S3Server


@pytest.mark.long
def test_concurrent_puts_and_gets_of_one_key_are_all_answered_with_whole_objects() -> None:
    with S3Server() as server:
        server.bucket("bucket")
        once = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})

        def hammer(number: int) -> set[bytes]:
            keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
            client = boto3.session.Session().client("s3", endpoint_url=server.url, config=once, **keys)
            read = set()
            for _ in range(25):
                client.put_object(Bucket="bucket", Key="k", Body=bytes([number]) * 200_000)
                read.add(client.get_object(Bucket="bucket", Key="k")["Body"].read())
                assert client.list_objects_v2(Bucket="bucket")["KeyCount"] == 1
            return read

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            read = set.union(*threads.map(hammer, range(8)))
        assert read <= {bytes([number]) * 200_000 for number in range(8)}


def test_a_client_that_stops_in_the_middle_of_its_request_keeps_no_other_waiting() -> None:
    with S3Server() as server:
        server.bucket("bucket")
        place = urlsplit(server.url)
        with socket.create_connection((place.hostname, place.port), timeout=30) as stuck:
            stuck.sendall(b"PUT /bucket/k HTTP/1.1\r\nHost: s3\r\nContent-Length: 100\r\n\r\nhalf")
            put = {"Bucket": "bucket", "Key": "k", "Body": b"x"}
            done = threading.Thread(target=server.client().put_object, kwargs=put, daemon=True)
            done.start()
            done.join(30)
            assert not done.is_alive()
        assert server.client().get_object(Bucket="bucket", Key="k")["Body"].read() == b"x"
