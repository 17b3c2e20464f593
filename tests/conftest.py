"""Fixtures that start real processes: a lab with tiny shards, and one undisturbed run to compare others with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.services.lab import Lab, recipe_of, write_photographs

# On a busy machine an example may take any time.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

SERVERS = {"ceph", "slurm", "nodes"}
"""Fixtures that need programs from Debian: all tests that use them are long."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark long tests by what they use; run files that start ranks first, so that none of them is left for the end."""
    for item in items:
        if SERVERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.long)
    items.sort(key=lambda item: "multiprocess" not in item.path.parts)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    made = Lab(folder)
    try:
        write_photographs(folder / "images")
        (folder / "recipe.yaml").write_text(json.dumps(recipe_of(folder / "images")))
        ended = made.mirl("shards", "build", "recipe.yaml", "--out", "shards", "--workers", "1")
        assert ended.rc == 0, ended.said()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def reference(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny config, trained by two ranks under torchrun without any mishap. Only to be read."""
    folder = tmp_path_factory.mktemp("reference")
    ended = lab.cold("torchrun", "--nproc-per-node", "2", "-m", "mirl_dist", *lab.train(folder), cwd=folder).wait()
    assert ended.rc == 0, ended.said()
    assert ended.err == "", ended.said()
    return folder / "run"
