"""What is known of a run's runs in MLflow: their ids over restarts, and what was sent to open them. No MLflow here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mirl_dist.observability.mlflow.records import Record


@dataclass
class RemoteRun:
    """What the store holds of a run: noted when it was opened, and after each delivery."""

    id: str
    params: dict[str, str]
    steps: dict[str, int]  # latest step of each curve


class RunIds:
    """MLflow's ids of a run and its rounds ("run", "round/03"), kept over restarts, and the key that finds lost ones.

    remembered: what `remember` was given by earlier processes. key: for this run, unless an earlier process had one.
    remember: gets new ids before anything depends on them; may raise UserError, and is then called again later.
    """

    def __init__(self, remembered: Mapping[str, str], key: str, remember: Callable[[dict[str, str]], None]) -> None:
        self._ids, self._key, self._remember = dict(remembered), key, remember

    def get(self, run_key: str) -> str | None:
        return self._ids.get(run_key)

    def key_of(self, run_key: str) -> str:
        """The tag by which a run is found. Raises UserError while the key cannot be remembered."""
        self.keep("key", self._ids.get("key", self._key))
        return f"{self._ids['key']}/{run_key}"

    def keep(self, name: str, id_: str) -> None:
        """Remember an id, if it is new. Raises UserError where that fails."""
        if self._ids.get(name) != id_:
            self._remember({name: id_})
            self._ids[name] = id_

    def forget(self, run_key: str) -> None:
        del self._ids[run_key]


class RunHistory:
    """What this process was given to open runs with, to make them anew where a store lost them.

    opened: by run; created: how often a run's creation was asked for.
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
