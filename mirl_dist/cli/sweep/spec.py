"""The typed config of a sweep (methods x seeds), its runs, and their commands.

This module accesses no store and starts no process.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, PositiveInt

from mirl_dist.config import yaml_loader
from mirl_dist.config.config import Config
from mirl_dist.config.local_paths import expand_home
from mirl_dist.config.schema import Seed
from mirl_dist.config.yaml_loader import Node
from mirl_dist.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SET_BY_SWEEP = {
    "run.folder": "each run gets a folder below the sweep's",
    "run.seed": "write seeds",
    "tracking.run_name": "each run is named after sweep, method and seed",
    "tracking.tags": "each run is tagged with its sweep",
}


class Compare(Node):
    """The comparison after the last run, as by `tickets compare`."""

    out: str | None = Field(None, min_length=1)
    """Folder for the table, LaTeX and page. Null: `report` next to the logs."""
    title: str | None = None
    """Null: the sweep's name."""
    experiment: str | None = None
    """Also log the files to this MLflow experiment."""
    pictures: bool = True
    """Whether the page shows restored images."""


class Sweep(Node):
    config: str = Field(min_length=1)
    """The base config of all runs."""
    folder: str = Field(min_length=1)
    """A folder, or s3://bucket/prefix; each run is in <folder>/<method>-seed<seed>."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """Method name -> changes to the config, as for --set; {} for none."""
    seeds: tuple[Seed, ...] = Field(min_length=1)
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Changes to the config in all runs; methods override them."""
    launch: str | None = None
    """Launch file of each run, or 'auto'. Null: one process, on a GPU if available."""
    slots: PositiveInt = 1
    """Number of concurrent runs. On one machine they share its GPUs and processors evenly."""
    sbatch: tuple[str, ...] = ()
    """Additional sbatch options for --submit slurm, for example --gpus-per-node=1."""
    compare: Compare = Compare()

    def inconsistencies(self) -> Iterator[str]:
        lower = [name.lower() for name in self.methods]
        for name in self.methods:
            if not _NAME.fullmatch(name):
                yield f"methods: found the name '{name}', which becomes part of a folder's: use letters, digits, . _ -"
            if lower.count(name.lower()) > 1:
                text = f"methods: found '{name}' and another that differs only in case"
                yield f"{text}; some file systems do not distinguish them"
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: found {list(self.seeds)}; name each once"
        for option in self.sbatch:
            if not option.startswith("--"):
                yield f"sbatch: found '{option}'; write each option as its own entry, --option=value"
        kind, address, _ = self.folder.partition("://")
        bucket = re.match(r"s3:/+(?=[^/])", self.folder)
        if bucket and bucket[0] != "s3://" and not re.search("[@?#]", self.folder):
            yield f"folder: found {self.folder}; write s3://{self.folder[bucket.end() :]}"
        elif address and kind != "s3":
            yield f"folder: found {kind}://; a run is stored in a folder or under s3://bucket/prefix"
        changes = {"set": self.set_} | {f"methods.{name}": changes for name, changes in self.methods.items()}
        for place, change in changes.items():
            keys = [key for key, _ in _flatten(change)]
            for key in sorted(set(keys)):
                if keys.count(key) > 1:
                    yield f"{place}: found {key} twice; write it once"
                if key in _SET_BY_SWEEP:
                    yield f"{place}: found {key}; leave it out: {_SET_BY_SWEEP[key]}"


class SweepRun(NamedTuple):
    """One run of a sweep. name: '<method>-seed<seed>'. sets: its --set assignments. config: the resulting config."""

    name: str
    method: str
    seed: int
    folder: str
    sets: tuple[str, ...]
    config: Config


class SweepPlan(NamedTuple):
    """A sweep and its runs, ordered by seed, then method. name: stem of its file. report_folder: of the comparison."""

    name: str
    sweep: Sweep
    runs: tuple[SweepRun, ...]

    @property
    def local_folder(self) -> Path:
        """The folder for logs, command lists and the report: `folder`, or sweep-logs/NAME for a bucket."""
        address = self.sweep.folder
        return Path("sweep-logs", self.name) if "://" in address else expand_home(address)

    @property
    def report_folder(self) -> Path:
        return self.local_folder / "report" if self.sweep.compare.out is None else Path(self.sweep.compare.out)

    def log(self, run: SweepRun) -> Path:
        return self.local_folder / f"{run.name}.log"


def read(path: Path, sets: Sequence[str] = ()) -> SweepPlan:
    """Read a sweep and all its runs. Raises UserError with all complaints about the sweep or about its runs."""
    sweep = yaml_loader.read(Sweep, path, sets, "configs/sweeps/demo.yaml", "a sweep")
    return SweepPlan(path.stem, sweep, expand(sweep, path.stem, str(path)))


def expand(sweep: Sweep, name: str, source: str) -> tuple[SweepRun, ...]:
    """Return the runs of a sweep. Raises UserError with the complaints about each method, and duplicate methods."""
    base, runs = yaml_loader.load_file(Path(sweep.config)), []
    complaints: dict[str, list[str]] = {}
    for seed in sweep.seeds:
        for method, changes in sweep.methods.items():
            run = f"{method}-seed{seed}"
            folder = f"{sweep.folder.rstrip('/') or '/'}/{run}"
            own = {"run.seed": seed, "run.folder": folder}
            own |= {"tracking.run_name": f"{name}/{run}", "tracking.tags": {"sweep": name}}
            sets = tuple(assignment(key, value) for part in (sweep.set_, changes, own) for key, value in _flatten(part))
            tree = copy.deepcopy(base)
            try:
                for assigned in sets:
                    yaml_loader.apply_set(tree, assigned)
                runs.append(SweepRun(run, method, seed, folder, sets, yaml_loader.build(Config, tree, source)))
            except UserError as fault:
                for complaint in str(fault).split("\n  ")[1:] or [str(fault)]:
                    methods = complaints.setdefault(complaint, [])
                    methods += [] if method in methods else [method]
    every = list(sweep.methods)
    lines = [f"{'all methods' if m == every else ', '.join(m)}: {text}" for text, m in complaints.items()]
    lines += _duplicate_methods([run for run in runs if run.seed == sweep.seeds[0]])
    yaml_loader.raise_complaints(lines, f"in the runs of {source}; nothing was started")
    return tuple(runs)


def _duplicate_methods(runs: Sequence[SweepRun]) -> Iterator[str]:
    """Yield complaints about methods that have identical runs, each with the earlier method."""
    seen: dict[str, str] = {}
    for run in runs:
        tree = run.config.dump()
        for section, key in (own.split(".") for own in _SET_BY_SWEEP):
            del tree[section][key]
        first = seen.setdefault(json.dumps(tree, sort_keys=True), run.method)
        if first != run.method:
            yield f"{first}, {run.method}: these are the same config; remove one, or make them differ"


# -- commands ---------------------------------------------------------------------------------------------------------


def _flatten(changes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys and values as for --set; a section given as a mapping changes only the keys in it."""
    for key, value in changes.items():
        if isinstance(value, dict) and yaml_loader.known_keys(Config, f"{above}{key}".split(".")):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def assignment(key: str, value: Any) -> str:
    """Return `key=value` on one line, which --set parses to the same value."""

    def text(style: str | None) -> str:
        options: Any = {"default_flow_style": True, "width": math.inf, "allow_unicode": True, "sort_keys": False}
        return str(yaml.safe_dump(value, default_style=style, **options)).removesuffix("\n").removesuffix("\n...")

    plain = text(None)
    one_line = plain if len(plain.splitlines()) < 2 else text('"')  # quoting escapes line breaks
    return f"{key}={one_line}"


def arguments(plan: SweepPlan, run: SweepRun) -> list[str]:
    """Return the arguments of `mirl-dist` for a run."""
    launch = [] if plan.sweep.launch is None else ["--launch", plan.sweep.launch]
    return ["train", plan.sweep.config, *launch, *(text for one in run.sets for text in ("--set", one))]


def command_line(plan: SweepPlan, run: SweepRun) -> str:
    """Return the shell command of a run."""
    return shlex.join(["mirl-dist", *arguments(plan, run)])


def share_devices(devices: Sequence[str], slots: int) -> list[tuple[str, ...]]:
    """Return the GPUs of each slot: equally many, disjoint; with fewer GPUs than slots, one per slot, round-robin."""
    each = len(devices) // slots
    if not devices or each:
        return [tuple(devices[each * slot : each * (slot + 1)]) for slot in range(slots)]
    return [(devices[slot % len(devices)],) for slot in range(slots)]
