"""State of a run's MLflow runs: their ids over restarts, and the records that opened them. Does not import mlflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mirl_dist.observability.mlflow.records import Record


@dataclass
class RemoteRun:
    """Known contents of a run in the store, updated when it is opened and after each delivery."""

    id: str
    params: dict[str, str]
    steps: dict[str, int]  # latest step of each curve


class RunIds:
    """MLflow's ids of a run and its rounds ("run", "round/03"), kept over restarts, and the key to find lost runs.

    remembered: ids passed to `remember` by earlier processes. key: this run's key, unless an earlier process set one.
    remember: saves new ids before they are used; if it raises UserError, it is called again later.
    """

    def __init__(self, remembered: Mapping[str, str], key: str, remember: Callable[[dict[str, str]], None]) -> None:
        self._ids, self._key, self._remember = dict(remembered), key, remember

    def get(self, run_key: str) -> str | None:
        return self._ids.get(run_key)

    def key_of(self, run_key: str) -> str:
        """Return the value of the tag by which a run is found. Raise UserError while the key cannot be saved."""
        self.keep("key", self._ids.get("key", self._key))
        return f"{self._ids['key']}/{run_key}"

    def keep(self, name: str, id_: str) -> None:
        """Save an id if it is new. Raise UserError if that fails."""
        if self._ids.get(name) != id_:
            self._remember({name: id_})
            self._ids[name] = id_

    def forget(self, run_key: str) -> None:
        del self._ids[run_key]


class RunHistory:
    """Records with which this process opened runs, to recreate runs that the store lost.

    opened: record per run. created: number of creation requests per run.
    """

    def __init__(self) -> None:
        self.opened: dict[str, Record] = {}
        self.created = Counter[str]()
        self._params: dict[str, Record] = {}

    def note(self, record: Record) -> None:
        if record.kind == "open":
            self.opened[record.run_key] = record
        elif record.kind == "params":
            self._params[record.id] = record

    def params_of(self, run_key: str) -> list[Record]:
        return [params for params in self._params.values() if params.run_key == run_key]
