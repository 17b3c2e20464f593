"""Laws of the doctor: it names what is needed and where things would lie, and reads a config's shards once."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from mirl_dist import config as configs
from mirl_dist import doctor, opening
from mirl_dist.storage import Options, Store, open_store

REPOSITORY = Path(__file__).parent.parent
PAIR = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OTHERS = (
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PAIR, *OTHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What is said of this machine, by the first 16 letters of each line."""
    capsys.readouterr()
    doctor.print_machine()
    return {line[:16].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}


def test_every_library_of_the_package_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    project = (REPOSITORY / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    needed = re.findall(r'"([A-Za-z0-9-]+)', project)
    assert len(needed) > 10 and set(needed) <= lines(capsys).keys()


def test_the_place_of_the_shard_cache_is_told_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    said = lines(capsys)["shard cache"]
    assert re.fullmatch(rf"{tmp_path}/job/\S+, \d+\.\d GB free .*", said)
    assert not (tmp_path / "job").exists()


def test_credentials_of_s3_are_told_of_and_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lines(capsys)["S3 credentials"].startswith("not set")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "swordfish")
    assert lines(capsys)["S3 credentials"].startswith("not set"), "half of a pair opens nothing"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    found = lines(capsys)
    assert found["S3 credentials"].startswith("set") and "swordfish" not in str(found)
    for name in PAIR:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = swordfish\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    found = lines(capsys)
    assert found["S3 credentials"].startswith("set") and "swordfish" not in str(found)


def test_a_plan_for_many_worlds_reads_the_shards_once(
    lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(address: str, options: Options) -> Store:
        opened.append(address)
        return open_store(address, options)

    monkeypatch.setattr(opening, "open_store", counted)
    monkeypatch.chdir(tmp_path)
    config = configs.read(lab.config(tmp_path), ["batch.global=12", "batch.forward=4", "data.cache.folder=cache"])
    doctor.print_plan(config)
    assert opened.count(str(lab.shards)) == 1
    said = capsys.readouterr().out
    assert re.search(r"^data\.cache +cache, \d+\.\d GB free$", said, re.MULTILINE) and not (tmp_path / "cache").exists()
    assert "1 ranks x 3 passes x 4 samples = global batch 12" in said
    assert "2 ranks: batch.forward: 4 samples per pass do not divide the 6" in said
    assert "4 ranks x 1 pass x 3 samples = global batch 12" in said and "64 ranks: batch.global" in said
