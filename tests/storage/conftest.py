"""What the tests of stores share: an S3 server for the tests of a file, and the lines said to people."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.s3_server import S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def lines() -> list[str]:
    """What was said to people."""
    return []
