"""What users and other programs rely on, compared with a record: commands, keys of configs, files of runs, exit codes.

The record lies in tests/golden. A change that is meant is recorded by

    MIRL_RENEW_GOLDEN=1 pytest tests/cli/test_golden.py

and seen in the diff. Only what is the same on every machine is recorded, and no name of a module or class.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import typer
import yaml
from pydantic import BaseModel
from safetensors import safe_open

from mirl_dist.cli.app import app
from mirl_dist.cli.sweep.spec import Sweep
from mirl_dist.config.config import Config
from mirl_dist.data.building.recipe import Recipe
from mirl_dist.distributed.launch import launch_file
from tests.services.lab import ROOT, Lab

GOLDEN = ROOT / "tests" / "golden"
FILES = {
    "bad.launch.yaml": "{num_processes: 2, distributed_type: DEEPSPEED, mixed_precision: bf16, colour: red}",
    "bad.recipe.yaml": "{name: bad, colour: red, train: [{set: s, kind: derain, clean: {folder: nowhere}}]}",
    "bad.sweep.yaml": "{config: good.yaml, folder: s, seeds: [0, 0], methods: {a/b: {}}, sbatch: [x], colour: red}",
    "bad.yaml": "{prune: {fracton: 0.2, per: row}, batch: {global: 0}, optimiser: {lr: fast}, train: {epochs: 3}}",
    "empty.yaml": "",
    "gone.recipe.yaml": "{name: gone, train: [{set: s, kind: clean, clean: {folder: nowhere}}]}",
    "list.yaml": "[1, 2]",
    "method.sweep.yaml": "{config: good.yaml, folder: s, seeds: [0], methods: {a: {prune.fracton: 1}, b: {}}}",
    "picture.png": "not a picture",
    "sweep.yaml": "{config: good.yaml, folder: s, seeds: [0, 1], methods: {a: {}, b: {prune.criterion: random}}}",
    "text.ckpt": "not a checkpoint",
    "twice.yaml": "{run: {seed: 1}, run: {seed: 2}}",
}
"""Beside these, and the tiny config as good.yaml, the recorded command lines are called."""


def recorded(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def compare(name: str, record: Mapping[str, Any]) -> None:
    """Fail where `record` is not the recorded one; or record it, when that is asked for."""
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    if os.environ.get("MIRL_RENEW_GOLDEN"):
        (GOLDEN / f"{name}.json").write_text(text)
    assert json.loads(text) == recorded(name), "if this is meant: MIRL_RENEW_GOLDEN=1 pytest tests/cli/test_golden.py"


def type_name(annotation: Any) -> str:
    """A type without the names of modules and of our own classes."""
    if inspect.isclass(annotation) and get_origin(annotation) is None and not issubclass(annotation, BaseModel):
        return annotation.__name__
    text = re.sub(r"<class '([^']*)'>", r"\1", repr(annotation))
    return re.sub(r"\b([A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", re.sub(r"\bmirl_dist\.[\w.]+", "section", text))


# -- commands -------------------------------------------------------------------------------------------------------


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command by its path, with its help and its parameters."""
    types = get_type_hints(inspect.unwrap(command.callback)) if command.callback else {}
    parameters = {}
    for one in command.params:
        words = ("required", "multiple", "min", "max", "help")
        values = {word: getattr(one, word) for word in words if getattr(one, word, None)}
        values |= {"default": one.default} if isinstance(one.default, (str, int, float)) else {}
        values |= {"type": type_name(types[one.name])} if one.name in types else {}
        parameters[" ".join([*one.opts, *one.secondary_opts])] = values
    yield path, {"help": command.help, "parameters": parameters}
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


def test_commands_have_the_options_defaults_and_help_of_the_record() -> None:
    compare("commands", dict(commands(typer.main.get_command(app), "mirl-dist")))


# -- configs --------------------------------------------------------------------------------------------------------


def keys(tree: type[BaseModel], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with type, limits and default; whether a key may be missing from a run's fingerprint."""
    for name, field in tree.model_fields.items():
        key, default = above + (field.alias or name), field.get_default(call_default_factory=True)
        sections = list(sections_in(field.annotation))
        marks = [one for one in field.metadata if type(one).__module__.startswith("mirl_dist.")]
        values: dict[str, Any] = {"required": True} if field.is_required() else {}
        values |= {"outside fingerprint": True} if marks else {}
        if not sections:
            limits = [repr(one) for one in field.metadata if one not in marks]
            values |= {"type": type_name(field.annotation)} | ({"limits": limits} if limits else {})
            values |= {} if field.is_required() else {"default": repr(default)}
        if values:
            yield key, values
        for section in sections:
            yield from keys(section, f"{key}[]." if get_origin(field.annotation) is tuple else f"{key}.")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def test_keys_of_yaml_files_and_fingerprints_of_configs_are_those_of_the_record() -> None:
    trees = {"config": Config, "launch file": launch_file._AccelerateConfig, "recipe": Recipe, "sweep": Sweep}
    files = {file.name: yaml.safe_load(file.read_text()) for file in sorted((ROOT / "configs").glob("*.yaml"))}
    fingerprints = {name: Config.model_validate(tree).fingerprint() for name, tree in files.items()}
    compare("config", {name: dict(keys(tree)) for name, tree in trees.items()} | {"fingerprints": fingerprints})


# -- the folder of a run --------------------------------------------------------------------------------------------


def key_paths(value: Any, names: Collection[str], above: str = "") -> set[str]:
    """Every path of keys: [] for the items of a list, * for a tensor's name and for a digest."""
    if not value or not isinstance(value, (list, dict)):
        return {above}
    if isinstance(value, list):
        return {path for inner in value for path in key_paths(inner, names, f"{above}[]")}
    general = {key: "*" if key in names or re.fullmatch("[0-9a-f]{16,}", key) else key for key in value}
    return {path for key, inner in value.items() for path in key_paths(inner, names, f"{above}.{general[key]}")}


def tensors(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in parts.items()}


def contents(file: Path, names: Collection[str]) -> Any:
    """What programs that read a file look for. What is written in time (heartbeats, logs) counts as a file alone."""
    if file.suffix == ".json" and not file.name.endswith(".beat.json"):
        return sorted(key_paths(json.loads(file.read_bytes()), names))
    if file.suffix == ".csv":
        return file.read_text().splitlines()[0]
    if file.suffix == ".safetensors":
        shapes = tensors(file)
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()
        return {"tensors": len(shapes), "digest of names, dtypes and shapes": digest}
    return "a file"


def test_a_run_leaves_the_files_and_keys_of_the_record(reference: Path) -> None:
    files = [file for file in sorted(reference.rglob("*")) if file.is_file() and "rounds/02" not in str(file)]
    names = tensors(reference / "initial.safetensors").keys()
    compare("run_folder", {str(file.relative_to(reference)): contents(file, names) for file in files})


# -- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_commands_end_with_the_exit_codes_of_the_record(lab: Lab, reference: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "empty").mkdir(parents=True)
    for name, text in FILES.items():
        (work / name).write_text(text)
    lab.config(work).rename(work / "good.yaml")
    shutil.copy(ROOT / "launch/cpu_two.yaml", work / "launch.yaml")
    shutil.copytree(reference, work / "run")
    ends = {}
    for line in recorded("exit_codes"):
        ended = lab.mirl(*shlex.split(line), cwd=work)
        assert "Traceback" not in ended.err, f"{line}\n{ended.said()}"
        ends[line] = ended.rc
    compare("exit_codes", ends)
