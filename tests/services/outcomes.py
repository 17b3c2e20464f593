"""What a test expects of a command that has ended."""

from __future__ import annotations

from tests.services.lab import Ended


def expect(codes: int | tuple[int, ...], ended: Ended, *texts: str) -> Ended:
    """Check the code that a launcher passes on, or those of all processes, and that they print these texts."""
    assert codes == (ended.rc if isinstance(codes, int) else ended.codes), ended.said()
    for text in texts:
        assert text in ended.out + ended.err, ended.said()
    return ended
