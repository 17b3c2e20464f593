"""Progress display: bars on a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mirl_dist.observability.console import NOTE, note, say

__all__ = ["Advance", "Bars", "bar", "say"]

Advance: TypeAlias = Callable[[int, str], None]
"""(units done so far, a short note)."""

_LINE_EVERY_SECONDS = 10.0


@contextmanager
def bar(what: str, total: int, *, start: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Show a progress bar of `total` units, or a line every ten seconds if standard error is not a terminal.

    The lines also go to this rank's log, even if not `shown`.
    """
    advance_log = _every_ten_seconds(what, total, note)
    if not shown:
        yield advance_log
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=total, completed=start, note="")

            def advance(done: int, text: str) -> None:
                progress.update(task, completed=done, note=text)
                advance_log(done, text)

            yield advance
    else:
        yield _every_ten_seconds(what, total, lambda line: say(line, NOTE))


class Bars:
    """Progress bars for work in phases. Call it with (units done, total units, phase); each new phase opens a bar."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._now: dict[str, Advance] = {}

    def __call__(self, done: int, total: int, what: str) -> None:
        if what not in self._now:
            self._open.close()
            self._now = {what: self._open.enter_context(bar(what, total))}
        self._now[what](done, "")

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _every_ten_seconds(what: str, total: int, take: Callable[[str], None]) -> Advance:
    last = [time.monotonic()]

    def advance(done: int, text: str) -> None:
        now = time.monotonic()
        if done >= total or now - last[0] >= _LINE_EVERY_SECONDS:
            last[0] = now
            take(f"{what}: {done}/{total} {text}".rstrip())

    return advance
