"""The ways in which a command ends early: an error shown in one line, never as a traceback, or a stop on request."""

from __future__ import annotations


class MirlError(ValueError):
    """What ends a command in one line: the command line prints the text and exits with code 2.

    The text has three parts: what was found, where, and what to do instead. `everywhere` is true when every rank raises
    the same text at the same place (rank 0 alone prints it then); otherwise the rank that met the error prints it with
    its own number. `resumable` is true when time alone may put it right (a server that is away): the command then exits
    with code 75.
    """

    resumable = False

    def __init__(self, text: str, *, everywhere: bool = False, resumable: bool | None = None) -> None:
        super().__init__(text)
        self.everywhere = everywhere
        if resumable is not None:
            self.resumable = resumable


class UserError(MirlError):
    """Something the user can put right: input, settings, rights, a disk."""


class InvariantError(MirlError):
    """A promise of this program does not hold: replicas disagree, a rewind is not proved. The result is not trusted."""


class Stopped(Exception):
    """The run was asked to stop, has committed, and can be resumed: exit code 75."""
