"""The one error type for a user's mistake: shown as one line, never as a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right.

    The text has three parts: what was found, where, and what to do instead. The command line prints it and
    exits with code 2. `everywhere` is true when every rank raises the same text at the same place (rank 0
    alone prints it then); otherwise the rank that met the fault prints it with its own number. `resumable` is true when
    time alone may put it right (a server that is away): the command then exits with code 75.
    """

    resumable = False

    def __init__(self, text: str, *, everywhere: bool = False, resumable: bool | None = None) -> None:
        super().__init__(text)
        self.everywhere = everywhere
        if resumable is not None:
            self.resumable = resumable


class Stopped(Exception):
    """The run was asked to stop, has committed, and can be resumed: exit code 75."""
