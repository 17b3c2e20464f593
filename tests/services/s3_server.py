"""A real S3 server (moto) as a process of its own. It keeps objects in memory: a killed server has lost them.

`restart` therefore takes what fills it again. Clients that must not see the server between start and refill talk to it
through a FaultyProxy that refuses meanwhile (tests/services/faulty_proxy.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.services.processes import free_port, kill_group, listens, wait_until

PROGRAM = Path(__file__).with_name("moto_program.py")


class S3Server:
    """`url`: the endpoint, on the loopback. Use as a context manager, or call `stop`."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self.start()

    def start(self, seconds: float = 120) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(self.port)],
            env=os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": "100"},  # lists come in pages of 100 names
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        ended, help_ = self._process.poll, "moto_server does not start: pip install -e '.[dev]'"
        wait_until(
            lambda: listens(self.port), seconds=seconds, hopeless=lambda: ended() is not None, said=lambda: help_
        )

    def kill(self) -> None:
        """SIGKILL to its process group; all objects are lost."""
        kill_group(self._process)
        self._process = None

    stop = kill

    def restart(self, refill: Callable[[], None] = lambda: None) -> None:
        """The same port again, empty but for what `refill` puts there."""
        self.kill()
        self.start()
        refill()

    def env(self, endpoint: str | None = None) -> dict[str, str]:
        """What a client's environment needs; endpoint: a proxy's address instead of the server's own."""
        return {
            "AWS_ENDPOINT_URL_S3": endpoint or self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def client(self) -> Any:
        """A plain boto3 client, for what the store under test does not do."""
        import boto3.session
        from botocore.config import Config

        if self._client is None:
            self._client = boto3.session.Session().client(
                "s3",
                endpoint_url=self.url,
                aws_access_key_id="testing",
                aws_secret_access_key="testing-secret",
                region_name="us-east-1",
                config=Config(s3={"addressing_style": "path"}),
            )
        return self._client

    def bucket(self, name: str) -> str:
        """Make a bucket; its address."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def fill(self, url: str, folder: Path) -> None:
        """Upload the files below `folder` to `url` ('s3://bucket' or 's3://bucket/prefix')."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        client = self.client()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            key = "/".join(filter(None, [prefix.strip("/"), path.relative_to(folder).as_posix()]))
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())

    def __enter__(self) -> S3Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
