"""The typed tree of a sweep, methods x seeds; its runs, and their commands.

Nothing here asks a store or starts a process.
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
    """The comparison at the end, as of `tickets compare`."""

    out: str | None = Field(None, min_length=1)
    """A folder for table, LaTeX and page. Null: `report` beside the logs."""
    title: str | None = None
    """Null: the sweep's name."""
    experiment: str | None = None
    """Also log the files to this MLflow experiment."""
    pictures: bool = True
    """Whether the page shows restored images."""


class Sweep(Node):
    config: str = Field(min_length=1)
    """The config that all runs begin with."""
    folder: str = Field(min_length=1)
    """The runs are <folder>/<method>-seed<seed>: a folder, or s3://bucket/prefix."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> what differs from the config, as for --set; {} for nothing."""
    seeds: tuple[Seed, ...] = Field(min_length=1)
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    """What differs from the config in all runs; a method may say otherwise."""
    launch: str | None = None
    """How each run is started: a file from launch/, or 'auto'. Null: one process, on a GPU where there is one."""
    slots: PositiveInt = 1
    """Runs at once. On one machine they share its GPUs and processors evenly."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch for --submit slurm, for example --gpus-per-node=1."""
    compare: Compare = Compare()

    def inconsistencies(self) -> list[str]:
        problems = []
        for name in self.methods:
            if not _NAME.fullmatch(name):
                problems.append(
                    f"methods: found the name '{name}', which becomes part of a folder's: use letters, digits, . _ -"
                )
        lower = [name.lower() for name in self.methods]
        problems += [
            f"methods: found '{name}' and another that differs in capitals alone; not every disk tells them apart"
            for name in self.methods
            if lower.count(name.lower()) > 1
        ]
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds: found {list(self.seeds)}; name each once")
        problems += [
            f"sbatch: found '{option}'; write --option=value, each by itself"
            for option in self.sbatch
            if not option.startswith("--")
        ]
        kind, address, _ = self.folder.partition("://")
        bucket = re.match(r"s3:/+(?=[^/])", self.folder)
        if bucket and bucket[0] != "s3://" and not re.search("[@?#]", self.folder):
            problems.append(f"folder: found {self.folder}; write s3://{self.folder[bucket.end() :]}")
        elif address and kind != "s3":
            problems.append(f"folder: found {kind}://; runs are kept in folders and under s3://bucket/prefix")
        for place, changes in [
            ("set", self.set_),
            *((f"methods.{name}", changes) for name, changes in self.methods.items()),
        ]:
            keys = [key for key, _ in _flatten(changes)]
            problems += [
                f"{place}: found {key} twice; write it once" for key in sorted(set(keys)) if keys.count(key) > 1
            ]
            problems += [
                f"{place}: found {key}; leave it out: {why}" for key, why in _SET_BY_SWEEP.items() if key in keys
            ]
        return problems

    def local_folder(self, name: str) -> Path:
        """Where logs, lists of commands and the report are written: the folder, or sweep-logs/NAME for a bucket."""
        return Path("sweep-logs", name) if "://" in self.folder else Path(self.folder).expanduser()


class SweepRun(NamedTuple):
    """One run of a sweep. name: '<method>-seed<seed>'; sets: its --set assignments; config: what they make."""

    name: str
    method: str
    seed: int
    folder: str
    sets: tuple[str, ...]
    config: Config


class SweepPlan(NamedTuple):
    """A sweep and its runs: all methods of the first seed first. name: that of its file; local: `Sweep.local`."""

    name: str
    sweep: Sweep
    runs: tuple[SweepRun, ...]
    local_folder: Path

    def log(self, run: SweepRun) -> Path:
        return self.local_folder / f"{run.name}.log"


def read(path: Path, sets: Sequence[str] = ()) -> SweepPlan:
    """A sweep and all its runs. Raises UserError with every complaint about the sweep, or about any of its runs."""
    sweep = yaml_loader.read(Sweep, path, sets, "configs/sweeps/demo.yaml", "a sweep")
    return SweepPlan(path.stem, sweep, expand(sweep, path.stem, str(path)), sweep.local_folder(path.stem))


def expand(sweep: Sweep, name: str, source: str) -> tuple[SweepRun, ...]:
    """The runs of a sweep. Raises UserError naming what is wrong in which method, and methods that are the same."""
    base, runs = yaml_loader.load_file(Path(sweep.config)), []
    complaints: dict[str, list[str]] = {}
    for seed in sweep.seeds:
        for method, changes in sweep.methods.items():
            run = f"{method}-seed{seed}"
            folder = f"{sweep.folder.rstrip('/') or '/'}/{run}"
            own = {"run.seed": seed, "run.folder": folder, "tracking.run_name": f"{name}/{run}"}
            own["tracking.tags"] = {"sweep": name}
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
    raise_complaints(lines, source)
    return tuple(runs)


def raise_complaints(complaints: Sequence[str], source: str) -> None:
    """Raise UserError where there are complaints about runs."""
    if complaints:
        count = f"{len(complaints)} faults" if len(complaints) > 1 else "a fault"
        raise UserError(
            f"{count} in the runs of {source}; nothing was started:\n" + "\n".join(f"  {c}" for c in complaints)
        )


def _duplicate_methods(runs: Sequence[SweepRun]) -> list[str]:
    """Find methods that mean the very same run, each with the one before it."""
    seen: dict[str, str] = {}
    problems = []
    for run in runs:
        tree = run.config.dump()
        for section, key in (own.split(".") for own in _SET_BY_SWEEP):
            del tree[section][key]
        first = seen.setdefault(json.dumps(tree, sort_keys=True), run.method)
        if first != run.method:
            problems.append(
                f"{first}, {run.method}: these are the same config; remove one, or set what tells them apart"
            )
    return problems


# -- commands ---------------------------------------------------------------------------------------------------------


def _flatten(changes: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values as --set takes them: a section written as a mapping changes the keys in it, and no others."""
    for key, value in changes.items():
        if isinstance(value, dict) and _is_section(f"{above}{key}"):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _is_section(key: str) -> bool:
    here: Any = Config
    for part in key.split("."):
        fields = {field.alias or name: field.annotation for name, field in here.model_fields.items()}
        here = fields.get(part)
        if not (isinstance(here, type) and issubclass(here, Node)):
            return False
    return True


def assignment(key: str, value: Any) -> str:
    """`key=value` in one line that --set reads as the same value."""

    def text(style: str | None) -> str:
        dumped = yaml.safe_dump(
            value,
            default_flow_style=True,
            default_style=style,
            width=math.inf,
            allow_unicode=True,
            sort_keys=False,
        )
        return str(dumped).removesuffix("\n").removesuffix("\n...")

    plain = text(None)
    one_line = plain if len(plain.splitlines()) < 2 else text('"')  # quoted, lines break by escapes alone
    return f"{key}={one_line}"


def arguments(plan: SweepPlan, run: SweepRun) -> list[str]:
    """What comes after `mirl-dist`."""
    launch = [] if plan.sweep.launch is None else ["--launch", plan.sweep.launch]
    return ["train", plan.sweep.config, *launch, *(text for one in run.sets for text in ("--set", one))]


def command_line(plan: SweepPlan, run: SweepRun) -> str:
    """The command of a run, to be pasted into a shell."""
    return shlex.join(["mirl-dist", *arguments(plan, run)])


def share_devices(devices: Sequence[str], slots: int) -> list[tuple[str, ...]]:
    """The GPUs of each slot: as many for each, none in two; where there are fewer than slots, one for each by turns."""
    each = len(devices) // slots
    if not devices or each:
        return [tuple(devices[each * slot : each * (slot + 1)]) for slot in range(slots)]
    return [(devices[slot % len(devices)],) for slot in range(slots)]
