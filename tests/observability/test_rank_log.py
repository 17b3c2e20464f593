"""The log of a rank: complete, appended to, without secrets, and never the end of a run."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.config.config import Config
from mirl_dist.observability import progress, rank_log
from mirl_dist.observability.console import FAULT, LOGGER, note, say, warn
from mirl_dist.observability.rank_log import RankLog


def config(**keys: Any) -> Config:
    return Config.model_validate(keys)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def attach() -> Iterator[Callable[[RankLog], RankLog]]:
    """Adds logs to the package's logger until the test ends."""
    logs: list[RankLog] = []

    def add(log: RankLog) -> RankLog:
        LOGGER.addHandler(log)
        logs.append(log)
        return log

    yield add
    for log in logs:
        LOGGER.removeHandler(log)
        log.close()


def test_all_that_a_rank_says_is_in_its_log_with_where_it_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attach: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    phases = iter(["training", "training", "evaluating", "uploading"])
    log = attach(RankLog(tmp_path / "logs", lambda: next(phases)))
    before = datetime.now(timezone.utc)
    note("round 2", round=2, step=40, loss=0.25, batch_seconds=0.5)
    warn("mirl-dist: a shard is late")
    say("ticket 2: half of all weights")
    say("warning: rank 1 is slow")
    assert log.path == tmp_path / "logs" / "rank-0003.jsonl"
    first, *rest = lines(log.path)
    when = datetime.fromisoformat(first["time"].replace("Z", "+00:00"))
    assert abs((when - before).total_seconds()) < 60
    who = {"rank": 3, "world": 8, "host": platform.node(), "pid": os.getpid(), "round": 2, "step": 40}
    assert {key: first[key] for key in who} == who
    assert (first["phase"], first["level"], first["loss"], first["batch_seconds"]) == ("training", "note", 0.25, 0.5)
    assert [(line["phase"], line["level"], line["text"]) for line in rest] == [
        ("training", "warning", "mirl-dist: a shard is late"),
        ("evaluating", "info", "ticket 2: half of all weights"),
        ("uploading", "warning", "warning: rank 1 is slow"),
    ]
    assert all({key: line[key] for key in who} == who for line in rest), "where it stood last"
    said = capsys.readouterr()
    assert said.out == "ticket 2: half of all weights\nwarning: rank 1 is slow\n" and "late" in said.err
    assert "round 2" not in said.out + said.err, "what is noted is for the log alone"


def test_what_bars_tell_is_in_the_logs_of_ranks_that_show_none_too(
    tmp_path: Path, attach: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    log = attach(RankLog(tmp_path, lambda: "training"))
    for shown in (True, False):
        with progress.bar("round 0", 6, shown=shown) as advance:
            advance(5, "loss 0.5")
            advance(6, "loss 0.4")
    assert [line["text"] for line in lines(log.path)] == ["round 0: 6/6 loss 0.4"] * 2
    assert capsys.readouterr().out == "round 0: 6/6 loss 0.4\n"


def test_numbers_are_noted_every_few_seconds_and_not_at_every_step(tmp_path: Path, attach: Any) -> None:
    log = attach(RankLog(tmp_path, lambda: "training"))
    for step in range(100):
        note("round 0", round=0, step=step, loss=float("nan"))
    note("round 1", round=1, step=0, loss=1.0)
    warn("a word")
    assert [(line["text"], line["step"]) for line in lines(log.path)] == [("round 0", 0), ("round 1", 0), ("a word", 0)]
    assert lines(log.path)[0]["loss"] == "nan", "JSON has no such number"


def test_a_log_is_gone_on_with_after_a_restart(tmp_path: Path, attach: Any) -> None:
    for _ in range(2):
        log = attach(RankLog(tmp_path, lambda: "starting"))
        say("started")
        LOGGER.removeHandler(log)
        log.close()
    assert [line["text"] for line in lines(log.path)] == ["started", "started"]


def test_no_secret_reaches_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attach: Any) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "tracked!")
    log = attach(RankLog(tmp_path, lambda: "starting"))
    note("at https://me:pass@host/x?token=abc of wJalrXUtnFEMI with tracked!", logging.ERROR)
    logging.getLogger("mirl_dist.tracking").warning("%s is away", "http://bob:hunt/er2secret@127.0.0.1:9")
    assert [line["text"] for line in lines(log.path)] == [
        "at https://***host/x*** of *** with ***",
        "http://***127.0.0.1:9 is away",
    ]


def test_a_refused_launch_leaves_no_log_and_a_failed_one_does(tmp_path: Path, attach: Any) -> None:
    run = tmp_path / "run"
    log = attach(RankLog(run / "logs", lambda: "starting", wait_for=run))
    say("started")
    warn("mirl-dist: found another config", FAULT)
    assert not run.exists()
    warn("mirl-dist, rank 1: another rank has exited")
    assert [line["level"] for line in lines(log.path)] == ["info", "fault", "warning"]


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/logs"])
def test_a_log_that_cannot_be_written_is_told_once(place: str, attach: Any, capsys: pytest.CaptureFixture[str]) -> None:
    attach(RankLog(Path(place), lambda: "training"))
    for _ in range(3):
        say("a line")
    said = capsys.readouterr()
    assert said.out == "a line\n" * 3
    assert said.err.count("\n") == 1
    assert said.err.startswith(
        f"mirl-dist, rank 0 ({platform.node()}): {place}/rank-0000.jsonl: this rank's log cannot"
    )
    assert "set ranks.logs" in said.err


def test_a_full_disk_costs_lines_and_nothing_else(
    tmp_path: Path, attach: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-0000.jsonl").symlink_to("/dev/full")
    attach(RankLog(tmp_path, lambda: "training"))
    say("a line")
    say("a line")
    said = capsys.readouterr()
    assert said.out == "a line\n" * 2
    assert said.err.count("(No space left on device); the run continues without it") == 1


SCRIPT = """
import sys, threading
from mirl_dist.observability import rank_log
from mirl_dist.config.config import Config
rank_log.begin(Config.model_validate({"run": {"folder": sys.argv[1]}}), lambda: "training")
def fail():
    raise ZeroDivisionError("in a thread")
if sys.argv[2] == "thread":
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
else:
    raise ZeroDivisionError("unforeseen")
"""


@pytest.mark.parametrize(("where", "text"), [("main", "unforeseen"), ("thread", "in a thread")])
def test_the_traceback_of_an_unforeseen_error_is_in_the_log_and_on_the_terminal(
    tmp_path: Path, where: str, text: str
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), where]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stderr.rstrip().endswith(f"ZeroDivisionError: {text}")
    error = lines(tmp_path / "run" / "logs" / "rank-0000.jsonl")[-1]
    assert error["level"] == "error" and error["text"].startswith("Traceback (most recent call last)")
    assert text in error["text"]


def test_a_second_run_of_one_process_has_a_log_of_its_own(tmp_path: Path) -> None:
    paths = []
    hook = sys.excepthook
    try:
        for name in ("a", "b"):
            paths.append(rank_log.begin(config(run={"folder": str(tmp_path / name)}), lambda: "training"))
    finally:
        rank_log.end()
    say("nobody listens")
    assert sys.excepthook is hook
    assert [[line["text"].split()[0] for line in lines(path)] for path in paths] == [["started"], ["started"]]
