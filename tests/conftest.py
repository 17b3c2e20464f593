"""Fixtures that start real processes: a lab with tiny shards, and one undisturbed run to compare others with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from mirl_dist.observability.console import LOGGER
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


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's fixture, for the package's logger too, which passes nothing on to the root logger."""
    LOGGER.addHandler(caplog.handler)
    yield caplog
    LOGGER.removeHandler(caplog.handler)


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of as many MB as the test's parameter says."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs: run as root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all test processes of a session, for what is made once and only read."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextmanager
def made_once(folder: Path) -> Iterator[bool]:
    """Whether the caller is to make what lies in `folder`; others wait until it is made, and make it if that failed."""
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> Iterator[Lab]:
    folder = shared_folder / "lab"
    lab = Lab(folder, tmp_path_factory.mktemp("streams"))
    try:
        with made_once(folder) as missing:
            if missing:
                write_photographs(folder / "images")
                (folder / "recipe.yaml").write_text(json.dumps(recipe_of(folder / "images")))
                lab.mirl("shards", "build", "recipe.yaml", "--out", "shards", "--workers", "1", cwd=folder).ok()
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="session")
def reference(lab: Lab, shared_folder: Path) -> Path:
    """The run folder of the tiny config, trained by two ranks under torchrun without any mishap. Only to be read."""
    folder = shared_folder / "reference"
    with made_once(folder) as missing:
        if missing:
            folder.mkdir()
            command = ("torchrun", "--nproc-per-node", "2", "-m", "mirl_dist", *lab.train(folder))
            ended = lab.cold(*command, cwd=folder).wait().ok()
            assert ended.err == "", ended.said()
    return folder / "run"
