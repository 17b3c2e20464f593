"""What a person sees while work goes on: bars on a terminal, plain lines without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance: TypeAlias = Callable[[int, str], None]
"""(units done so far, a short note)."""

_LINE_EVERY_SECONDS = 10.0


def say(line: str) -> None:
    """One plain line on standard output, at once."""
    print(line, flush=True)


@contextmanager
def bar(what: str, total: int, *, start: int = 0, shown: bool = True) -> Iterator[Advance]:
    """A progress bar of `total` units, or a line every ten seconds where standard error is no terminal."""
    if not shown:
        yield lambda done, note: None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=total, completed=start, note="")
            yield lambda done, note: progress.update(task, completed=done, note=note)
    else:
        yield _lines(what, total)


@contextmanager
def bars() -> Iterator[Callable[[int, int, str], None]]:
    """Bars for work in phases: (units done, units in all, phase); a new phase begins a new bar."""
    with ExitStack() as open_bars:
        now: dict[str, Advance] = {}

        def advance(done: int, total: int, what: str) -> None:
            if what not in now:
                open_bars.close()
                now.clear()
                now[what] = open_bars.enter_context(bar(what, total))
            now[what](done, "")

        yield advance


def _lines(what: str, total: int) -> Advance:
    last = [time.monotonic()]

    def advance(done: int, note: str) -> None:
        now = time.monotonic()
        if done >= total or now - last[0] >= _LINE_EVERY_SECONDS:
            last[0] = now
            say(f"{what}: {done}/{total} {note}".rstrip())

    return advance
