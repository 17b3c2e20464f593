"""Laws of starting: commands that only read records do not wait for libraries that take seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mirl_dist.config.config import Config
from mirl_dist.storage import Folder
from mirl_dist.training.checkpointing.checkpoint import Checkpoints
from tests.storage.snapshots import commit_round, commit_steps

HEAVY = {"torch", "mlflow", "matplotlib", "boto3", "accelerate", "deepspeed", "scipy", "skimage", "webdataset"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with one finished round and a step of the next."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(Folder(folder))
    identity = {"fingerprint": "f", "manifest_digest": "m", "initial_digest": "i", "versions": {}}
    checkpoints.begin(identity | {"config": Config().dump()})
    commit_round(checkpoints, 0)
    commit_steps(checkpoints, 3, round_=1)
    return str(folder)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--help", "Find winning tickets"),
        ("--version", "mirl_dist"),
        ("train --help", "--resume"),
        ("tickets list RUN", "derain"),
        ("tickets list RUN --json", '"round": 0'),
        ("status RUN", "rounds/01/steps/00000003"),
    ],
)
def test_a_command_that_reads_records_imports_no_heavy_library(words: str, shown: str, run_folder: str) -> None:
    command = [run_folder if word == "RUN" else word for word in words.split()]
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mirl_dist", *command], capture_output=True, text=True, check=True
    )
    assert shown in ended.stdout
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time")}
    assert "mirl_dist.cli.app" in imported
    assert imported & HEAVY == set()
