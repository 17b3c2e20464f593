"""Where a run keeps on this machine what is no part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mirl_dist.config.local_paths import journal_folder, log_folder


def test_the_usual_journal_lies_in_the_run_or_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    run = tmp_path / "runs" / "a"
    assert journal_folder("runs/a", None) == journal_folder(f"file://{run}", None) == run / "outbox"
    inside = journal_folder("s3://bucket/runs/a", None)
    assert inside.parent == tmp_path / "home/.cache/mirl-dist/outbox" and len(inside.name) == 16
    assert journal_folder("s3://bucket/runs/a/", None) == inside != journal_folder("s3://bucket/runs/b", None)
    assert journal_folder("s3://bucket/runs/a", None, "another run there") != inside
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert journal_folder("s3://bucket/runs/a", None) == tmp_path / "cache/mirl-dist/outbox" / inside.name
    assert journal_folder("s3://bucket/runs/a", "~/kept") == tmp_path / "home/kept" / inside.name
    assert journal_folder("runs/a", str(tmp_path)).parent == tmp_path
    (tmp_path / "cache").write_text("no folder")
    aside = journal_folder("s3://bucket/runs/a", None)
    assert aside.name == inside.name and aside.parent.parent.name == f"mirl-dist-{os.getuid()}"
    assert not run.exists(), "asking makes nothing"


def test_logs_lie_beside_the_run_or_on_this_machine_and_where_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert log_folder("/runs/a", None) == log_folder("file:///runs/a", None) == Path("/runs/a/logs")
    one, other = (log_folder(f"s3://{bucket}/runs/a", None) for bucket in ("one", "other"))
    assert one.parent == Path("/state/mirl-dist") and one.name.startswith("a-") and one != other
    assert log_folder("s3://one/a", "/logs") == Path("/logs")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert log_folder("s3://one/runs/a", None).parent == Path("~/.local/state/mirl-dist").expanduser()
