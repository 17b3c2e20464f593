"""Laws of commits in the background: training goes on meanwhile, and hears of it when one could not be kept."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from mirl_dist.errors import UserError
from mirl_dist.storage import Rejected, Unavailable
from mirl_dist.storage import async_writer as keeping
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.storage.retry import Patience
from tests.services.waiting import until

REFUSED = "a commit failed, and training stops: "


class Slow:
    """Work that waits to be let go, and counts how often it was begun."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), 0

    def __call__(self) -> None:
        self.begun += 1
        assert self.go.wait(60)


def failing(*errors: Exception) -> Callable[[], None]:
    """Work that meets one error after the other, and then succeeds."""
    left = list(errors)

    def work() -> None:
        if left:
            raise left.pop(0)

    return work


HEAR = pytest.mark.parametrize(
    "hear", [AsyncWriter.wait, AsyncWriter.raise_failure, lambda keeper: keeper.begin(failing(), "the next")]
)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "Patience", lambda seconds: Patience(seconds, first=0.001, most=0.002))


def test_training_goes_on_while_a_commit_is_written() -> None:
    keeper, slow = AsyncWriter(60.0), Slow()
    for begun in (False, True):
        assert keeper.busy == begun and not keeper.failed
        keeper.raise_failure()
        if not begun:
            keeper.wait()
            keeper.begin(slow, "a commit")
            until(lambda: slow.begun == 1)
    slow.go.set()
    keeper.wait()
    assert not keeper.busy and not keeper.failed


def test_a_commit_begins_when_the_one_before_is_written() -> None:
    keeper, first, done = AsyncWriter(60.0), Slow(), list[str]()
    keeper.begin(first, "a commit")
    second = threading.Thread(target=lambda: keeper.begin(lambda: done.append("second"), "another"))
    second.start()
    until(lambda: first.begun == 1)
    second.join(0.05)
    assert second.is_alive() and done == []
    first.go.set()
    second.join(60)
    keeper.wait()
    assert done == ["second"]


def test_a_store_that_is_away_for_a_while_is_tried_again_and_nobody_is_stopped() -> None:
    lines: list[str] = []
    keeper = AsyncWriter(60.0, lines.append)
    away = Unavailable("the disk is full.")
    keeper.begin(failing(away, away, away), "a commit")
    keeper.wait()
    assert not keeper.failed
    assert len(lines) == 1 and lines[0].startswith("the disk is full. Trying again for ")


@HEAR
def test_a_store_that_stays_away_stops_the_training_and_the_run_can_go_on_later(
    hear: Callable[[AsyncWriter], None],
) -> None:
    keeper = AsyncWriter(0.02, lambda line: None)
    keeper.begin(failing(*[Unavailable("the disk is full.")] * 100_000), "commit 7")
    until(lambda: keeper.failed)
    assert not keeper.busy
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            hear(keeper)
        assert str(caught.value).startswith(f"{REFUSED}the disk is full. Given up on commit 7 after ")
        assert caught.value.resumable


@pytest.mark.parametrize(
    ("patience", "error"),
    [
        (60.0, Rejected("no right to write here.")),
        (60.0, UserError("this launch no longer holds it.")),
        (0.0, Unavailable("the server is away.")),
    ],
)
def test_what_time_does_not_put_right_or_nobody_waits_for_is_said_at_once(patience: float, error: UserError) -> None:
    keeper = AsyncWriter(patience, pytest.fail)
    keeper.begin(failing(error), "a commit")
    until(lambda: keeper.failed)
    with pytest.raises(UserError) as caught:
        keeper.raise_failure()
    assert str(caught.value) == f"{REFUSED}{error}"
    assert caught.value.resumable == isinstance(error, Unavailable)
    assert patience == 0 or caught.value.__cause__ is error


@HEAR
@pytest.mark.parametrize("error", [KeyError("a slip of ours"), AssertionError("a guarantee"), MemoryError()])
def test_what_nobody_foresaw_surfaces_as_itself(error: Exception, hear: Callable[[AsyncWriter], None]) -> None:
    keeper = AsyncWriter(60.0)
    keeper.begin(failing(error), "a commit")
    until(lambda: keeper.failed)
    with pytest.raises(type(error)) as caught:
        hear(keeper)
    assert caught.value is error


def test_who_leaves_anyway_gives_a_commit_some_time_and_does_not_ask_how_it_ended() -> None:
    keeper, slow = AsyncWriter(60.0), Slow()
    keeper.wait_at_most(60)
    keeper.begin(slow, "a commit")
    keeper.wait_at_most(0.01)
    assert keeper.busy
    slow.go.set()
    keeper.wait_at_most(60)
    assert not keeper.busy
    keeper.begin(failing(Rejected("no right to write here.")), "a commit")
    keeper.wait_at_most(60)
    assert keeper.failed


HANGING = """
import sys, threading
from mirl_dist.storage.async_writer import AsyncWriter

keeper, begun = AsyncWriter(900.0), threading.Event()

def work():
    begun.set()
    threading.Event().wait()

keeper.begin(work, "a commit")
begun.wait()
print("busy" if keeper.busy else "idle", flush=True)
sys.exit(75)
"""


def test_a_process_whose_commit_hangs_can_end() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "busy\n", "")
