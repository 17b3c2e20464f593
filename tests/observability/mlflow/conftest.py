"""A real MLflow server for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.mlflow_server import MlflowServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.fixture(scope="module")
def server_url(server: MlflowServer) -> str:
    return server.url
