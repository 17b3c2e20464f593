"""The door to MLflow: one parent run per run, one nested run per round, and no mishap there stops training.

Everything goes into an outbox first, and leaves it in order when the store has it. Delivering twice changes
nothing: points keep the time of their making (by which the store knows them), runs are found again by id or
tag, files are overwritten. So neither a restart nor an answer lost on the way leaves a point twice.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from mirl_dist import outbox
from mirl_dist.mlflow_store import Store, import_quietly
from mirl_dist.outbox import Item, Outbox, flat, legal_name, masked, shown

STEPS_PER_DELIVERY, SECONDS_PER_DELIVERY = 50, 5.0

_log = logging.getLogger("mirl_dist.tracking")


class Tracker(Protocol):
    """What a story tells of its run: `Mlflow` on rank 0, `Silent` on the others; methods as in `Mlflow`."""

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None: ...
    def begin_round(self, round_: int, tags: Mapping[str, str]) -> int: ...
    def log_step(self, step: int, values: Mapping[str, float]) -> None: ...
    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None: ...
    def log_file(self, name: str, data: bytes, where: str) -> None: ...
    def flush(self) -> None: ...
    def end_round(self, status: str = "FINISHED") -> None: ...
    def end_run(self, status: str = "FINISHED") -> None: ...
    def address(self) -> str: ...


class Silent:
    """The twin that does nothing: for ranks other than 0, and for tracking switched off."""

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None: ...
    def begin_round(self, round_: int, tags: Mapping[str, str]) -> int:
        return -1

    def log_step(self, step: int, values: Mapping[str, float]) -> None: ...
    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None: ...
    def log_file(self, name: str, data: bytes, where: str) -> None: ...
    def flush(self) -> None: ...
    def end_round(self, status: str = "FINISHED") -> None: ...
    def end_run(self, status: str = "FINISHED") -> None: ...

    def address(self) -> str:
        return ""


class Mlflow:
    """A run as MLflow shows it, reopened by id after a restart and without any point twice.

    uri: tracking URI; None means MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory.
    remembered, remember: ids that the caller keeps over restarts ("run", "round/03", and "key", by which a
    run is found whose id got lost); `remember` gets new ones as soon as they exist.
    A store that is away or refuses raises nothing: one warning per outage, logger "mirl_dist.tracking".
    Raises Fault for a URI that MLflow refuses, and when MLflow is not installed.
    """

    def __init__(
        self,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        remembered: Mapping[str, str],
        remember: Callable[[dict[str, str]], None],
    ) -> None:
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        import_quietly(self._uri)
        self._run_name = run_name
        self._store = Store(self._uri, experiment, dict(remembered), remember)
        self._outbox = Outbox(self._store)
        self._round, self._begun = "", set[str]()
        self._steps_waiting, self._waiting_since = 0, 0.0

    def begin_run(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the parent run; nested params become 'a.b', long values are cut, passwords in URLs masked.

        A param that differs after a restart stays; its new value becomes the tag 'changed.<name>'.
        """
        self._begin("run", self._run_name, tags)
        long = outbox.LONGEST_PARAM
        texts = [(legal_name(n), masked(text, self._uri)[:long]) for n, text in flat(params).items()]
        for start in range(0, len(texts), outbox.PARAMS_PER_CALL):
            some = dict(texts[start : start + outbox.PARAMS_PER_CALL])
            self._outbox.put(Item("params", "run", texts=some))
        self._deliver(at_once=True)

    def begin_round(self, round_: int, tags: Mapping[str, str]) -> int:
        """Open the nested run 'round 03' and return the last step it holds; points up to it are not resent.

        Returns -1 for a run without points, or while the store is away (they are sorted out on delivery).
        """
        self._round = f"round/{round_:02d}"
        self._begin(self._round, f"round {round_:02d}", tags)
        self._deliver(at_once=True)
        reached = self._store.reached.get(self._round)
        return reached.last if reached else -1

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Write down the values of one optimiser step; delivered when 50 steps or 5 seconds have gathered.

        Values that are not finite are left out.
        """
        assert self._round, "begin_round comes first"
        self._outbox.put_points("points", self._round, [(n, value, step) for n, value in values.items()])
        if self._steps_waiting == 0:
            self._waiting_since = time.monotonic()
        self._steps_waiting += 1
        old = time.monotonic() - self._waiting_since >= SECONDS_PER_DELIVERY
        if old or self._steps_waiting >= STEPS_PER_DELIVERY:
            self.flush()

    def log_ticket(self, round_: int, values: Mapping[str, float]) -> None:
        """Write down what a begun round came to: twice is once. Names must differ from those of log_step.

        All go to the nested run, and those not under 'weights/density/' to the parent too, at step = round; the
        parent also gets its scores ('psnr/...', 'ssim/...') as 'by_alive/<name>' at step = values['alive_weights'].
        """
        where = f"round/{round_:02d}"
        assert where in self._begun, "begin_round comes first"
        self._outbox.put_points("ticket", where, [(name, value, round_) for name, value in values.items()])
        summary = {name: value for name, value in values.items() if not name.startswith("weights/density/")}
        points = [(name, value, round_) for name, value in summary.items()]
        alive = summary.get("alive_weights", math.nan)
        if math.isfinite(alive):
            scores = {name: value for name, value in summary.items() if name.startswith(("psnr/", "ssim/"))}
            points += [(f"by_alive/{name}", value, int(alive)) for name, value in scores.items()]
        self._outbox.put_points("ticket", "run", points)
        self.flush()

    def log_file(self, name: str, data: bytes, where: str) -> None:
        """Keep a file ('folder/name', a relative path) with the current 'round' or with the whole 'run'."""
        path = PurePosixPath(name)
        assert where in ("round", "run") and path.name and not path.is_absolute() and ".." not in path.parts
        self._outbox.put(Item("file", self._round if where == "round" else "run", str(path), data=data))
        self.flush()

    def flush(self) -> None:
        """Deliver what waits, unless the store failed a moment ago."""
        self._deliver(at_once=False)

    def end_round(self, status: str = "FINISHED") -> None:
        """Close the nested run of the current round, if one is open, as FINISHED, FAILED or KILLED."""
        if self._round:
            self._outbox.put(Item("end", self._round, status))
            self._round = ""
            self.flush()

    def end_run(self, status: str = "FINISHED") -> None:
        """Close the parent run as FINISHED, FAILED or KILLED, and try once more to deliver what waits."""
        self._outbox.put(Item("end", "run", status))
        self._deliver(at_once=True)
        if self._outbox.items:
            _log.warning("the run ends while %s for %s: lost to MLflow only", self._outbox, shown(self._uri))

    def address(self) -> str:
        """Where people find the run: its page, or the command that opens the store; never a password."""
        clean, run = shown(self._uri), self._store.reached.get("run")
        if not clean.startswith("http"):
            return f"{clean} (to see it: {_mlflow_here()} ui --backend-store-uri {clean})"
        page = f"{clean.rstrip('/')}/#/experiments/{self._store.experiment_id}/runs/"
        return page + run.id if run else clean

    def _begin(self, where: str, name: str, tags: Mapping[str, str]) -> None:
        texts = {legal_name(t): masked(text, self._uri)[: outbox.LONGEST_TAG] for t, text in tags.items()}
        self._outbox.put(Item("open", where, name, texts))
        self._begun.add(where)

    def _deliver(self, *, at_once: bool) -> None:
        self._steps_waiting = 0
        self._outbox.deliver(at_once=at_once)


def _mlflow_here() -> str:
    """How to call this environment's mlflow: by its path below the working directory, where it lies there."""
    beside = Path(sys.executable).parent / "mlflow"
    try:
        return str(beside.relative_to(Path.cwd())) if beside.exists() else "mlflow"
    except ValueError:
        return "mlflow"
