"""SIGTERM and Ctrl-C: a run that trains commits and leaves; one that does not leaves where it stands."""

from __future__ import annotations

import os
import signal
import sys

RESUMABLE = 75


class StopFlag:
    """Whether SIGTERM or SIGINT came; a second SIGINT ends the process at once.

    Until `polite` is set there is nothing to commit, and the first signal ends the process with code 75. It does so by
    SystemExit, which no library takes for an error of its own and tries again.
    """

    def __init__(self) -> None:
        self.asked = False
        self.polite = False

    def __call__(self) -> bool:
        return self.asked

    def listen(self) -> StopFlag:
        """Hear the signals of this process from now on; only its main thread may ask for that."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, True
        if again and number == signal.SIGINT:
            os._exit(130)
        if not self.polite and not again:  # once: a second one must not break what the first has begun to clear up
            if os.environ.get("RANK", "0") == "0":
                said = "stopped as asked before any step was trained. Go on with --resume auto."
                print(f"mirl-dist: {said}", file=sys.stderr, flush=True)
            raise SystemExit(RESUMABLE)
