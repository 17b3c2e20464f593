"""Laws of the house: who imports whom, who alone uses a heavy thing, no code from files, sizes and names."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "mirl_dist"

# What only the named files of the package may import; pyproject.toml tells ruff the same.
DOORS = {
    "accelerate": ("distributed/*",),
    "torch.distributed": ("distributed/*",),
    "deepspeed": ("distributed/engines/deepspeed.py",),
    "webdataset": ("data/building/build.py",),
    "boto3": ("storage/s3*.py",),
    "botocore": ("storage/s3*.py",),
    "mlflow": ("observability/mlflow/client.py", "observability/mlflow/reader.py"),
}

# Modules that run code hidden in a file. `pickle` may be imported for the name of its error alone.
RUNS_CODE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
HARMLESS = ("pickle.UnpicklingError",)


@cache
def trees(folder: Path) -> dict[str, ast.Module]:
    """Path below `folder` ('data/sampler.py') -> syntax tree."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}


# -- imports --------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return program or pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")


def broken_contracts(root: Path) -> set[str]:
    """Names of the contracts of pyproject.toml that the package below `root` breaks."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [tool("lint-imports"), "--no-cache", "--no-logo"]
    ended = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    contracts = dict(re.findall(r"^(.+) (KEPT|BROKEN)$", ended.stdout, re.MULTILINE))
    assert len(contracts) == 3, ended.stdout + ended.stderr
    return {name for name, state in contracts.items() if state == "BROKEN"}


def test_every_import_contract_is_broken_by_an_import_that_it_forbids(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "mirl_dist", ignore=shutil.ignore_patterns("__pycache__"))
    assert broken_contracts(tmp_path) == set()
    forbidden = {
        "data/sampler.py": "mirl_dist.distributed.ranks",  # a neighbour
        "storage/retry.py": "torch",
        "pruning/masks.py": "accelerate",
    }
    for name, module in forbidden.items():
        file = tmp_path / "mirl_dist" / name
        file.write_text(f"{file.read_text()}\n\ndef late() -> None:\n    import {module}\n")
    assert broken_contracts(tmp_path) == {
        "packages import only downwards",
        "models and pruning know no config, rank or file",
        "storage, config and observability need no torch",
    }


def test_no_modules_import_each_other_in_a_ring() -> None:
    grimp = pytest.importorskip("grimp", reason="import-linter is not installed: pip install -e '.[dev]'")
    graph = grimp.build_graph("mirl_dist", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "mirl_dist.storage.commits" in imports["mirl_dist.training.checkpointing.checkpoint"]
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the ring


def banned_imports(root: Path, *options: str) -> list[str]:
    """'file:thing' of every import below `root` that ruff finds banned by the pyproject.toml there."""
    options = ("--config", "pyproject.toml", "--select", "TID251", "--output-format", "concise", *options)
    command = [tool("ruff"), "check", "--no-cache", *options, "mirl_dist"]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, 1), ended.stderr
    lines = [line for line in ended.stdout.splitlines() if "TID251" in line]
    return sorted({f"{line.split(':')[0]}:{line.split('`')[1]}" for line in lines})


def test_ruff_refuses_in_every_module_what_belongs_behind_a_door(tmp_path: Path) -> None:
    assert banned_imports(REPOSITORY) == []
    loop = tmp_path / "mirl_dist/training/loop.py"
    loop.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    loop.write_text("def late() -> None:\n    from mlflow.tracking import MlflowClient\n")
    assert banned_imports(tmp_path) == ["mirl_dist/training/loop.py:mlflow"], "inside a function too"
    loop.write_text("".join(f"import {thing}\n" for thing in DOORS))
    assert banned_imports(tmp_path) == sorted(f"mirl_dist/training/loop.py:{thing}" for thing in DOORS)


def test_each_door_uses_only_what_is_its_own() -> None:
    used = [line.split(":") for line in banned_imports(REPOSITORY, "--config", "lint.per-file-ignores = {}")]
    assert {thing for _, thing in used} == set(DOORS)
    for file, thing in used:
        allowed = [f"mirl_dist/{pattern}" for pattern in DOORS[thing]]
        assert any(fnmatch(file, pattern) for pattern in allowed), f"{file} uses {thing}; only {allowed} may"


@pytest.mark.parametrize("module", ["mirl_dist.cli.app", "mirl_dist.config.config", "mirl_dist.data.building.recipe"])
def test_the_front_door_opens_without_the_heavy_libraries(module: str) -> None:
    heavy = ("torch", "mlflow", "accelerate", "webdataset", "skimage", "matplotlib", "boto3", "deepspeed")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# -- no code from files ---------------------------------------------------------------------------------------------


def dangers(tree: ast.Module) -> Iterator[str]:
    """Everything in a module that could run code from a file."""
    nodes, safe = list(ast.walk(tree)), {"yaml.SafeLoader", "yaml.CSafeLoader"}  # which build plain values only
    harmless = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n) in HARMLESS}
    safe |= {n.name for n in nodes if isinstance(n, ast.ClassDef) and safe.intersection(map(ast.unparse, n.bases))}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_CODE:
            yield f"from {node.module} import"
        if isinstance(node, ast.Import):
            yield from (f"import {a.name} as {a.asname}" for a in node.names if a.name in RUNS_CODE and a.asname)
        if isinstance(node, ast.Name) and node.id in RUNS_CODE and id(node) not in harmless:
            yield f"use of {node.id}"
        if isinstance(node, ast.Call):
            yield from _danger_of_call(node, safe)


def _danger_of_call(node: ast.Call, safe: set[str]) -> Iterator[str]:
    name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if name in ("eval", "exec", "__import__", "compile"):
        yield name
    loaders = [given.get("Loader"), *map(ast.unparse, node.args[1:])]
    if name in ("yaml.load", "yaml.load_all") and safe.isdisjoint(loaders):
        yield f"{name} without a SafeLoader"
    if name.startswith("yaml.") and name.endswith(("full_load", "unsafe_load", "full_load_all", "unsafe_load_all")):
        yield name
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
        yield f"{name} without allow_pickle=False"
    if given.get("allow_pickle") == "True":
        yield f"{name} with allow_pickle=True"


def test_no_module_runs_code_from_a_file() -> None:
    assert [f"{name}: {danger}" for name, tree in trees(PACKAGE).items() for danger in dangers(tree)] == []


@pytest.mark.parametrize(
    ("text", "danger"),
    [
        ("import pickle\npickle.loads(b'')\n", "use of pickle"),
        ("from pickle import loads\n", "from pickle import"),
        ("import pickle as p\n", "import pickle as p"),
        ("import pickle\ntry: ...\nexcept pickle.UnpicklingError: ...\n", ""),
        ("import yaml\nyaml.load('', Loader=yaml.Loader)\n", "yaml.load without a SafeLoader"),
        ("import yaml\nyaml.load('')\n", "yaml.load without a SafeLoader"),
        ("import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load('', Loader=L)\n", ""),
        ("import yaml\nclass L(yaml.Loader): ...\nyaml.load('', Loader=L)\n", "without a SafeLoader"),
        ("import torch\ntorch.load('x')\n", "torch.load without weights_only=True"),
        ("import torch\ntorch.load('x', weights_only=False)\n", "torch.load without weights_only=True"),
        ("import torch\ntorch.load('x', weights_only=True)\n", ""),
        ("import numpy as np\nnp.load('x', allow_pickle=True)\n", "np.load without allow_pickle=False"),
        ("eval('1')\n", "eval"),
    ],
)
def test_what_could_run_code_from_a_file_is_noticed(text: str, danger: str) -> None:
    complaints = list(dangers(ast.parse(text)))
    assert any(danger in complaint for complaint in complaints) if danger else complaints == []


# -- sizes and names ------------------------------------------------------------------------------------------------

VAGUE = {"found", "said", "told", "mine", "odd", "held", "news"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def test_the_package_has_few_parts_and_no_crowded_folder() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 15, sorted(entries)
    modules = Counter(Path(name).parent.as_posix() for name in trees(PACKAGE) if not name.endswith("__init__.py"))
    assert {folder: count for folder, count in modules.items() if count > 20} == {}


def test_files_have_at_most_300_lines_and_functions_at_most_45() -> None:
    too_long = []
    for name, tree in trees(PACKAGE).items():
        lines = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
        too_long += [f"{name}: {lines} lines"] if lines > 300 else []
        lengths = [(one.name, (one.end_lineno or 0) - one.lineno + 1) for one in functions(tree)]
        too_long += [f"{name}: {function}: {length} lines" for function, length in lengths if length > 45]
    assert not too_long, "\n".join(too_long)


def test_no_two_classes_bear_one_name() -> None:
    places: dict[str, list[str]] = {}
    for name, tree in trees(PACKAGE).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(name)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_a_local_bears_the_noun_of_what_it_holds() -> None:
    vague = set()
    for name, tree in trees(PACKAGE).items():
        for function in functions(tree):
            names = [node.id for node in ast.walk(function) if isinstance(node, ast.Name)]
            names += [node.arg for node in ast.walk(function) if isinstance(node, ast.arg)]
            vague |= {f"{name}: {function.name}: {local}" for local in VAGUE.intersection(names)}
    assert not vague, "\n".join(sorted(vague))


def test_names_of_tests_stay_below_80_characters() -> None:
    names = [f"{file}: {one.name}" for file, tree in trees(PACKAGE.parent / "tests").items() for one in functions(tree)]
    too_long = [name for name in names if len(name.rpartition(": ")[2]) >= 80]
    assert not too_long, "\n".join(too_long)
